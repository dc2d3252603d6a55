"""multi_head_attention_forward; it runs on the kernels of attention."""
