"""Teacher and student see one image, and it is one that can exist: in synthesis, calibration, training, measuring."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from synq.config.run import RunConfig, SynthesisConfig, with_overrides
from synq.config.synthesis import SYNTHESIS_METHODS
from synq.finetune.networks import prepare_networks
from synq.network.bn_stats import bn_targets
from synq.pipeline import check, prepare, run
from synq.quant.layers import ActQuantizer
from synq.quant.student import observe_ranges
from synq.synthesis.inversion import invert
from synq.synthesis.run_sets import low_pass
from synq.synthesis.start_noise import fit_start
from synq.synthesis.store import SetStore
from synq.teacher.pixel_range import PixelRange
from tests.support.student_tools import make, trained

SIZE = (3, 16, 16)
PIXELS = PixelRange(torch.tensor([-1.0, -0.5, -2.0]).view(1, 3, 1, 1), torch.tensor([1.0, 1.5, 0.5]).view(1, 3, 1, 1))


def is_inside(images: Tensor, pixels: PixelRange) -> bool:
    return bool((images >= pixels.low).all() and (images <= pixels.high).all())


class Plain(nn.Module):
    """A classifier with something between the image and its first convolution."""

    def __init__(self, before: Callable[[Tensor], Tensor] = lambda x: x, channels: int = 3) -> None:
        super().__init__()
        self.before = before
        self.conv, self.norm = nn.Conv2d(channels, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.norm(self.conv(self.before(x)))).mean((2, 3)))


def inception_input(x: Tensor) -> Tensor:
    """As torchvision's Inception and GoogLeNet normalize their input again."""
    channels = [x[:, i].unsqueeze(1) * (0.2 + 0.1 * i) + 0.3 for i in range(3)]
    return torch.cat(channels, 1)


@pytest.mark.parametrize(
    ("before", "channels"),
    [
        (lambda x: x, 3),
        (lambda x: x.contiguous(), 3),
        (lambda x: x.float(), 3),
        (lambda x: x.clone(), 3),
        (lambda x: x.to(torch.float32), 3),  # its node is called "to", as a method of nn.Module is
        (nn.ZeroPad2d((0, 1, 0, 1)), 3),
        (lambda x: F.pad(x, (0, 1, 0, 1)), 3),
        (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), 3),
        (nn.Identity(), 3),
        (lambda x: x.flip(3), 3),
        (lambda x: x[:, :, 1:], 3),
        (lambda x: x.permute(0, 1, 3, 2), 3),
        (lambda x: torch.cat([x, x], 1), 6),
        (lambda x: x[:, :1], 1),
        (lambda x: F.max_pool2d(x, 2), 3),
        (nn.PixelUnshuffle(2), 12),
    ],
    ids=[
        *("nothing", "contiguous", "float", "clone", "to", "ZeroPad2d", "pad", "reflect", "Identity", "flip", "slice"),
        *("transpose", "twice", "one channel", "max_pool", "PixelUnshuffle"),
    ],
)
@pytest.mark.parametrize("rule", ["minmax", "mse"])
def test_bugs_2_the_range_of_pixels_is_kept_through_whatever_moves_them(
    before: Callable[[Tensor], Tensor], channels: int, rule: str
) -> None:
    student = make("inputs", bits=4, net=Plain(before, channels))
    images = 3 * torch.randn(64, *SIZE, generator=torch.Generator().manual_seed(0))
    observe_ranges(student.net, images, act_range=rule, image_range=PIXELS)  # type: ignore[arg-type]
    first = next(module for module in student.net.modules() if isinstance(module, ActQuantizer))
    low = float(first.scale) * (first.quant_min - int(first.zero_point))  # type: ignore[arg-type]
    high = float(first.scale) * (first.quant_max - int(first.zero_point))  # type: ignore[arg-type]
    step = float(first.scale)  # type: ignore[arg-type]
    assert low >= -2.0 - step / 2 and high <= 1.5 + step / 2
    values = first(before(PIXELS.clamp(images))).unique()
    assert len(values) >= 14, "nearly all codes are of values that a pixel can take"


def test_bugs_2_an_affine_change_of_the_pixels_keeps_their_range() -> None:
    student = make("inputs", bits=4, net=Plain(inception_input))
    images = 3 * torch.randn(64, *SIZE, generator=torch.Generator().manual_seed(0))
    observe_ranges(student.net, images, act_range="minmax", image_range=PIXELS)
    first = next(module for module in student.net.modules() if isinstance(module, ActQuantizer))
    possible = inception_input(torch.cat([PIXELS.low, PIXELS.high]).expand(2, 3, 16, 16))
    expected = float(possible.max().clamp(min=0) - possible.min().clamp(max=0)) / 15
    assert float(first.scale) == pytest.approx(expected, rel=1e-3)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", SYNTHESIS_METHODS)
@pytest.mark.parametrize("start", ["white", "fitted"])
def test_bugs_1_no_step_of_the_synthesis_sees_a_pixel_that_no_image_has(method: str, start: str) -> None:
    net = trained(Plain())
    net.conv.weight.mul_(0.05)  # statistics that ask for pixels far outside
    seen: list[Tensor] = []
    net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    settings = SynthesisConfig(method=method, iterations=6, lr=0.5, latent_dim=8, start=start)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    targets = bn_targets(net)
    noise = {}
    if start == "fitted":
        noise["start"] = fit_start(
            net, SIZE, targets, "std_sum", generator=generator, pixel_range=PIXELS, device=torch.device("cpu")
        )
        assert all(is_inside(images, PIXELS) for images in seen[:-1]), (
            "all but the white noise that it is compared with"
        )
        seen.clear()
    labels = torch.arange(12) % 5
    made = invert(net, labels, SIZE, targets, config=settings, generator=generator, pixel_range=PIXELS, **noise)
    assert len(seen) == (1 if method == "gaussian" else 7)
    assert all(is_inside(images, PIXELS) for images in seen) and is_inside(made.images, PIXELS)
    free = invert(net, labels, SIZE, targets, config=settings, generator=torch.Generator().manual_seed(0), **noise)
    assert not is_inside(free.images, PIXELS), "the case needs a bound that binds"


def test_bugs_1_a_projected_pixel_returns() -> None:
    """A pixel at the bound still has a gradient: under a clamp in front of the network it would have none."""
    pixels = PixelRange(torch.full((1, 1, 1, 1), -1.0), torch.full((1, 1, 1, 1), 1.0))
    net = nn.Sequential(nn.BatchNorm2d(1, affine=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2)).eval()
    net[0].running_var.fill_(0.01)
    settings = SynthesisConfig(iterations=60, lr=0.1, start="white", inception_weight=0.0)
    labels, generator = torch.zeros(8, dtype=torch.int64), torch.Generator().manual_seed(0)
    targets = bn_targets(net)
    made = invert(net, labels, (1, 8, 8), targets, config=settings, generator=generator, pixel_range=pixels)
    start = torch.randn((8, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    outside = start.abs() > 1
    assert outside.any() and (made.images[outside].abs() < 0.99).all()


@pytest.mark.parametrize("method", ["inversion", "gdfq", "gaussian"])
def test_bugs_1_every_image_of_a_run_can_exist(config: RunConfig, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored, filtered, augmented, perturbed, held out: whatever teacher or student reads."""
    settings = {"synthesis.method": method, "synthesis.lr": 0.5, "synthesis.latent_dim": 8}
    settings |= {"finetune.lowpass_cutoff": 0.4, "finetune.augment": "mixup", "finetune.perturb_weight": 1.0}
    config = with_overrides(config, {**settings, "finetune.perturb_size": 0.5, "quant.act_points": "inputs"})
    teacher, _ = check(config)
    pixels, seen = teacher.pixel_range(), []

    def watched(*args: object, **kwargs: object) -> object:
        networks = prepare_networks(*args, **kwargs)  # type: ignore[arg-type]
        for network in networks[:2]:
            network.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
        return networks

    monkeypatch.setattr("synq.pipeline.prepare_networks", watched)
    run(config)
    assert len(seen) > 4 and all(is_inside(images, pixels) for images in seen)
    for images in (part.images for part in prepare(config)):
        assert is_inside(images, pixels)
        filtered = low_pass(images, config, pixel_range=pixels)
        assert is_inside(filtered, pixels)


def test_bugs_1_at_8_bits_the_objective_of_inputs_is_that_of_relu(config: RunConfig) -> None:
    """On the bundled classifier it was 2,000 times that of `relu`, while every image of the test set was the same."""
    settings = {"quant.weight_bits": 8, "quant.act_bits": 8, "finetune.epochs": 0, "synthesis.lr": 0.3}
    config = with_overrides(config, {**settings, "synthesis.iterations": 10})
    values = {}
    for points in ("relu", "inputs"):
        values[points] = run(with_overrides(config, {"quant.act_points": points})).objective_value
    assert values["inputs"] is not None and values["relu"] is not None
    assert values["inputs"] <= 10 * values["relu"]


def test_the_name_of_a_set_covers_the_range_of_pixels() -> None:
    """The same weights may be given with another mean and standard deviation, and then need other images."""
    store, config = SetStore("/nowhere"), SynthesisConfig()
    names = {
        store.key("7e" * 32, config, 0, input_size=SIZE, pixel_range=pixels)
        for pixels in (None, PIXELS, PIXELS._replace(high=PIXELS.high + 0.1))
    }
    assert len(names) == 3


def test_clamping_keeps_the_kind_of_the_images() -> None:
    images = 3 * torch.randn(4, *SIZE, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    clamped = PIXELS.clamp(images)
    assert clamped.dtype is torch.float64 and is_inside(clamped, PIXELS) and not is_inside(images, PIXELS)
    assert torch.equal(PIXELS.clamp_(images), clamped) and torch.equal(images, clamped)
    assert PIXELS.tolist()[0] == [-1.0, -0.5, -2.0]
