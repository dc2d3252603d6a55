"""attention; scaled_dot_product_attention runs on the same kernels."""
