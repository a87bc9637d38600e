"""Where compressed caches run."""
