"""Measure the speed of this machine and of SynQ on it."""
