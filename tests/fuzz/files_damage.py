"""Damage that happens to files: truncation, flipped bits, repeated and removed blocks, other first bytes."""

import random
from collections.abc import Callable, Sequence

Damage = Callable[[bytes, random.Random], bytes]
MAGICS = (
    b"",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
    b"<!DOCTYPE html><html><body>sign in</body></html>",
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff\xe0",
    b"GIF89a",
    b"BM",
    b"RIFF\x40\0\0\0WEBPVP8 ",
    b"II*\0",
    b"MM\0*",
    b"P5 2 2 255\n",
    b"P6 3 3 65535\n",
    b"PK\x03\x04",
    b"\x80\x02",
    b"\x93NUMPY\x01\0",
    b'\x10\0\0\0\0\0\0\0{"a":{}}       ',
    b"%!PS-Adobe-3.0 EPSF-3.0\n",
)
NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF)


def keep(data: bytes, rng: random.Random) -> bytes:
    """No damage."""
    return data


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def behead(data: bytes, rng: random.Random) -> bytes:
    return data[rng.randrange(len(data) + 1) :]


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64)) if changed else 0):
        changed[_place(changed, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def set_number(data: bytes, rng: random.Random) -> bytes:
    """Write an extreme number over 1, 2, 4 or 8 bytes, of either byte order."""
    width = rng.choice((1, 2, 4, 8))
    value = rng.choice(NUMBERS) & ((1 << (8 * width)) - 1)
    at = _place(data, rng)
    return data[:at] + value.to_bytes(width, rng.choice(("big", "little"))) + data[at + width :]


def zero_block(data: bytes, rng: random.Random) -> bytes:
    """A block that was never written, as after a crash of the file system."""
    start, stop = sorted(_place(data, rng) for _ in range(2))
    return data[:start] + bytes(stop - start) + data[stop:]


def repeat_block(data: bytes, rng: random.Random) -> bytes:
    start, stop = sorted(_place(data, rng) for _ in range(2))
    return data[:stop] + data[start:stop] + data[stop:]


def remove_block(data: bytes, rng: random.Random) -> bytes:
    start, stop = sorted(_place(data, rng) for _ in range(2))
    return data[:start] + data[stop:]


def other_start(data: bytes, rng: random.Random) -> bytes:
    magic = rng.choice(MAGICS)
    return magic if rng.random() < 0.3 else magic + data[len(magic) :]


def append(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.choice((1, 7, 100)))


def line_ends(data: bytes, rng: random.Random) -> bytes:
    """A transfer in text mode."""
    return data.replace(b"\n", b"\r\n") if rng.random() < 0.5 else data.replace(b"\r\n", b"\n")


DAMAGES: Sequence[Damage] = (
    keep,
    cut,
    behead,
    flip_bits,
    flip_bits,
    set_number,
    set_number,
    zero_block,
    repeat_block,
    remove_block,
    other_start,
    append,
    line_ends,
)


def damaged(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Return damaged bytes, and the names of what was done to them."""
    names = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        damage = rng.choice(DAMAGES)
        data = damage(data, rng)
        names.append(damage.__name__)
    return data, " ".join(names)


def _place(data: bytes | bytearray, rng: random.Random) -> int:
    """A place in the file; half of them in the first 64 bytes, where headers are."""
    if not data:
        return 0
    return rng.randrange(min(len(data), 64)) if rng.random() < 0.5 else rng.randrange(len(data))
