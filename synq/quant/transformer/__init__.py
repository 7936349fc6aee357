"""Quantization of what only transformers have: LayerNorms that linear layers read, and the softmax of attention."""
