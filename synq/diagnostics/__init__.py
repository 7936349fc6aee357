"""Analysis of a classifier before a run (inspection, smoke run) and of a finished run (probe)."""
