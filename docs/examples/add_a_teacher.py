"""Add a source of teachers from outside: a zoo whose networks are named like those of torchvision or timm.

The decorator registers it for the runs of this process. A package registers one by an entry point of the group
synq.teacher_sources, which commands and sweeps know as well.
"""

from quantize_your_model import trained_network

import synq


@synq.teacher_source("myzoo", version="1")
def load(name: str) -> synq.SourceModel:
    """Return the network of a name, with what is known about its input."""
    if name != "digits_cnn":
        raise ValueError(f"myzoo has digits_cnn only, but got {name!r}")
    net, _, _ = trained_network()
    return synq.SourceModel(module=net, input_size=(1, 8, 8), mean=(0.5,), std=(0.5,), default_dataset="digits")


def main() -> None:
    """Quantize a network of the zoo by its name."""
    run = synq.quantize("myzoo:digits_cnn", num_images=64, epochs=2, target="research", output_dir="runs")
    print(run)
    print("teacher", run.record.config["teacher"]["spec"])


if __name__ == "__main__":
    main()
