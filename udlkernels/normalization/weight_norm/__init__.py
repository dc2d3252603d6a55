"""weight_norm."""
