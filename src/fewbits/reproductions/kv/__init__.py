"""Claims of the papers on KV caches."""
