"""Records of runs: written, resumed, tracked, and opened again."""
