"""Nodes of ONNX models with QuantizeLinear and DequantizeLinear (Q/DQ), step by step of an integer program."""
