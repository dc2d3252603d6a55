"""attention_decode, over a cache of keys and values."""
