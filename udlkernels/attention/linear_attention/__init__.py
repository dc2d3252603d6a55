"""linear_attention."""
