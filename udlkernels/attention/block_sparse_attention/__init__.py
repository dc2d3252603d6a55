"""block_sparse_attention, on the kernels of attention."""
