"""Thin doors: sweeps, tables, configurations of accelerate."""
