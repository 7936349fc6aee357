"""Calibration centers: one optimised image per class, whose batch-norm statistics become a second target for the deep layers."""

import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from synq.network.bn_stats import ChannelStatistics, pool_layers


def split_evenly(num_items: int, largest: int) -> list[range]:
    """Return the fewest consecutive ranges of at most `largest` items, their sizes equal or differing by one.

    Equal sizes, because batch-norm statistics are matched over one range: 257 images at most 256 at a time are 129 + 128, not
    256 + 1.
    """
    num_parts = math.ceil(num_items / largest)
    ends = [num_items * part // num_parts for part in range(num_parts + 1)]
    return [range(start, end) for start, end in itertools.pairwise(ends)]


def deep_layers(names: list[str], depth: float) -> list[str]:
    """Return the deepest share of the layers, at least one unless `depth` is 0.

    Args:
        names: Layers in order of execution.
        depth: Share in [0, 1]; 0.5 of 9 layers are the last 5.
    """
    num_deep = math.ceil(depth * len(names) - 1e-9)
    return names[len(names) - num_deep :]


def center_targets(parts: list[dict[str, ChannelStatistics]], depth: float) -> dict[str, ChannelStatistics]:
    """Pool the statistics of the centers' batches, which may differ in size, and keep those of the deepest layers.

    Args:
        parts: Per batch of centers, the statistics of every layer in order of execution.
        depth: Share of the layers, deepest first, in [0, 1].

    Source: TexQ (NeurIPS 2023), calibration centers with layered batch-norm alignment.
    """
    pooled = pool_layers(parts)
    return {name: pooled[name] for name in deep_layers(list(pooled), depth)}


def pack_statistics(statistics: Mapping[str, ChannelStatistics]) -> dict[str, Tensor]:
    """Return statistics as plain named tensors, for a file; the number keeps the order of execution."""
    packed: dict[str, Tensor] = {}
    for index, (name, part) in enumerate(statistics.items()):
        packed[f"{index:05d}.mean.{name}"] = part.mean
        packed[f"{index:05d}.variance.{name}"] = part.variance
        packed[f"{index:05d}.rest.{name}"] = torch.tensor([part.eps, part.num_values], dtype=torch.float64)
    return packed


def unpack_statistics(packed: Mapping[str, Tensor]) -> dict[str, ChannelStatistics]:
    """Return what `pack_statistics` was given."""
    statistics = {}
    for key in sorted(packed):
        index, kind, name = key.split(".", 2)
        if kind == "mean":
            eps, num_values = packed[f"{index}.rest.{name}"].tolist()
            statistics[name] = ChannelStatistics(packed[key], packed[f"{index}.variance.{name}"], eps, int(num_values))
    return statistics
