"""center_rows."""
