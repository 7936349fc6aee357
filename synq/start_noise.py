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
from typing import Literal

import torch
from torch import Tensor, nn

from synq.bn_stats import BatchNormInputs, ChannelStatistics, bns_loss

NUM_PROBES = 64
"""Images behind each measurement of the statistics."""
MAX_STEPS = 20
"""Steps of L-BFGS; it mostly ends by itself after about 12 evaluations."""
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


def fit_start(
    module: nn.Module,
    input_size: tuple[int, int, int],
    targets: Mapping[str, ChannelStatistics],
    form: Literal["std_sum", "var_mean"],
    *,
    generator: torch.Generator,
    device: torch.device,
) -> StartNoise:
    """Return the noise whose batch-norm statistics are nearest to the teacher's, found by L-BFGS on its few numbers.

    White noise comes back where nothing nearer was found, or where the teacher gives nothing finite.

    Args:
        module: The teacher in eval mode, on `device`; not changed.
        input_size: Channels, height, width in pixels.
        targets: Batch-norm statistics to come near, on `device`.
        form: How their distance is taken, `synthesis.bns_form`.
        generator: CPU generator of the probes.
        device: Where to compute.
    """
    channels = input_size[0]
    white = torch.randn((NUM_PROBES, *input_size), generator=generator).to(device)
    first = [FIRST_EXPONENT, math.log(FIRST_CORRELATION / (1 - FIRST_CORRELATION)), *[0.0] * (2 * channels)]
    numbers = torch.tensor(first, device=device, requires_grad=True)

    def parts() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        exponent, logit, logs, mean = numbers.split([1, 1, channels, channels])
        return exponent, logit.sigmoid(), logs.exp(), mean

    with BatchNormInputs(module) as inputs:

        def distance(noise: Tensor) -> Tensor:
            module(noise.contiguous(memory_format=torch.channels_last).clone())  # a teacher may change its input
            return bns_loss(inputs.take(), targets, form)

        def closure() -> Tensor:
            with torch.enable_grad():
                loss = distance(_shape(white, *parts()))
                (numbers.grad,) = torch.autograd.grad(loss, numbers)
            return loss.detach()

        optimizer = torch.optim.LBFGS(
            [numbers], max_iter=MAX_STEPS, tolerance_change=1e-3, line_search_fn="strong_wolfe"
        )
        optimizer.step(closure)
        # Rounded, so that the last bits of a device or of a number of threads do not make another set.
        rounded = ([round(value, DECIMALS) for value in part.tolist()] for part in parts())
        (exponent,), (correlation,), contrast, mean = rounded
        found = StartNoise(
            exponent=exponent,
            correlation=correlation if channels > 1 else 0.0,
            contrast=tuple(contrast),
            mean=tuple(mean),
        )
        with torch.no_grad():
            return found if distance(found.shape(white)) < distance(white) else WHITE
