"""Swing convolutions: strided convolutions that see a randomly shifted input, so that every pixel position gets its share of gradient."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

Shift = tuple[int, int]
"""Rows and columns, in pixels; positive moves the content up and to the left."""


def reflect_shift(x: Tensor, shift: Shift) -> Tensor:
    """Shift maps by some pixels, the border mirrored: out[..., i, j] = x[..., m(i + down), m(j + right)].

    m mirrors a position at the first and the last one, without repeating them: -1 is 1, and H is H - 2. It is what padding by
    reflection on all sides and cropping back to the old size gives, but adds nothing at random on a GPU: the gradient is a sum of
    slices, where PyTorch's own padding adds atomically.

    A row (a, b, c, d) shifted by 1 is (b, c, d, c), by -1 (b, a, b, c).

    Args:
        x: Shape (..., H, W).
        shift: Rows and columns (down, right); beyond H - 1 and W - 1 there is nothing to mirror, so it is cut to these.
    """
    return _shift_axis(_shift_axis(x, -2, shift[0]), -1, shift[1])


def _shift_axis(x: Tensor, axis: int, offset: int) -> Tensor:
    size = x.shape[axis]
    offset = max(1 - size, min(size - 1, offset))
    if offset == 0:
        return x
    kept = x.narrow(axis, max(offset, 0), size - abs(offset))
    mirrored = x.narrow(axis, size - 1 - offset if offset > 0 else 1, abs(offset)).flip(axis)
    return torch.cat((kept, mirrored) if offset > 0 else (mirrored, kept), axis)


def strided_convolutions(module: nn.Module) -> list[nn.Conv2d]:
    """Return the two-dimensional convolutions that step by more than one pixel on an axis, in order of their names."""
    return [layer for layer in module.modules() if isinstance(layer, nn.Conv2d) and max(layer.stride) > 1]


def draw_swings(module: nn.Module, num_steps: int, generator: torch.Generator) -> list[list[Shift]]:
    """Draw the shifts of all steps at once, as Python numbers: no step waits for the device to learn its shift.

    Args:
        module: The network whose strided convolutions are to swing.
        num_steps: Steps to draw for.
        generator: CPU generator.

    Returns:
        Per step a shift for each of `strided_convolutions(module)`: whole numbers, uniform from -(stride - 1) to stride - 1.
    """
    limits = [limit - 1 for layer in strided_convolutions(module) for limit in layer.stride]
    columns = [torch.randint(-limit, limit + 1, (num_steps,), generator=generator).tolist() for limit in limits]
    steps = list(zip(*columns, strict=True)) if columns else [()] * num_steps
    return [list(zip(step[0::2], step[1::2], strict=True)) for step in steps]


class SwingConvolutions:
    """Context manager in which the strided convolutions of a module see their input shifted, in each step anew.

    A convolution of stride s reads some positions more often than others, or not at all (kernel 1, stride 2 reads one pixel in
    four), and leaves the images a pattern of s x s pixels. Shifted by up to s - 1 pixels each way, all positions take turns.

    Hooks exist inside the `with` block only, also when it is left by an exception. Without shifts it does nothing.

    Example:
        swings = draw_swings(teacher, 100, generator)
        with SwingConvolutions(teacher, swings) as swing:
            for step in range(100):
                swing.turn(step)
                logits = teacher(images)

    Source: Genie (CVPR 2023), section 3.2: padding by reflection by stride - 1, then a random crop of the old size.
    """

    def __init__(self, module: nn.Module, swings: Sequence[Sequence[Shift]]) -> None:
        self._layers = strided_convolutions(module) if swings else []
        self._swings = swings
        self._now: Sequence[Shift] = [(0, 0)] * len(self._layers)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def turn(self, step: int) -> None:
        """Take the shifts of step `step`; before the first call the convolutions stand still."""
        if self._swings:
            self._now = self._swings[step]

    def __enter__(self) -> Self:
        for index, layer in enumerate(self._layers):
            self._handles.append(layer.register_forward_pre_hook(self._hook(index)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, index: int) -> Any:
        def shifted(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return reflect_shift(args[0], self._now[index]), *args[1:]

        return shifted
