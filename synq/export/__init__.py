"""Write a student as ONNX, packed weights or a torch.export program, and verify the files against it."""
