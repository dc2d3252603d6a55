"""local_response_norm."""
