"""Train the student on unlabeled images of yours instead of synthetic ones, and compare.

A folder of image files, an .npz file, a `torch.utils.data.Dataset` or any iterable of images; here an array. Such a run
has the protocol own_images and a ranking of its own.
"""

import numpy as np
from sklearn.datasets import load_digits

import synq


def main() -> None:
    """Quantize the classifier that ships with SynQ on 100 images without labels, and without any image."""
    pixels, _ = load_digits(return_X_y=True)
    photos = np.rint(pixels[:100].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    settings = {"weight_bits": 3, "act_bits": 3, "target": "research", "epochs": 10, "output_dir": "runs"}
    own = synq.quantize("bundled:digits_resnet8", images=photos, **settings)
    zero_shot = synq.quantize("bundled:digits_resnet8", num_images=256, **settings)
    for run in (own, zero_shot):
        print(run)
    print(synq.sweeps.leaderboard("runs")[["rank", "protocol", "top1_mean", "objective_value"]])


if __name__ == "__main__":
    main()
