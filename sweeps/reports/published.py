"""Figures of papers for the networks they are about, as reference lines beside what was measured here."""

import functools
import itertools
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A published figure.

    Attributes:
        method: Its name.
        network: The network and data in words; weights are the paper's own.
        top1: In percent.
        teacher_top1: Of the paper's float network.
    """

    method: str
    network: str
    top1: float
    teacher_top1: float

    @property
    def drop(self) -> float:
        """teacher_top1 - top1, in points."""
        return self.teacher_top1 - self.top1


def references(model: str, bits: str, protocol: str, num_classes: int) -> list[Reference]:
    """Return what is published of a network of that name, best first; none for one that no paper of the list has.

    Args:
        model: Short name of the model, for example "cifar10_resnet20".
        bits: For example "W4A4".
        protocol: A or B.
        num_classes: Its number of classes, which tells data apart that the name does not say.
    """
    words = _words(model)
    found = []
    for network in _networks():
        same = num_classes == network["num_classes"] and words.issuperset(network["words"])
        if not same or words.intersection(network["without"]):
            continue
        for method, figures in network.get(protocol, {}).items():
            if bits in figures:
                drops = {"top1": figures[bits], "teacher_top1": network["teacher_top1"]}
                found.append(Reference(method=method, network=network["name"], **drops))
    return sorted(found, key=lambda one: -one.top1)


def _words(model: str) -> set[str]:
    """Words of a name, and every two neighbors as one: "ResNet-20" holds "resnet20"."""
    words = re.findall(r"[a-z0-9]+", model.lower())
    return {*words, *(first + second for first, second in itertools.pairwise(words))}


@functools.cache
def _networks() -> Sequence[dict]:
    path = resources.files("synq.sweeps.reports") / "assets" / "published.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))["network"]
