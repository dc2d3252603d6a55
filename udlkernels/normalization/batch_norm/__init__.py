"""batch_norm, batch_norm_act and sync_batch_norm, which share their kernels."""
