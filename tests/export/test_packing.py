"""Codes of every width in bytes and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synq.export.packing import pack, packed_size, unpack


def test_the_layout_by_hand() -> None:
    assert pack(np.array([1, 2, 3]), 3).tolist() == [0b11_010_001, 0b0]
    assert pack(np.array([[1, 2], [15, 0]]), 4).tolist() == [0x21, 0x0F]
    assert pack(np.array([7]), 8).tolist() == [7] and pack(np.array([], dtype=int), 5).size == 0


@given(st.integers(1, 8).flatmap(lambda b: st.tuples(st.just(b), st.lists(st.integers(0, 2**b - 1), max_size=70))))
def test_every_code_comes_back(case: tuple[int, list[int]]) -> None:
    bits, codes = case
    packed = pack(np.array(codes, dtype=np.int64), bits)
    assert packed.dtype == np.uint8 and packed.size == packed_size(len(codes), bits) == -(-len(codes) * bits // 8)
    assert unpack(packed, bits, len(codes)).tolist() == codes
    # The stream is the binary number whose digits are the codes.
    number = sum(code << (bits * place) for place, code in enumerate(codes))
    assert int.from_bytes(packed.tobytes(), "little") == number


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"codes must be in \[0, 7\] for 3 bits, but got 0 to 8"):
        pack(np.array([0, 8]), 3)
    with pytest.raises(ValueError, match="but got -1 to 2"):
        pack(np.array([2, -1]), 3)
    with pytest.raises(ValueError, match=r"bits must be in \[1, 8\], but got 9"):
        pack(np.array([0]), 9)
    with pytest.raises(ValueError, match="3 codes of 3 bits must take 2 bytes, but got 1"):
        unpack(np.zeros(1, np.uint8), 3, 3)
