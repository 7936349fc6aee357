"""Verification of finished work: digests, and records and files that must fit each other."""
