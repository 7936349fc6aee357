"""Changes of written files: with a digest that fits, as another program would write them, or by single bytes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from synq.common.digests import KEY, write_sealed_json


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change the values of a JSON file and write it with the digest of the changed ones."""
    content = json.loads(path.read_text())
    content.pop(KEY, None)
    change(content)
    write_sealed_json(path, content)
    return path


def unsealed(path: Path, change: Callable[[dict[str, Any]], object] = lambda content: None) -> Path:
    """Change the values of a JSON file and write it without a digest, as earlier versions did."""
    content = json.loads(path.read_text())
    content.pop(KEY, None)
    change(content)
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path


def flip(path: Path, at: int, bit: int = 0) -> Path:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)
    return path
