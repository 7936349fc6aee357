"""Exponential moving average (EMA) of the student's parameters over the steps of fine-tuning."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential moving average of parameters.

    After step t: average = d_t average + (1 - d_t) parameter, with d_t = min(decay, (t + 1) / (t + 10)). The decay
    rises with the steps, so that the initial weights are soon forgotten. Parameters are synchronized between
    processes, and so are their averages.

    Args:
        parameters: The parameters to average; averages are on the same devices.
        decay: Decay in [0, 1); None disables averaging, at no cost.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float | None) -> None:
        self._parameters = [parameter for parameter in parameters if decay is not None]
        self._decay = 0.0 if decay is None else decay
        self._steps = 0
        self._averages = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Update the averages with the parameters after one step."""
        if not self._parameters:
            return
        decay = min(self._decay, (self._steps + 1) / (self._steps + 10))
        self._steps += 1
        torch._foreach_lerp_(self._averages, [p.detach() for p in self._parameters], 1 - decay)

    @contextmanager
    def in_place(self, for_good: bool = False) -> Iterator[None]:
        """Replace the parameters by their averages inside the ``with`` block, or permanently with ``for_good``."""
        if not self._parameters:
            yield
            return
        current = [parameter.detach().clone() for parameter in self._parameters]
        self._copy_to_parameters(self._averages)
        try:
            yield
        finally:
            if not for_good:
                self._copy_to_parameters(current)

    @torch.no_grad()
    def _copy_to_parameters(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps and the averages."""
        return {"steps": self._steps, "averages": self._averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state from ``state_dict``.

        Raises:
            ValueError: If the numbers of tensors differ.
        """
        if len(state["averages"]) != len(self._averages):
            raise ValueError(f"the average has {len(state['averages'])} tensors instead of {len(self._averages)}")
        self._steps = state["steps"]
        for average, saved in zip(self._averages, state["averages"], strict=True):
            average.copy_(saved)
