"""relative_position_bias."""
