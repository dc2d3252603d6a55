"""pixel_norm."""
