"""Evaluation of students; the only package that reads real, labeled images."""
