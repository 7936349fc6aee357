"""Random seeds derived from their purpose: no two purposes share a random stream, whatever the order of the calls."""

from __future__ import annotations

import hashlib
import json
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(*parts: int | str) -> int:
    """Derive a seed from the parts: the first 63 bits of SHA-256 over the JSON list of the parts.

    The JSON list separates the parts: ``("a", 1)``, ``("a1",)`` and ``("a", "1")`` give three different seeds. The
    value is the same on every machine and in every process, unlike Python's built-in ``hash`` of a string.

    Args:
        *parts: At least one integer or string, for example ``(data_seed, "train", shard)``.

    Returns:
        Integer in [0, 2**63).

    Raises:
        ValueError: If there is no part, or a part is neither an integer nor a string.
    """
    if not parts:
        raise ValueError("`parts` must name at least one integer or string, but got none")
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, int | str):
            raise ValueError(f"`parts` must be integers or strings, but got {part!r}")
    digest = hashlib.sha256(json.dumps(list(parts)).encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def make_generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a new random generator seeded by :func:`derive_seed`; the global random state is not changed.

    Args:
        *parts: See :func:`derive_seed`.
        device: Device of the generator. CPU and CUDA streams differ for the same seed: draw on the CPU and copy the
            values that must be the same on every device.
    """
    import torch  # a slow import: this package loads without it

    generator = torch.Generator(device=device)
    generator.manual_seed(derive_seed(*parts))
    return generator


def seed_everything(seed: int) -> None:
    """Seed the global state of ``random``, NumPy and PyTorch (all devices), for library code that takes no generator.

    Args:
        seed: Any non-negative integer; each library gets a separate derived seed.
    """
    import numpy
    import torch

    random.seed(derive_seed(seed, "python"))
    numpy.random.seed(derive_seed(seed, "numpy") % 2**32)  # NumPy's legacy generator takes a 32-bit seed
    torch.manual_seed(derive_seed(seed, "torch"))
