"""Look into a classifier or a run before or after the work: inspection, smoke run, probes."""
