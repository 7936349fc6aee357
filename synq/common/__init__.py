"""Utilities that know nothing of networks: atomic files, progress bars, seeds, text tables. Loads without torch."""
