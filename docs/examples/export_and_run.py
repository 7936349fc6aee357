"""Export a student to ONNX, and run the file in ONNX Runtime: it computes what `run.deployed` does, to the last bit."""

import numpy as np
import onnxruntime
import torch

import synq


def main() -> None:
    """Quantize the classifier that ships with SynQ, export it, and compare file and student."""
    run = synq.quantize("bundled:digits_resnet8", num_images=128, epochs=2, output_dir="runs")
    exported = run.export("exported", rounds=5)
    print(exported.files[0], f"{exported.files[0].stat().st_size / 1024:.1f} KiB")

    images = run.images.images[:64]  # any normalized images, (N, C, H, W)
    session = onnxruntime.InferenceSession(exported.files[0], providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        expected = run.deployed(images).numpy()
    print("bits that differ from the student:", int(np.count_nonzero(logits != expected)))
    np.testing.assert_array_equal(logits, expected)


if __name__ == "__main__":
    main()
