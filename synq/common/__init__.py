"""Utilities that know nothing of networks: atomic files, progress bars, seeds, text tables. Importing it loads no torch."""
