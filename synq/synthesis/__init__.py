"""Synthesis of the training images: model inversion, generators, the store of finished sets, the low-pass filter."""
