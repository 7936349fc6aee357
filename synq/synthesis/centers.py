"""Calibration centers: one optimized image per class, whose batch-norm statistics are a second synthesis target."""

import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from synq.network.bn_stats import ChannelStatistics, pool_layers


def split_evenly(num_items: int, largest: int) -> list[range]:
    """Split `num_items` into the fewest consecutive ranges of at most `largest` items; sizes differ by at most one.

    The sizes are balanced because batch-norm statistics are matched over one range: 257 images with at most 256 per
    range are split into 128 + 129, not 256 + 1.

    Args:
        num_items: Number of items, >= 0.
        largest: Maximum size of a range, >= 1.
    """
    num_parts = math.ceil(num_items / largest)
    bounds = [num_items * part // num_parts for part in range(num_parts + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(bounds)]


def deep_layers(names: list[str], depth: float) -> list[str]:
    """Return the last ceil(depth * len(names)) layers.

    Args:
        names: Names of the layers in order of execution.
        depth: Fraction of the layers, deepest first, in [0, 1]; 0.5 of 9 layers are the last 5.
    """
    num_deep = math.ceil(depth * len(names) - 1e-9)
    return names[len(names) - num_deep :]


def center_targets(parts: list[dict[str, ChannelStatistics]], depth: float) -> dict[str, ChannelStatistics]:
    """Return the pooled batch-norm statistics of all calibration centers, for the deepest layers only.

    Args:
        parts: For each batch of centers, the statistics of every layer in order of execution; the batches may differ in
            size.
        depth: Fraction of the layers, deepest first, in [0, 1].

    Returns:
        Statistics by layer name, in order of execution.

    Source: TexQ (NeurIPS 2023), calibration centers with layered batch-norm alignment.
    """
    pooled = pool_layers(parts)
    return {name: pooled[name] for name in deep_layers(list(pooled), depth)}


def pack_statistics(statistics: Mapping[str, ChannelStatistics]) -> dict[str, Tensor]:
    """Convert statistics into named tensors for a safetensors file.

    Args:
        statistics: Statistics by layer name, in order of execution.

    Returns:
        Tensors INDEX.mean.NAME and INDEX.variance.NAME, each (C,), and INDEX.rest.NAME, (2,) float64, with eps and the
        number of values. INDEX, of 5 digits, preserves the order of execution.
    """
    packed: dict[str, Tensor] = {}
    for index, (name, part) in enumerate(statistics.items()):
        packed[f"{index:05d}.mean.{name}"] = part.mean
        packed[f"{index:05d}.variance.{name}"] = part.variance
        packed[f"{index:05d}.rest.{name}"] = torch.tensor([part.eps, part.num_values], dtype=torch.float64)
    return packed


def unpack_statistics(packed: Mapping[str, Tensor]) -> dict[str, ChannelStatistics]:
    """Restore the statistics from the tensors of `pack_statistics`, in order of execution."""
    statistics = {}
    for key in sorted(packed):
        index, kind, name = key.split(".", 2)
        if kind == "mean":
            eps, num_values = packed[f"{index}.rest.{name}"].tolist()
            statistics[name] = ChannelStatistics(packed[key], packed[f"{index}.variance.{name}"], eps, int(num_values))
    return statistics
