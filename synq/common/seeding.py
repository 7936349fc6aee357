"""Seeds derived from what they are for, so that no two uses share a random stream and no order of calls matters."""

from __future__ import annotations

import hashlib
import json
import random

import numpy
import torch


def derive_seed(*parts: int | str) -> int:
    """Seed named by its parts: the first 63 bits of SHA-256 over the JSON list of the parts.

    The JSON list keeps the parts apart: ``("a", 1)``, ``("a1",)`` and ``("a", "1")`` give three different seeds. The value is the
    same on every machine and in every process (Python's own ``hash`` of a string is not).

    Args:
        *parts: at least one integer or string, for example ``(data_seed, "train", shard)``.

    Returns:
        Integer in [0, 2**63).

    Raises:
        ValueError: if there is no part, or a part is neither an integer nor a string.
    """
    if not parts:
        raise ValueError("`parts` must name at least one integer or string, but got none")
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, int | str):
            raise ValueError(f"`parts` must be integers or strings, but got {part!r}")
    digest = hashlib.sha256(json.dumps(list(parts)).encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def make_generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Random generator seeded by :func:`derive_seed` of the parts; global random state is untouched.

    Args:
        *parts: see :func:`derive_seed`.
        device: where the generator draws. CPU and CUDA streams differ for one seed: draw on the CPU and copy what has to be the
            same on every device.

    Returns:
        A fresh generator.
    """
    generator = torch.Generator(device=device)
    generator.manual_seed(derive_seed(*parts))
    return generator


def seed_everything(seed: int) -> None:
    """Seed the global state of ``random``, NumPy and PyTorch (all devices), for library code that takes no generator.

    Args:
        seed: any non-negative integer; each library gets its own derived stream.
    """
    random.seed(derive_seed(seed, "python"))
    numpy.random.seed(derive_seed(seed, "numpy") % 2**32)  # NumPy's legacy state takes 32 bits
    torch.manual_seed(derive_seed(seed, "torch"))
