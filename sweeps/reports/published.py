"""Published results of zero-shot quantization, for comparison with our measurements."""

import functools
import itertools
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Published result of one method.

    Attributes:
        method: Name of the method.
        network: Name of network and data set; the weights are those of the paper.
        top1: Top-1 accuracy in percent.
        teacher_top1: Top-1 accuracy of the paper's float network in percent.
    """

    method: str
    network: str
    top1: float
    teacher_top1: float

    @property
    def drop(self) -> float:
        """Accuracy drop teacher_top1 - top1, in percentage points."""
        return self.teacher_top1 - self.top1


def references(model: str, bits: str, protocol: str, num_classes: int) -> list[Reference]:
    """Return the published results for a network of that name, best first.

    Args:
        model: Short name of the model, for example "cifar10_resnet20".
        bits: Bits of weights and activations, for example "W4A4".
        protocol: A or B.
        num_classes: Number of classes, which distinguishes data sets if the name does not.
    """
    tokens = _tokens(model)
    found = []
    for network in _networks():
        same = num_classes == network["num_classes"] and tokens.issuperset(network["tokens"])
        if not same or tokens.intersection(network["without"]):
            continue
        for method, results in network.get(protocol, {}).items():
            if bits in results:
                accuracies = {"top1": results[bits], "teacher_top1": network["teacher_top1"]}
                found.append(Reference(method=method, network=network["name"], **accuracies))
    return sorted(found, key=lambda one: -one.top1)


def _tokens(model: str) -> set[str]:
    """Return the tokens of a name and all pairs of neighbors joined: "ResNet-20" has the token "resnet20"."""
    tokens = re.findall(r"[a-z0-9]+", model.lower())
    return {*tokens, *(first + second for first, second in itertools.pairwise(tokens))}


@functools.cache
def _networks() -> Sequence[dict]:
    path = resources.files("synq.sweeps.reports") / "assets" / "published.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))["network"]
