"""spectral_norm."""
