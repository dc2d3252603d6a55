"""adaptive_layer_norm."""
