"""Architectures of bundled teachers."""
