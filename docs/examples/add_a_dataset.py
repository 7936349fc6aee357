"""Add a source of labeled images from outside, to measure a student on them.

The decorator registers it for the runs of this process. A package registers one by an entry point of the group
synq.dataset_sources; a function of a file is named as FILE.py:FUNCTION.
"""

import numpy as np
from sklearn.datasets import load_digits

import synq


@synq.dataset_source("my_digits", version="1")
def digits(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the images (N, 8, 8) uint8 and labels (N,) of a part of the digits of scikit-learn: even or odd."""
    pixels, labels = load_digits(return_X_y=True)
    chosen = labels % 2 == (part == "odd")
    return np.rint(pixels[chosen].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8), labels[chosen]


def main() -> None:
    """Quantize the classifier that ships with SynQ, and measure it on two parts of a set."""
    settings = {"num_images": 64, "epochs": 2, "target": "research", "output_dir": "runs"}
    run = synq.quantize("bundled:digits_resnet8", weight_bits=3, act_bits=3, dataset="my_digits:even", **settings)
    print(run)
    print(run.evaluate("my_digits:odd").line())


if __name__ == "__main__":
    main()
