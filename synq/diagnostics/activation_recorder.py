"""An interpreter of a network that records what some of its modules read or return."""

from typing import Any

import torch
from torch import Tensor, fx


class ActivationRecorder(fx.Interpreter):
    """Run a network and record the outputs, or inputs, of all modules of some classes.

    Args:
        net: The network.
        kinds: Class or tuple of classes of modules.
        inputs: Record the first input of these modules instead of their output.
    """

    def __init__(self, net: fx.GraphModule, kinds: Any, *, inputs: bool = False) -> None:
        super().__init__(net)
        self.kinds, self.inputs = kinds, inputs
        self.recorded: dict[str, list[Tensor]] = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = super().call_module(target, args, kwargs)
        if isinstance(self.fetch_attr(target), self.kinds):
            self.recorded.setdefault(str(target), []).append(args[0] if self.inputs else output)
        return output

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Run one batch (N, C, H, W) and return the recorded tensors, flattened, by name of the module."""
        self.recorded = {}
        self.run(images)
        return {name: torch.cat([part.flatten() for part in parts]) for name, parts in self.recorded.items()}
