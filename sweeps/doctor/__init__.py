"""Checks of a Ray cluster before a sweep uses it."""
