"""Read a classifier: trace it, name its operations, find its blocks, BatchNorm statistics and class activation maps."""
