"""layer_norm and add_layer_norm, which share their kernels."""
