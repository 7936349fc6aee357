"""The noise that optimised images begin as: white, or with the falloff, colours, contrast and mean that fit the teacher's statistics best.

White noise is as far from any photograph as an image can be: its power is spread evenly over the frequencies and its channels know nothing
of each other, while in photographs power falls as about 1 / f^2 and the channels nearly agree. Most steps of an inversion from white noise
go into undoing that. How steep, how grey and how bright the training images were can be read off the teacher without any image: of Gaussian
noise with a few parameters, take the one whose batch-norm statistics come nearest, once a set, before any pixel is optimised.

Source: ours. The 1 / f amplitude of natural images: Field (J. Opt. Soc. Am. A, 1987); spectra as parameters of optimised images: Olah et
al., Feature Visualization (Distill, 2017).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from synq.network.bn_stats import BatchNormInputs, ChannelStatistics, bns_loss

MAX_PROBES, MIN_PROBES = 64, 16
"""Images behind each measurement of the statistics: at most, and enough where they are large (64 pixels a side and more)."""
MAX_STEPS, USUAL_EVALUATIONS = 20, 24
"""Steps of L-BFGS, and the forward and backward passes that they take."""
TOLERANCE = 1e-8
"""Change of the distance, as a share of the first one, below which it ends before."""
LIMITS = {"exponent": (0.0, 4.0), "logit": (-6.0, 6.0), "log": (-4.0, 4.0)}
"""Where the numbers stay: beyond, float32 has no digits left, and no photograph is there."""
DECIMALS = 3
FIRST_EXPONENT, FIRST_CORRELATION = 1.5, 0.7
"""Where the fit begins: near photographs, because from white noise the distance can rise before it falls."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StartNoise:
    """Stationary Gaussian noise by a few numbers; the defaults are white noise N(0, 1)."""

    exponent: float = 0.0
    """How the amplitude falls: as f^-exponent over the frequency f; photographs have about 1."""
    correlation: float = 0.0
    """Correlation of any two channels, 0 to 1."""
    contrast: tuple[float, ...] = (1.0,)
    """Standard deviation of each channel, or of all, in the teacher's normalised units."""
    mean: tuple[float, ...] = (0.0,)
    """Mean of each channel, or of all, in the same units."""

    def shape(self, white: Tensor) -> Tensor:
        """Return `white`, noise N(0, 1) of shape (N, C, H, W), filtered, mixed and scaled; the same tensor for white noise itself."""
        if self == WHITE:
            return white
        numbers = [torch.tensor(value, device=white.device) for value in (self.exponent, self.correlation)]
        channels = [torch.tensor(values, device=white.device) for values in (self.contrast, self.mean)]
        return _shape(white, *numbers, *channels)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "StartNoise":
        """Read what `dataclasses.asdict` and JSON have made of one."""
        channels = {name: tuple(values[name]) for name in ("contrast", "mean")}
        return cls(exponent=values["exponent"], correlation=values["correlation"], **channels)


WHITE = StartNoise()


def _shape(white: Tensor, exponent: Tensor, correlation: Tensor, contrast: Tensor, mean: Tensor) -> Tensor:
    """Give noise its falloff, colours, contrast and mean, differentiably.

    Below the lowest frequency that fits into the image once, 1 / max(H, W) cycles a pixel, the amplitude rises no further, so that the
    mean of one image stays finite.
    """
    channels, height, width = white.shape[1:]
    rows, columns = torch.fft.fftfreq(height, device=white.device), torch.fft.fftfreq(width, device=white.device)
    frequency = torch.hypot(rows[:, None], columns).clamp(min=1 / max(height, width))
    amplitude = frequency**-exponent
    amplitude = amplitude / amplitude.square().mean().sqrt()
    filtered = torch.fft.irfft2(torch.fft.rfft2(white) * amplitude[:, : width // 2 + 1], s=(height, width))
    # The symmetric root of the correlation matrix (1 - r) 1 + r J: no channel comes before another.
    own = (1 - correlation).sqrt()
    shared = ((1 + (channels - 1) * correlation).sqrt() - own) / channels
    mixed = own * filtered + shared * filtered.sum(1, keepdim=True)
    return mixed * contrast.view(-1, 1, 1) + mean.view(-1, 1, 1)


def enough_probes(input_size: tuple[int, int, int]) -> int:
    """Return the images behind a measurement: MAX_PROBES up to 32 pixels a side, as many positions where they are larger, or MIN_PROBES."""
    _, height, width = input_size
    return min(MAX_PROBES, max(MIN_PROBES, MAX_PROBES * 32 * 32 // (height * width)))


def fit_start(
    module: nn.Module,
    input_size: tuple[int, int, int],
    targets: Mapping[str, ChannelStatistics],
    form: Literal["std_sum", "var_mean"],
    *,
    generator: torch.Generator,
    num_probes: int = MAX_PROBES,
    device: torch.device,
) -> StartNoise:
    """Return the noise whose batch-norm statistics are nearest to the teacher's, found by L-BFGS on its few numbers.

    Of all numbers that the search has tried the best are taken, so a search that diverges loses nothing. White noise comes back where
    nothing nearer was found. The result is rounded to DECIMALS; on another device or with other threads it may be another one all the same.

    Args:
        module: The teacher in eval mode, on `device`; not changed.
        input_size: Channels, height, width in pixels.
        targets: Batch-norm statistics to come near, on `device`.
        form: How their distance is taken, `synthesis.bns_form`.
        generator: CPU generator of the probes.
        num_probes: Images behind each measurement, at most; no more than `enough_probes`.
        device: Where to compute.
    """
    channels = input_size[0]
    white = torch.randn((min(num_probes, enough_probes(input_size)), *input_size), generator=generator).to(device)
    first = [FIRST_EXPONENT, math.log(FIRST_CORRELATION / (1 - FIRST_CORRELATION)), *[0.0] * (2 * channels)]
    numbers = torch.tensor(first, device=device, requires_grad=True)
    best = (math.inf, numbers.detach().clone())
    unit = 1.0

    def parts(numbers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        exponent, logit, logs, mean = numbers.split([1, 1, channels, channels])
        return (
            exponent.clamp(*LIMITS["exponent"]),
            logit.clamp(*LIMITS["logit"]).sigmoid(),
            logs.clamp(*LIMITS["log"]).exp(),
            mean,
        )

    with BatchNormInputs(module) as inputs:

        def distance(noise: Tensor) -> Tensor:
            module(noise.contiguous(memory_format=torch.channels_last).clone())  # a teacher may change its input
            return bns_loss(inputs.take(), targets, form)

        def closure() -> Tensor:
            nonlocal best, unit
            with torch.enable_grad():
                found = distance(_shape(white, *parts(numbers)))
                (numbers.grad,) = torch.autograd.grad(found / unit, numbers)
            value = found.item()
            if best[0] == math.inf and math.isfinite(value) and value > 0:
                numbers.grad /= value
                unit = value  # so that the search does not depend on the form and the number of layers
            if value < best[0]:
                best = value, numbers.detach().clone()
            return found.detach() / unit

        optimizer = torch.optim.LBFGS(
            [numbers], max_iter=MAX_STEPS, tolerance_change=TOLERANCE, line_search_fn="strong_wolfe"
        )
        optimizer.step(closure)
        with torch.no_grad():
            white_distance = distance(white).item()
    if not best[0] < white_distance:
        return WHITE
    (exponent,), (correlation,), contrast, mean = (
        [round(value, DECIMALS) for value in part.tolist()] for part in parts(best[1])
    )
    return StartNoise(
        exponent=exponent,
        correlation=correlation if channels > 1 else 0.0,
        contrast=tuple(contrast),
        mean=tuple(mean),
    )
