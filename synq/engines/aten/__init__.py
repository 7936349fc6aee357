"""From PyTorch operators (ATen) on quantized activations to the steps of an integer program."""
