"""Make the synthetic images: inversion of the teacher, generators, the store of finished sets, the low-pass filter."""
