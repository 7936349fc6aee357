"""What inference engines compute: a student as an integer program, and each engine's arithmetic to the last bit."""
