"""Batch-norm statistics: collect them in a forward pass, compare them with the running statistics, pool them."""

from collections.abc import Iterable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

SUMMED_AT_ONCE = 2**14
"""Maximum number of values per channel that are summed sequentially in float32."""


class ChannelStatistics(NamedTuple):
    """Statistics of the input of one batch-norm layer over images and positions.

    Attributes:
        mean: Mean per channel, shape (C,).
        variance: Biased variance per channel, shape (C,), without eps.
        eps: The layer's eps.
        num_values: Number of values per channel (images times positions); 0 if unknown (running statistics of a layer).
    """

    mean: Tensor
    variance: Tensor
    eps: float
    num_values: int


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance per channel with the fastest kernel for the layout of ``x``."""
    dims = [0, *range(2, x.dim())]
    if x.is_cuda:
        variance, mean = torch.var_mean(x, dims, correction=0)
    elif x.dtype == torch.float32 and x.dim() == 4 and not x.is_contiguous() and _is_channels_last(x):
        # Two vectorized reads and no write; for contiguous tensors this kernel is slower than the code below. It sums
        # sequentially: ten thousand values keep four digits, a whole batch of large images not three. Hence the parts.
        width = x.shape[3]
        rows = x.permute(0, 2, 3, 1).reshape(-1, 1, width, x.shape[1]).permute(0, 3, 1, 2)  # (N H, C, 1, W), a view
        parts = rows.split(max(1, SUMMED_AT_ONCE // width))
        means, variances = zip(*(torch.batch_norm_update_stats(part, None, None, 0.0) for part in parts), strict=True)
        if len(parts) == 1:
            return means[0], variances[0]
        counts = torch.tensor([len(part) for part in parts])
        mean, variance = pool_statistics(torch.stack(means), torch.stack(variances), counts)
    else:
        # On the CPU var_mean runs Welford's recurrence one value at a time: two plain sums are 4 times faster.
        mean = x.mean(dims)
        variance = (x - _per_channel(mean, x)).square_().mean(dims)
    return mean, variance


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _moment_slopes(x: Tensor, mean: Tensor, grad_mean: Tensor, grad_variance: Tensor) -> tuple[Tensor, Tensor]:
    """Return a and b, each (C,), with d loss / d x = a_c x + b_c.

    d mean_c / d x = 1 / n and d variance_c / d x = 2 (x - mean_c) / n, hence a = 2 g_variance / n and
    b = g_mean / n - a mean.
    """
    count = x.numel() // x.shape[1]
    slope = grad_variance * (2 / count)
    return slope, grad_mean / count - slope * mean


class _ChannelMoments(torch.autograd.Function):
    """Mean and biased variance per channel, with the gradient of both in one pass over the input.

    Autograd's formula for var_mean reads the input several more times.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = _moments(x)
        ctx.save_for_backward(x, mean)
        return mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mean: Tensor, grad_variance: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        slope, offset = _moment_slopes(x, mean, grad_mean, grad_variance)
        return torch.addcmul(_per_channel(offset, x), x, _per_channel(slope, x))


class _BatchNormWithMoments(torch.autograd.Function):
    """A frozen batch norm by its running statistics, y = scale x + shift, together with the moments of x.

    As one function, the sum of the three gradients with respect to x takes two passes; separately it takes five.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, variance = _moments(x)
        scale = torch.rsqrt(running_var + eps)
        ctx.save_for_backward(x, mean, scale if weight is None else scale * weight)
        ctx.set_materialize_grads(False)
        return F.batch_norm(x, running_mean, running_var, weight, bias, eps=eps), mean, variance

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_mean: Tensor | None, grad_variance: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, mean, scale = ctx.saved_tensors
        nothing = (None,) * 5
        if grad_mean is None and grad_variance is None:
            return None if grad_out is None else grad_out * _per_channel(scale, x), *nothing
        zero = torch.zeros_like(mean)
        slope, offset = _moment_slopes(
            x, mean, zero if grad_mean is None else grad_mean, zero if grad_variance is None else grad_variance
        )
        gradient = torch.addcmul(_per_channel(offset, x), x, _per_channel(slope, x))
        if grad_out is not None:
            gradient.addcmul_(grad_out, _per_channel(scale, x))
        return gradient, *nothing


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.dim() - 2))


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance per channel, each of shape (C,), differentiable once.

    mean_c = sum x_c / n, variance_c = sum (x_c - mean_c)^2 / n, over images and positions (n = N * H * W).

    Args:
        x: Shape (N, C, ...), floating point; float16 and bfloat16 are converted to float32, because sums over many
            values need the precision.
    """
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    mean, variance = _ChannelMoments.apply(x)
    return mean, variance


def _tracked_layers(module: nn.Module) -> dict[str, _BatchNorm]:
    """Return the batch-norm layers with running statistics, by name."""
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)}
    return {name: layer for name, layer in layers.items() if layer.running_mean is not None}


def bn_targets(module: nn.Module) -> dict[str, ChannelStatistics]:
    """Return the running statistics of every batch-norm layer, by name; empty if no layer keeps any.

    The tensors are those of the layers, not copies.
    """
    targets = {}
    for name, layer in _tracked_layers(module).items():
        assert layer.running_mean is not None and layer.running_var is not None
        targets[name] = ChannelStatistics(layer.running_mean, layer.running_var, layer.eps, 0)
    return targets


def _is_plain_and_frozen(layer: _BatchNorm) -> bool:
    is_plain = type(layer).forward is _BatchNorm.forward and "forward" not in vars(layer)
    return is_plain and not layer.training and not any(part.requires_grad for part in layer.parameters(recurse=False))


class BatchNormInputs:
    """Collect the statistics of every batch-norm input in a module's forward passes, with gradient (a context manager).

    Hooks exist only inside the `with` block, also if an exception leaves it. Only layers with running statistics are
    tracked; a layer that the forward pass does not reach is missing from the result. A frozen layer with PyTorch's
    forward computes its output and the statistics in one function; others keep their forward and get a hook.

    Example:
        with BatchNormInputs(teacher) as inputs:
            logits = teacher(images)
            loss = bns_loss(inputs.take(), bn_targets(teacher), "std_sum")
    """

    def __init__(self, module: nn.Module) -> None:
        self._layers = _tracked_layers(module)
        self._collected: dict[str, ChannelStatistics] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._replaced: list[_BatchNorm] = []

    def __enter__(self) -> Self:
        for name, layer in self._layers.items():
            if _is_plain_and_frozen(layer):
                layer.forward = partial(self._fused_forward, name, layer)  # type: ignore[method-assign]
                self._replaced.append(layer)
            else:
                self._handles.append(layer.register_forward_pre_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        for layer in self._replaced:
            del layer.forward  # the method of the class is visible again
        self._handles.clear()
        self._replaced.clear()
        self._collected.clear()

    def _hook(self, name: str) -> Any:
        def collect(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))  # a batch norm has one input, whatever its name
            assert isinstance(layer, _BatchNorm)
            self._add(name, layer, x, *channel_moments(x))

        return collect

    def _fused_forward(self, name: str, layer: _BatchNorm, input: Tensor) -> Tensor:  # named as in nn.BatchNorm2d
        if input.dtype in (torch.float16, torch.bfloat16):
            self._add(name, layer, input, *channel_moments(input))
            return type(layer).forward(layer, input)
        out, mean, variance = _BatchNormWithMoments.apply(
            input, layer.weight, layer.bias, layer.running_mean, layer.running_var, layer.eps
        )
        self._add(name, layer, input, mean, variance)
        return out

    def _add(self, name: str, layer: _BatchNorm, x: Tensor, mean: Tensor, variance: Tensor) -> None:
        found = ChannelStatistics(mean, variance, layer.eps, x.numel() // x.shape[1])
        if name in self._collected:  # A layer called several times: its running statistics cover all calls.
            found = _pool([self._collected[name], found])
        self._collected[name] = found

    def take(self) -> dict[str, ChannelStatistics]:
        """Return the statistics collected since the last call, by layer name in order of execution, and clear them."""
        collected, self._collected = self._collected, {}
        return collected


def bns_loss(
    statistics: Mapping[str, ChannelStatistics],
    targets: Mapping[str, ChannelStatistics],
    form: Literal["std_sum", "var_mean"],
) -> Tensor:
    """Return the distance of batch-norm statistics from their targets, a scalar; the mean over layers.

    std_sum:  (1 / L) sum_l ||mu_l - mu*_l||^2 + ||sigma_l - sigma*_l||^2, summed over channels, with
              sigma = sqrt(variance + eps)
    var_mean: the same with variances instead of sigma, and the mean over channels instead of the sum.

    Two channels, statistics (0, 1) and (0, 4) against targets (1, 1) and (0, 1), eps 0: std_sum gives 1 + 1 = 2,
    var_mean gives 1/2 + 9/2 = 5. A `bns_weight` that suits one form does not suit the other.

    Args:
        statistics: Statistics of a forward pass. Layers without a target are ignored.
        targets: Target statistics. Layers that are missing in `statistics` are ignored.
        form: One of the two.

    Raises:
        ValueError: If no layer is in both, or `form` is neither of the two.

    Source: SynQ (arXiv 2603.18423), section 3; var_mean is the form of published code. eps under the root differs from
    the paper on purpose: the square root without it has an infinite slope at a dead channel.
    """
    names = [name for name in targets if name in statistics]
    if not names:
        raise ValueError("`targets` must share at least one batch-norm layer with `statistics`, but got none")
    # One vector of the channels of all layers: a few kernels instead of a few per layer.
    mean_gap = _join(statistics[name].mean for name in names) - _join(targets[name].mean for name in names)
    spread = _join(statistics[name].variance + statistics[name].eps for name in names)
    target_spread = _join(targets[name].variance + targets[name].eps for name in names)
    if form == "std_sum":
        gap = mean_gap.square() + (spread.sqrt() - target_spread.sqrt()).square()
        return gap.sum() / len(names)
    if form != "var_mean":
        raise ValueError(f"`bns_form` must be one of std_sum, var_mean, but got {form}")
    gap = mean_gap.square() + (spread - target_spread).square()
    per_layer = gap.split([targets[name].mean.numel() for name in names])
    return torch.stack([layer.mean() for layer in per_layer]).mean()


def _join(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat(list(parts))


def pool_statistics(means: Tensor, variances: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of a set of values from those of its parts, which may differ in size.

    mean = sum_s w_s mean_s and variance = sum_s w_s variance_s + sum_s w_s (mean_s - mean)^2, with
    w_s = count_s / sum(counts).

    One value 0 and three values 4: means (0, 4), variances (0, 0), counts (1, 3) give mean 3, variance 3.

    Args:
        means: Shape (S, C), mean per part and channel.
        variances: Shape (S, C), biased variance per part and channel.
        counts: Shape (S,), values in each part; at least one is positive.

    Returns:
        Two tensors of shape (C,), in the dtype of `means`; summed in float64.
    """
    weights = (counts.double() / counts.double().sum()).unsqueeze(1)
    mean = (weights * means).sum(0)
    variance = (weights * variances).sum(0) + (weights * (means - mean).square()).sum(0)
    return mean.to(means.dtype), variance.to(means.dtype)


def _pool(parts: list[ChannelStatistics]) -> ChannelStatistics:
    counts = torch.tensor([part.num_values for part in parts], device=parts[0].mean.device)
    mean, variance = pool_statistics(
        torch.stack([part.mean for part in parts]), torch.stack([part.variance for part in parts]), counts
    )
    return ChannelStatistics(mean, variance, parts[0].eps, sum(part.num_values for part in parts))


def pool_layers(parts: list[dict[str, ChannelStatistics]]) -> dict[str, ChannelStatistics]:
    """Return the statistics of the union of several batches, layer by layer; every batch must have the same layers."""
    return {name: _pool([part[name] for part in parts]) for name in parts[0]}
