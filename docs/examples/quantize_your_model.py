"""Quantize a network that is a Python object, and use the student.

A small CNN for gray images is trained here; any classifier with BatchNorm will do, on any device and in any mode. Its
training data are not needed: the labeled images below only measure the result.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import synq


def trained_network() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Return a CNN trained on two thirds of the digits of scikit-learn, and the images and labels of the rest."""
    torch.manual_seed(0)
    pixels, classes = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16  # in [0, 1]
    labels = torch.tensor(classes)
    net = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(8):
        for batch in torch.randperm(1200).split(64):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net((images[batch] - 0.5) / 0.5), labels[batch])
            loss.backward()
            optimizer.step()
    return net, images[1200:], labels[1200:]


def main() -> None:
    """Quantize the network to 4 bits, and print what became of it."""
    net, images, labels = trained_network()
    run = synq.quantize(
        net,
        weight_bits=4,
        act_bits=4,
        input_size=(1, 8, 8),
        mean=0.5,
        std=0.5,
        num_images=256,
        epochs=5,
        dataset=(images, labels),
        output_dir="runs",
    )
    print(run)
    print(run.metrics)

    # The student is an ordinary module. Like the network, it takes normalized images.
    logits = run.student((images[:3] - 0.5) / 0.5)
    print("classes", logits.argmax(1).tolist(), "labels", labels[:3].tolist())

    # Other labels, no training.
    print(run.evaluate((images[:200], labels[:200])).line())

    # In another session: the same folder and the same network.
    again = synq.open_run(run.path, model=net)
    assert again.record == run.record


if __name__ == "__main__":
    main()
