"""apply_rotary."""
