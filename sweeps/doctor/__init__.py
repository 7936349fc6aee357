"""A look at a cluster before a sweep: what works there, and what nobody has verified."""
