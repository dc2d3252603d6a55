"""merge_lse."""
