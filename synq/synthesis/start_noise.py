"""Initial noise of the optimized images: white noise, or Gaussian noise fitted to the teacher's batch-norm statistics.

White noise is unlike any photograph: its power is uniform over the frequencies and its channels are independent, while
in photographs the power falls as about 1 / f^2 and the channels are strongly correlated. An inversion that starts from
white noise spends most of its steps on this difference. The spectrum, channel correlation, contrast and mean of the
training images can be estimated from the teacher without any image: among Gaussian noises with these few parameters,
take the one whose batch-norm statistics are closest to the teacher's. The fit runs once per set, before any pixel is
optimized.

Source: ours. The 1 / f amplitude of natural images: Field (J. Opt. Soc. Am. A, 1987); spectra as parameters of
optimized images: Olah et al., Feature Visualization (Distill, 2017).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from synq.network.bn_stats import BatchNormInputs, ChannelStatistics, bns_loss
from synq.teacher.pixel_range import PixelRange

MAX_PROBES, MIN_PROBES = 64, 16
"""Noise images per evaluation of the statistics: the maximum, and the minimum, used from 64 x 64 pixels upward."""
MAX_STEPS, USUAL_EVALUATIONS = 20, 24
"""Maximum steps of L-BFGS, and the typical number of forward and backward passes that they take."""
TOLERANCE = 1e-8
"""L-BFGS stops when the distance changes by less than this, relative to the initial distance."""
LIMITS = {"exponent": (0.0, 4.0), "logit": (-6.0, 6.0), "log": (-4.0, 4.0)}
"""Bounds of the parameters: values outside exceed the precision of float32, and no photograph has them."""
DECIMALS = 3
FIRST_EXPONENT, FIRST_CORRELATION = 1.5, 0.7
"""Initial values of the fit, close to photographs: from white noise the distance can rise before it falls."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StartNoise:
    """Parameters of stationary Gaussian noise; the defaults are white noise N(0, 1)."""

    exponent: float = 0.0
    """Exponent of the amplitude spectrum f^-exponent over the frequency f; about 1 for photographs."""
    correlation: float = 0.0
    """Correlation between any two channels, in [0, 1]."""
    contrast: tuple[float, ...] = (1.0,)
    """Standard deviation per channel, or one for all, in units of the teacher's normalized input."""
    mean: tuple[float, ...] = (0.0,)
    """Mean per channel, or one for all, in the same units."""

    def apply(self, white: Tensor) -> Tensor:
        """Transform white noise N(0, 1) into noise of this distribution.

        Args:
            white: Shape (N, C, H, W).

        Returns:
            Noise of the same shape; the tensor `white` itself if this is white noise.
        """
        if self == WHITE:
            return white
        scalars = [torch.tensor(value, device=white.device) for value in (self.exponent, self.correlation)]
        vectors = [torch.tensor(values, device=white.device) for values in (self.contrast, self.mean)]
        return _transform(white, *scalars, *vectors)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "StartNoise":
        """Create the noise from the values of `dataclasses.asdict`, also after a round trip through JSON."""
        channels = {name: tuple(values[name]) for name in ("contrast", "mean")}
        return cls(exponent=values["exponent"], correlation=values["correlation"], **channels)


WHITE = StartNoise()


def _transform(white: Tensor, exponent: Tensor, correlation: Tensor, contrast: Tensor, mean: Tensor) -> Tensor:
    """Apply spectrum, channel correlation, contrast and mean to white noise (N, C, H, W), differentiably.

    The amplitude is constant below the lowest nonzero frequency of the image, 1 / max(H, W) cycles per pixel, so that
    the mean of an image remains finite.
    """
    channels, height, width = white.shape[1:]
    rows, columns = torch.fft.fftfreq(height, device=white.device), torch.fft.fftfreq(width, device=white.device)
    frequency = torch.hypot(rows[:, None], columns).clamp(min=1 / max(height, width))
    amplitude = frequency**-exponent
    amplitude = amplitude / amplitude.square().mean().sqrt()
    filtered = torch.fft.irfft2(torch.fft.rfft2(white) * amplitude[:, : width // 2 + 1], s=(height, width))
    # The symmetric square root of the correlation matrix (1 - r) I + r J treats all channels equally.
    independent = (1 - correlation).sqrt()
    shared = ((1 + (channels - 1) * correlation).sqrt() - independent) / channels
    mixed = independent * filtered + shared * filtered.sum(1, keepdim=True)
    return mixed * contrast.view(-1, 1, 1) + mean.view(-1, 1, 1)


def enough_probes(input_size: tuple[int, int, int]) -> int:
    """Return the number of noise images per evaluation of the statistics.

    It is MAX_PROBES for images of up to 32 x 32 pixels; for larger images it keeps the total number of pixels constant,
    but is at least MIN_PROBES.

    Args:
        input_size: Channels, height, width in pixels.
    """
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
    pixel_range: PixelRange | None = None,
    device: torch.device,
) -> StartNoise:
    """Fit the parameters of the initial noise to the teacher's batch-norm statistics with L-BFGS.

    The best of all evaluated parameters are returned, so a diverging search does no harm. If none are closer to the
    targets than white noise, white noise is returned. The result is rounded to DECIMALS decimals, but may still differ
    between devices and numbers of threads.

    Args:
        module: The teacher in eval mode, on `device`; not changed.
        input_size: Channels, height, width in pixels.
        targets: Target batch-norm statistics by layer, on `device`.
        form: Form of the loss, `synthesis.bns_form`.
        generator: CPU generator for the white noise.
        pixel_range: Range of normalized pixels, to which the noise is clamped before it is compared, as the images are
            that start from it; None for no bounds.
        num_probes: Maximum number of noise images per evaluation; `enough_probes` is a further limit.
        device: Device to compute on.
    """
    channels = input_size[0]
    white = torch.randn((min(num_probes, enough_probes(input_size)), *input_size), generator=generator).to(device)
    initial = [FIRST_EXPONENT, math.log(FIRST_CORRELATION / (1 - FIRST_CORRELATION)), *[0.0] * (2 * channels)]
    parameters = torch.tensor(initial, device=device, requires_grad=True)
    best = (math.inf, parameters.detach().clone())
    scale = 1.0

    def unpack(parameters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        exponent, logit, logs, mean = parameters.split([1, 1, channels, channels])
        return (
            exponent.clamp(*LIMITS["exponent"]),
            logit.clamp(*LIMITS["logit"]).sigmoid(),
            logs.clamp(*LIMITS["log"]).exp(),
            mean,
        )

    with BatchNormInputs(module) as inputs:

        def distance(noise: Tensor) -> Tensor:
            noise = noise if pixel_range is None else pixel_range.clamp(noise)
            # A clone, because a teacher may modify its input in place.
            module(noise.contiguous(memory_format=torch.channels_last).clone())
            return bns_loss(inputs.take(), targets, form)

        def closure() -> Tensor:
            nonlocal best, scale
            with torch.enable_grad():
                loss = distance(_transform(white, *unpack(parameters)))
                (parameters.grad,) = torch.autograd.grad(loss / scale, parameters)
            value = loss.item()
            if best[0] == math.inf and math.isfinite(value) and value > 0:
                parameters.grad /= value
                scale = value  # makes the search independent of the form of the loss and the number of layers
            if value < best[0]:
                best = value, parameters.detach().clone()
            return loss.detach() / scale

        optimizer = torch.optim.LBFGS(
            [parameters], max_iter=MAX_STEPS, tolerance_change=TOLERANCE, line_search_fn="strong_wolfe"
        )
        optimizer.step(closure)
        with torch.no_grad():
            white_distance = distance(white).item()
    if not best[0] < white_distance:
        return WHITE
    (exponent,), (correlation,), contrast, mean = (
        [round(value, DECIMALS) for value in part.tolist()] for part in unpack(best[1])
    )
    return StartNoise(
        exponent=exponent,
        correlation=correlation if channels > 1 else 0.0,
        contrast=tuple(contrast),
        mean=tuple(mean),
    )
