"""Storage of a sweep's files: addresses, object stores, and the lease that gives one driver exclusive access."""
