"""Swing convolutions: strided convolutions with a randomly shifted input, so that all pixels get similar gradients."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

Shift = tuple[int, int]
"""Rows and columns in pixels; positive shifts the content up and to the left."""


def reflect_shift(x: Tensor, shift: Shift) -> Tensor:
    """Shift feature maps with reflection at the border: out[..., i, j] = x[..., m(i + down), m(j + right)].

    m reflects an index at the first and the last position without repeating them: -1 maps to 1, and H maps to H - 2.
    The result equals reflection padding on all sides followed by a crop to the original size. Its gradient is a sum of
    slices and so deterministic on a GPU, where the backward pass of PyTorch's reflection padding uses atomic additions.

    A row (a, b, c, d) shifted by 1 is (b, c, d, c); shifted by -1 it is (b, a, b, c).

    Args:
        x: Shape (..., H, W).
        shift: Rows and columns (down, right) in pixels; clamped to [-(H - 1), H - 1] and [-(W - 1), W - 1].
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
    """Return the 2d convolutions with a stride above 1 on any axis, in the order of `module.modules()`."""
    return [layer for layer in module.modules() if isinstance(layer, nn.Conv2d) and max(layer.stride) > 1]


def draw_swings(module: nn.Module, num_steps: int, generator: torch.Generator) -> list[list[Shift]]:
    """Draw the shifts of all steps as Python numbers, so that no step waits for the device.

    Args:
        module: The network with the strided convolutions.
        num_steps: Number of steps.
        generator: CPU generator.

    Returns:
        For each step, one shift for each of `strided_convolutions(module)`: integers, uniform in
        [-(stride - 1), stride - 1].
    """
    limits = [limit - 1 for layer in strided_convolutions(module) for limit in layer.stride]
    columns = [torch.randint(-limit, limit + 1, (num_steps,), generator=generator).tolist() for limit in limits]
    steps = list(zip(*columns, strict=True)) if columns else [()] * num_steps
    return [list(zip(step[0::2], step[1::2], strict=True)) for step in steps]


class SwingConvolutions:
    """Context manager that shifts the inputs of a module's strided convolutions, by new shifts at each step.

    A convolution of stride s reads some positions more often than others, or never (kernel 1 with stride 2 reads one
    pixel in four), which causes a checkerboard pattern of period s in synthesized images. Random shifts of up to s - 1
    pixels in each direction distribute the gradient over all positions.

    The hooks are registered inside the `with` block only and removed even after an exception. Without shifts the
    context manager does nothing.

    Example:
        swings = draw_swings(teacher, 100, generator)
        with SwingConvolutions(teacher, swings) as swing:
            for step in range(100):
                swing.set_step(step)
                logits = teacher(images)

    Source: Genie (CVPR 2023), section 3.2: reflection padding by stride - 1, then a random crop of the original size.
    """

    def __init__(self, module: nn.Module, swings: Sequence[Sequence[Shift]]) -> None:
        self._layers = strided_convolutions(module) if swings else []
        self._swings = swings
        self._shifts: Sequence[Shift] = [(0, 0)] * len(self._layers)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def set_step(self, step: int) -> None:
        """Use the shifts of step `step`; before the first call nothing is shifted."""
        if self._swings:
            self._shifts = self._swings[step]

    def __enter__(self) -> Self:
        for index, layer in enumerate(self._layers):
            self._handles.append(layer.register_forward_pre_hook(self._hook(index), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, index: int) -> Any:
        def shifted(
            layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            shift = self._shifts[index]
            if args:
                return (reflect_shift(args[0], shift), *args[1:]), kwargs
            name = next(iter(kwargs))  # a convolution has one input: conv(input=x)
            return args, {**kwargs, name: reflect_shift(kwargs[name], shift)}

        return shifted
