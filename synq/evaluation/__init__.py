"""Measure students. Real, labelled images are read here and nowhere else."""
