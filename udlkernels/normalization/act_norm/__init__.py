"""act_norm."""
