"""Integers of 2 to 8 bits side by side in bytes: 3 bits are 3 bits.

Code i occupies the bits [i b, (i + 1) b) of the stream, least significant bit first; bit j of the stream is bit j mod 8 of byte j div 8. The
codes are stored without sign, as code - quant_min, so that a file says the same on every machine.
"""

import numpy as np


def packed_size(count: int, bits: int) -> int:
    """Return the bytes that ``count`` codes of ``bits`` bits take."""
    return -(-count * bits // 8)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Return codes, any shape, in [0, 2^bits), as a row of bytes; unused bits of the last one are 0.

    ``pack(np.array([1, 2, 3]), 3)`` gives the bytes 0b11010001 and 0: 1 + (2 << 3) + (3 << 6), of which 8 bits go in the first.

    Raises:
        ValueError: If ``bits`` is not in [1, 8], or a code does not fit in it.
    """
    _check_bits(bits)
    flat = np.asarray(codes).reshape(-1)
    if flat.size and not (int(flat.min()) >= 0 and int(flat.max()) < 2**bits):
        raise ValueError(f"codes must be in [0, {2**bits - 1}] for {bits} bits, but got {flat.min()} to {flat.max()}")
    spread = np.unpackbits(flat.astype(np.uint8)[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(spread.reshape(-1), bitorder="little")


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return the ``count`` codes of ``bits`` bits in a row of bytes, as uint8 (count,).

    Raises:
        ValueError: If the row has another length than so many codes take.
    """
    _check_bits(bits)
    if packed.size != packed_size(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits must take {packed_size(count, bits)} bytes, but got {packed.size}"
        )
    stream = np.unpackbits(packed.astype(np.uint8, copy=False), count=count * bits, bitorder="little")
    return np.packbits(stream.reshape(count, bits), axis=1, bitorder="little").reshape(count)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be in [1, 8], but got {bits}")
