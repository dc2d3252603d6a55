"""attention_varlen, over sequences packed into one batch."""
