"""Where a sweep's files are: folders, object stores, and the lease that one driver holds on them."""
