"""Students for an engine: symmetric weights, clamped tensors, and every step from ranges to fine-tuning."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.engine_nets import NETS, SIZE, DenseNet, Shuffled, points_of, student_for, traced
from support.student_tools import Residual
from synq.config.run import FinetuneConfig, QuantConfig, ReconstructionConfig, RunConfig
from synq.network.tracing import with_features
from synq.quant.fusion import fuse_rectified
from synq.quant.integer_form import codes_of, integer_form
from synq.quant.layers import ActQuantizer, QuantConv2d, QuantLinear, WeightQuantizer, step_parameters, weight_limit
from synq.quant.prepare import prepare_student
from synq.quant.student import observe_ranges, quantize_model, share_changed, weight_codes

LAYERS = (QuantConv2d, QuantLinear)


def noise(count: int = 8) -> Tensor:
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("weight_range", ["minmax", "mse"])
@pytest.mark.parametrize("options", [{}, {"rounding": "adaround"}, {"learned_steps": "all"}])
@pytest.mark.parametrize(("bits", "portable"), [(8, False), (8, True), (7, True), (4, False), (2, True)])
def test_weights_are_symmetric_and_in_bounds(
    bits: int, portable: bool, options: dict[str, Any], weight_range: str
) -> None:
    ends = {"first_bits": bits, "last_bits": bits}
    quant = QuantConfig(target="openvino", weight_bits=bits, portable=portable, **ends, **options)
    net = quantize_model(traced(Shuffled(), SIZE), quant).net
    observe_ranges(net, noise(), act_range="mse", weight_range=weight_range)  # type: ignore[arg-type]
    for name, layer in net.named_modules():
        if not isinstance(layer, LAYERS):
            continue
        codes = codes_of(layer)
        largest = 2 ** (bits - 1) - 1
        limit = min(largest, 64) if portable and name != "depth" else largest
        assert not codes.zero_point.any()
        assert torch.equal(codes.codes, weight_codes(net)[name])
        reached = codes.codes.abs().flatten(1).amax(1)
        assert int(reached.max()) == limit
        values = codes.codes * codes.scale.reshape(-1, *[1] * (codes.codes.ndim - 1))
        assert torch.equal(values, layer.weight_quantizer(layer.weight).detach())
        if weight_range == "minmax":
            assert bool((reached == limit).all())
            assert torch.allclose(codes.scale * limit, layer.weight.abs().flatten(1).amax(1))


def test_the_grid_of_a_negated_weight_is_the_negated_grid() -> None:
    weight = torch.randn(6, 3, 3, 3)
    quantizer = WeightQuantizer(6, 4, limit=weight_limit(4, portable=False))
    assert torch.equal(quantizer.codes(-weight), -quantizer.codes(weight))
    assert torch.equal(quantizer.qparams(-weight)[0], quantizer.qparams(weight)[0])


def test_the_mean_error_of_a_clipped_weight_is_not_above_that_of_the_full_range() -> None:
    weight = torch.randn(16, 64) ** 3
    errors = {}
    for rule in ("minmax", "mse"):
        net = quantize_model(traced(DenseNet(), SIZE), QuantConfig(target="onnxruntime", weight_bits=3)).net
        layer = net.get_submodule("conv3")
        layer.weight.data = weight[:8, :5].reshape(8, 5, 1, 1).clone()
        observe_ranges(net, noise(), act_range="minmax", weight_range=rule)  # type: ignore[arg-type]
        difference = layer.weight_quantizer(layer.weight) - layer.weight
        errors[rule] = float(difference.detach().abs().pow(2.4).sum())
    assert errors["mse"] < errors["minmax"]


@pytest.mark.parametrize("learned", [False, True])
def test_a_tensor_that_is_not_rounded_is_clamped_with_the_gradients_of_its_bounds(learned: bool) -> None:
    quantizer = ActQuantizer(4, learned, rounded=False)
    quantizer.set_range(-1.0, 2.0)  # scale 0.2, zero_point 5
    x = torch.tensor([-3.0, -0.99, -0.33, 0.0, 1.23, 5.0], requires_grad=True)
    y = quantizer(x)
    assert y.tolist() == pytest.approx([-1.0, -0.99, -0.33, 0.0, 1.23, 2.0])
    y.sum().backward()
    assert x.grad is not None and x.grad[[0, 5]].tolist() == [0, 0] and x.grad[[2, 3, 4]].tolist() == [1, 1, 1]
    if learned:
        assert quantizer.scale.grad is not None
        # Below the range quant_min - zero_point, above it quant_max - zero_point.
        assert float(quantizer.scale.grad) == pytest.approx((10 - 5) / 15**0.5)
    half = quantizer(x.detach().to(torch.bfloat16)).detach()
    assert half.dtype == torch.bfloat16 and float(half.max()) == 2.0


def test_the_scale_gradient_of_a_clamped_tensor_is_that_of_lsq_outside_the_range() -> None:
    clamped, rounded = ActQuantizer(4, True, rounded=False), ActQuantizer(4, True)
    x = torch.tensor([-3.0, 7.0, 9.0, -2.0])
    for quantizer in (clamped, rounded):
        quantizer.set_range(-1.0, 2.0)
        quantizer(x).square().sum().backward()
    assert clamped.scale.grad is not None
    assert torch.allclose(clamped.scale.grad, rounded.scale.grad)


def test_a_clamped_tensor_has_its_whole_range_whatever_the_rule() -> None:
    nets = [quantize_model(traced(Residual(), SIZE), QuantConfig(target="openvino")).net for _ in range(2)]
    for net, rule in zip(nets, ("minmax", "mse"), strict=True):
        observe_ranges(net, noise(64), act_range=rule)  # type: ignore[arg-type]
    full, clipped = map(points_of, nets)
    scales = {name: (float(full[name].scale), float(clipped[name].scale)) for name in full}
    assert scales["bn3"][0] == scales["bn3"][1] and not full["bn3"].rounded
    assert any(high > low for high, low in scales.values())


@pytest.mark.parametrize("learned", ["none", "activations", "all"])
@pytest.mark.parametrize("target", ["openvino", "litert"])
@pytest.mark.parametrize("name", NETS)
def test_a_step_of_training_reaches_every_parameter(name: str, target: str, learned: str) -> None:
    student = student_for(NETS[name][0](), target, weight_bits=4, act_bits=4, learned_steps=learned)
    net = with_features(student.net, student.cam_node or next(iter(student.taps.values())))
    fuse_rectified(net)
    for parameter in net.parameters():
        parameter.requires_grad_()
    before = weight_codes(student.net)
    logits, _ = net(noise())
    logits.square().sum().backward()
    steps = step_parameters(net)
    assert bool(steps) == (learned != "none")
    for step in steps:
        assert step.grad is not None and bool(step.grad.isfinite().all())
    for part_name, part in net.named_modules():
        if isinstance(part, LAYERS):
            assert part.weight.grad is not None and bool(part.weight.grad.any()), part_name
            part.weight.data -= 0.3 * part.weight.abs().mean() * part.weight.grad.sign()
    assert share_changed(before, weight_codes(student.net)) > 0
    assert bool(student.net(noise()).isfinite().all())


def test_fused_pairs_compute_the_same() -> None:
    student = student_for(DenseNet(), "openvino", act_bits=4)
    joined = with_features(student.net, "pool")
    assert fuse_rectified(joined) == 2
    with torch.no_grad():
        assert torch.equal(joined(noise())[0], student.net(noise()))


def test_a_learned_step_leaves_a_clamp_at_six_between_codes() -> None:
    """The largest code that a ReLU6 gives is that of 6, whatever the step has become."""
    student = student_for(Shuffled(), "litert", learned_steps="activations")
    quantizer = points_of(student.net)["relu6"]
    for scale in (6 / 255, 0.0311, 0.05, 0.02):
        quantizer.scale.data.fill_(scale)
        y = quantizer(torch.linspace(-1, 9, 1000).clamp(0, 6))
        assert float(y.detach().max()) == pytest.approx(min(round(6 / scale), 255) * scale)
        assert int(quantizer.zero_point) == 0


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "executorch"])
@pytest.mark.parametrize("name", NETS)
def test_the_integer_form_is_the_student(name: str, target: str) -> None:
    net = student_for(NETS[name][0](), target, portable=target != "executorch").net
    form = integer_form(net)
    with torch.no_grad():
        expected, found = net(noise()), form(noise())
    assert float((found - expected).abs().mean()) < 0.02 * float(expected.abs().mean())
    assert torch.equal(found.argmax(1), expected.argmax(1))


@pytest.mark.parametrize(
    "options",
    [
        {"rounding": "adaround"},
        {"rounding": "adaround", "learned_steps": "activations", "weight_range": "mse"},
        {"equalization": True, "bn_correction": True},
        {"equalization": True, "rounding": "adaround", "learned_steps": "all", "bn_correction": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("target", ["openvino", "litert"])
def test_every_step_before_fine_tuning_runs(target: str, options: dict[str, Any]) -> None:
    teacher = traced(Residual(), SIZE)
    quant = QuantConfig(target=target, weight_bits=3, act_bits=8, **options)  # type: ignore[arg-type]
    config = RunConfig(quant=quant, reconstruction=ReconstructionConfig(iterations=30, images=16, batch_size=8))
    net = quantize_model(teacher, quant).net
    _, report = prepare_student(net, teacher, noise(16), config, torch.device("cpu"))
    codes = weight_codes(net)
    for name, layer in net.named_modules():
        if isinstance(layer, LAYERS):
            assert int(codes[name].abs().max()) <= layer.weight_quantizer.quant_max
            assert not layer.weight_quantizer.qparams(layer.weight)[1].any()
    if "rounding" in options:
        assert any(block["kept"] for block in report["reconstruction"])
    if "equalization" in options:
        assert report["equalization"]["pairs"]
    with torch.no_grad():
        error = float((net(noise()) - teacher(noise())).norm() / teacher(noise()).norm())
    assert error < 0.7


def test_a_stored_student_is_loaded_with_its_grids() -> None:
    quant = {"learned_steps": "all", "portable": True, "weight_bits": 4}
    student = student_for(Residual(), "openvino", **quant)
    again = quantize_model(traced(Residual(), SIZE), QuantConfig(target="openvino", act_bits=8, **quant)).net  # type: ignore[arg-type]
    again.load_state_dict(student.net.state_dict())
    with torch.no_grad():
        assert torch.equal(again(noise()), student.net(noise()))


def test_research_students_are_as_before() -> None:
    student = quantize_model(traced(Residual(), SIZE), QuantConfig())
    assert list(points_of(student.net)) == ["relu", "relu_1", "relu_2"]
    layers = [module for module in student.net.modules() if isinstance(module, LAYERS)]
    assert all(layer.weight_quantizer.limit is None and layer.weight_quantizer.quant_min == -8 for layer in layers)


def test_a_short_fine_tuning_lowers_the_error() -> None:
    """Plain gradient descent on the logits: what the engine computes can be trained."""
    teacher = traced(Residual(), SIZE)
    student = student_for(Residual(), "openvino", weight_bits=3, act_bits=4, learned_steps="all")
    images, parameters = noise(32), list(student.net.parameters())
    for parameter in parameters:
        parameter.requires_grad_()
    optimizer = torch.optim.Adam(parameters, lr=FinetuneConfig().lr / 10)
    with torch.no_grad():
        wanted = teacher(images)
    errors = []
    for _ in range(30):
        loss = nn.functional.mse_loss(student.net(images), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(float(loss.detach()))
    assert errors[-1] < 0.7 * errors[0]
