"""Padding of windows: what a format can express, and what needs an operator of its separate kind."""

Sides = tuple[int, int, int, int]
"""At the top, left, bottom and right."""


def same_padding(
    size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> Sides:
    """Return the padding that a format means by SAME: an output of ceil(size / stride), the odd pixel after the map.

    Args:
        size, kernel, stride, dilation: Down and right.

    Example:
        A kernel of 3 with the stride 2 on an even size: (0, 0, 1, 1), where PyTorch's padding 1 is (1, 1, 1, 1).
    """
    before, after = [], []
    for length, window, step, spread in zip(size, kernel, stride, dilation, strict=True):
        reach = (window - 1) * spread + 1
        total = max((-(-length // step) - 1) * step + reach - length, 0)
        before.append(total // 2)
        after.append(total - total // 2)
    return before[0], before[1], after[0], after[1]
