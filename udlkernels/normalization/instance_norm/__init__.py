"""instance_norm and adaptive_instance_norm, on the kernels of group_norm."""
