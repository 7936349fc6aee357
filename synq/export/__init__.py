"""Export a student to ONNX, packed weights or a torch.export program, and verify the files against it."""
