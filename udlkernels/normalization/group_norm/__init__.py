"""group_norm and group_norm_act; instance_norm runs on the same kernels."""
