"""Check a cluster before a sweep uses it."""
