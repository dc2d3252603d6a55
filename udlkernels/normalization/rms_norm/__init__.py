"""rms_norm and add_rms_norm, which share their kernels."""
