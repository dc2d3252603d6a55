"""Normalization: kernels and formulas. The public functions live in `udlkernels.functional`."""
