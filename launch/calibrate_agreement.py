"""Make the students that the expected agreement is calibrated on, and the table of docs/results/CALIBRATION.md.

    python launch/calibrate_agreement.py OUTPUT --networks FOLDER [--fashion FOLDER] [--cifar FOLDER] [--only NAME ...]

FOLDER of --networks holds the files of `launch/calibration_networks.py` and `fashion_cnn.safetensors` of
`launch/train_fashion_cnn.py`. A network whose weights or images are missing is left out and named.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout that is not installed

import click
import torch

from synq.common.exit_codes import leave
from synq.common.text_tables import to_markdown
from synq.config.command_line import Command
from synq.config.command_options import argument, option
from synq.config.run import EvaluationConfig, RunConfig, with_overrides
from synq.finetune.loop import NonFiniteLossError
from synq.sweeps.studies.agreement_fit import COLUMNS, Errors, errors, fit, row_of, table
from synq.sweeps.studies.agreement_study import Network, Student, measured

HERE = Path(__file__).resolve().parent
CIFAR_MEAN, CIFAR_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
LABELED_IMAGES = 1000
TUNED = {"finetune.epochs": 4, "finetune.lr": 0.01}
HOT = {"finetune.epochs": 3, "finetune.lr": 0.2}
BROKEN = {"finetune.epochs": 1, "finetune.lr": 0.01, "finetune.grad_clip": None, "finetune.grad_clip_relative": None}
POOR = {"synthesis.num_images": 64, "synthesis.iterations": 8}
"""Images far from converged."""
SHORT = {"synthesis.iterations": 25, "finetune.epochs": 2}
"""For the slowest network."""
BITS = ((8, 8), (4, 4), (3, 3), (2, 4))
PARTS = {
    "digits_resnet8": ("harmed", "inputs", "engine", "poor"),
    "fashion_cnn": ("harmed", "inputs", "engine", "poor"),
    "fashion_vgg": ("harmed", "inputs", "engine", "poor"),
    "digits_vgg": ("harmed", "inputs", "engine", "poor"),
    "fashion_resnet": ("harmed", "inputs"),
    "cifar_resnet": ("harmed",),
    "cifar10_resnet20": ("harmed",),
    "cifar100_resnet20": (),
}
"""Students of each network next to the rounded and the tuned one at each of `BITS`: fewer of large networks."""


def networks(folder: Path, fashion: str, cifar: Path) -> dict[str, tuple[dict[str, Any], EvaluationConfig]]:
    """Return the settings of each teacher and its labeled images, by name."""

    def made(file: str, factory: str, size: list[int], source: str, dataset: str) -> Any:
        norm = {"fashion": ([0.286], [0.353]), "digits": ([0.305], [0.376]), "cifar": (CIFAR_MEAN, CIFAR_STD)}[source]
        teacher = {"spec": f"{HERE / file}:{factory}", "input_size": size, "mean": norm[0], "std": norm[1]}
        name = "fashion_cnn" if factory == "FashionCNN" else factory
        teacher["weights"] = str(folder / f"{name}.safetensors")
        data = fashion if dataset == "fashion-mnist" else None
        return teacher, EvaluationConfig(dataset=dataset, data_dir=data, num_images=LABELED_IMAGES)

    def real(number: int, mean: list[float], std: list[float]) -> Any:
        name = f"cifar{number}_resnet20"
        teacher = {"spec": f"{cifar / 'teachers.py'}:{name}", "weights": str(cifar / f"{name}.safetensors")}
        teacher |= {"input_size": [3, 32, 32], "mean": mean, "std": std}
        dataset = f"npz:{cifar / f'cifar{number}_test_a.npz'}"
        return teacher, EvaluationConfig(dataset=dataset, num_images=LABELED_IMAGES)

    own, small = "calibration_networks.py", [1, 28, 28]
    return {
        "digits_resnet8": ({}, EvaluationConfig()),
        "fashion_cnn": made("train_fashion_cnn.py", "FashionCNN", small, "fashion", "fashion-mnist"),
        "fashion_vgg": made(own, "fashion_vgg", small, "fashion", "fashion-mnist"),
        "digits_vgg": made(own, "digits_vgg", [1, 8, 8], "digits", f"npz:{folder / 'digits_vgg.npz'}"),
        "fashion_resnet": made(own, "fashion_resnet", small, "fashion", "fashion-mnist"),
        "cifar_resnet": made(own, "cifar_resnet", [3, 32, 32], "cifar", f"npz:{folder / 'cifar_resnet.npz'}"),
        "cifar10_resnet20": real(10, CIFAR_MEAN, CIFAR_STD),
        "cifar100_resnet20": real(100, [0.507, 0.487, 0.441], [0.267, 0.256, 0.276]),
    }


def students(name: str, teacher: dict[str, Any], labeled: EvaluationConfig, output: Path) -> Iterator[Student]:
    """Yield the students of a network: rounded and fine-tuned, well and badly, at each bit-width."""
    base: dict[str, Any] = {f"teacher.{key}": value for key, value in teacher.items()}
    base |= {"evaluation.dataset": "none", "runtime.output_dir": str(output / name), "runtime.progress": False}
    base |= {"synthesis.num_images": 256, "synthesis.iterations": 60, "runtime.device": "cpu"}
    short = SHORT if name == "cifar100_resnet20" else {}
    base |= {key: value for key, value in short.items() if key.startswith("synthesis")}
    tuned = {**TUNED, **{key: value for key, value in short.items() if key.startswith("finetune")}}
    rounded = {"finetune.epochs": 0}

    def student(variant: str, bits: tuple[int, int], more: dict[str, Any]) -> Student:
        chosen = {"quant.weight_bits": bits[0], "quant.act_bits": bits[1]}
        return Student(
            network=name,
            variant=variant,
            config=with_overrides(RunConfig(), {**base, **chosen, **more}),
            labeled=labeled,
        )

    both, parts = (("rounded", rounded), ("tuned", tuned)), PARTS[name]
    for bits in BITS:
        for variant, more in both:
            yield student(variant, bits, more)
    if "harmed" in parts:
        for bits in ((8, 8), (4, 4)):
            yield student("hot", bits, HOT)
        yield student("broken", (3, 3), BROKEN)
    if "inputs" in parts:
        for bits in ((4, 4), (3, 3)):
            for variant, more in both:
                yield student(variant, bits, {"quant.act_points": "inputs", **more})
    if "engine" in parts:
        for variant, more in both:
            yield student(variant, (8, 8), {"quant.target": "onnxruntime", **more})
    if "poor" in parts:
        for bits in ((8, 8), (4, 4)):
            for variant, more in both:
                yield student(f"poor_{variant}", bits, {**POOR, **more})


@click.command("calibrate_agreement", cls=Command)
@argument("output", metavar="OUTPUT", help="folder of the results")
@option("--networks", "folder", metavar="FOLDER", required=True, help="folder of the trained networks")
@option("--fashion", metavar="FOLDER", default=".", help="folder of Fashion-MNIST's IDX files")
@option("--cifar", metavar="FOLDER", default=".", help="folder of the CIFAR networks, teachers.py and test images")
@option("--only", several=True, metavar="NAME", help="some of the networks (default: all)")
@option("--table-only", is_flag=True, help="make no student: constants and table of those that are there")
def command(output: str, folder: str, fashion: str, cifar: str, only: tuple[str, ...], table_only: bool) -> None:
    """Make and measure the students of the calibration, and print constants, error rates and table."""
    torch.set_num_threads(1)
    root = Path(output)
    for name, (teacher, labeled) in networks(Path(folder).resolve(), fashion, Path(cifar).resolve()).items():
        if table_only or (only and name not in only):
            continue
        network = None
        for student in students(name, teacher, labeled, root / "runs"):
            started = time.perf_counter()
            network = network or Network(student)
            try:
                measured(student, network, root / "logits")
            except NonFiniteLossError as error:
                print(f"{student.name}: left out, {error}", flush=True)
                continue
            row = row_of(root / "logits" / f"{student.name}.safetensors")
            print(
                f"{student.name}: plain {row.plain:.1f}, views {row.harder:.1f}, labeled {row.real:.1f}, top-1 "
                f"{row.top1:.2f} of {row.teacher_top1:.2f}, {time.perf_counter() - started:.0f} s",
                flush=True,
            )
    rows = [row_of(path) for path in sorted((root / "logits").glob("*.safetensors"))]
    if len({row.network for row in rows}) < 3:
        print("constants and table need three networks")
        return
    print(fit(rows))
    for name, value in errors(rows).items():
        print(f"{name}: {value.text() if isinstance(value, Errors) else value}")
    print(to_markdown(table(rows), COLUMNS), end="")


if __name__ == "__main__":
    leave(command.run(program="python launch/calibrate_agreement.py"))
