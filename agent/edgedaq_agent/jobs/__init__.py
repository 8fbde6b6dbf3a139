"""Device jobs, one module each."""
