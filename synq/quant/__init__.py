"""Quantize: fake quantization, observers, rounding, the student, and its exact integer form."""
