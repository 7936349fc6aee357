"""Corrected statistics: what was planted is taken out, layer by layer in one pass, and nothing is kept that does
not help.
"""

import copy
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from support.small_nets import NETS, SIZE, images, rounded, trained
from synq.network.logits import logits_of
from synq.network.op_traits import node_module
from synq.network.tracing import trace_classifier
from synq.quant.bn_correction import LARGEST_RATIO, correct_layers, correct_statistics, correctable
from synq.quant.keep_best import mean_kl
from synq.quant.student import observe_ranges

Moments = tuple[Tensor, Tensor]


def moments(net: fx.GraphModule, x: Tensor, name: str) -> Moments:
    """Mean and variance per channel of a batch norm's input, or of another layer's output, by a hook and a whole
    pass.
    """
    node = next(node for node in net.graph.nodes if node.name == name)
    module = node_module(net, node)
    assert module is not None
    seen: list[Tensor] = []
    is_norm = isinstance(module, _BatchNorm)
    hook = module.register_forward_hook(lambda _, args, out: seen.append(args[0] if is_norm else out))
    with torch.no_grad():
        net(x)
    hook.remove()
    (value,) = seen
    dims = [0, *range(2, value.dim())]
    return value.mean(dims), value.var(dims, correction=0)


def targets(net: fx.GraphModule, x: Tensor, names: set[str]) -> dict[str, Moments]:
    return {name: moments(net, x, name) for name in names}


def correct_slowly(net: fx.GraphModule, wanted: dict[str, Moments], x: Tensor, with_deviation: bool) -> None:
    """The formulas, with a whole forward pass for every layer."""
    for node in net.graph.nodes:
        if node.name not in wanted:
            continue
        module, (mean_t, variance_t) = node_module(net, node), wanted[node.name]
        mean_s, variance_s = moments(net, x, node.name)
        with torch.no_grad():
            if isinstance(module, _BatchNorm):
                root = (module.running_var + module.eps).sqrt()
                ratio = (variance_t / variance_s).sqrt().clamp(0.5, 2) if with_deviation else torch.ones_like(mean_t)
                old, new = module.weight.clone(), module.weight * ratio
                module.bias += old * (mean_t - module.running_mean) / root - new * (mean_s - module.running_mean) / root
                module.weight.copy_(new)
            else:
                module.bias += mean_t - mean_s


@pytest.mark.parametrize(
    ("name", "norms", "biased"),
    [
        ("residual", {"bn1", "bn2", "bn3"}, {"fc"}),
        ("dense", {"bn1", "bn2"}, {"conv2", "conv3", "fc"}),
        ("plain", set(), {"_0", "_7", "_10"}),
        ("depthwise", {"_1", "_4", "_7", "_9"}, {"_13"}),
        ("pooled", {"_1", "_6"}, {"_10"}),
    ],
)
def test_every_batch_norm_and_every_bias_without_one(name: str, norms: set[str], biased: set[str]) -> None:
    assert correctable(rounded(trained(NETS[name][0]())).net) == (norms, biased)


def test_shared_and_incomplete_layers_are_left_alone() -> None:
    norm = nn.BatchNorm2d(8)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.ReLU(), nn.Conv2d(8, 8, 1), norm, nn.ReLU())
    net.extend([nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 5, 1)])
    net.extend([nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5)])
    net[14].bias = net[12].bias
    assert correctable(trained(net)) == ({"_9"}, set())


@pytest.mark.parametrize("with_deviation", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_one_pass_equals_a_pass_for_every_layer(name: str, with_deviation: bool) -> None:
    traced = trained(NETS[name][0]())
    x = images(30)
    fast, slow = (rounded(traced, 3, images(32, seed=2)).net for _ in range(2))
    wanted = targets(traced, x, set.union(*correctable(fast)))
    start = {key: value.clone() for key, value in fast.state_dict().items()}
    correct_layers(fast, wanted, x.split(8), with_deviation=with_deviation)
    correct_slowly(slow, wanted, x, with_deviation)
    changed = set()
    for key, value in fast.state_dict().items():
        torch.testing.assert_close(value, slow.state_dict()[key], rtol=1e-9, atol=1e-10)
        changed |= set() if torch.equal(value, start[key]) else {key.rpartition(".")[2]}
    assert changed == ({"weight", "bias"} if with_deviation and name != "plain" else {"bias"}), "nothing else moves"


def planted(traced: fx.GraphModule) -> fx.GraphModule:
    """A copy whose convolutions put out every channel scaled and shifted."""
    net, generator = copy.deepcopy(traced), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                factor = 0.7 + torch.rand(module.out_channels, generator=generator, dtype=torch.float64)
                module.weight.mul_(factor.view(-1, 1, 1, 1))
                if module.bias is not None:
                    module.bias.add_(torch.randn(module.out_channels, generator=generator))
    return net


@pytest.mark.parametrize("name", ["residual", "depthwise", "pooled"])
def test_planted_scales_and_shifts_are_taken_out(name: str) -> None:
    traced = trained(NETS[name][0]())
    net, x = planted(traced), images(32)
    before, wanted = net(x), traced(x)
    goals = targets(traced, x, set.union(*correctable(net)))
    correct_layers(net, goals, x.split(10), with_deviation=True)
    # The classifier's own bias comes last and finds nothing to do.
    torch.testing.assert_close(net(images(8, seed=6)), traced(images(8, seed=6)), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(before, wanted, rtol=0.05)


def test_planted_shifts_of_biases_are_taken_out() -> None:
    traced = trained(NETS["plain"][0]())
    net, x = copy.deepcopy(traced), images(32)
    with torch.no_grad():
        for name in ("0", "7", "10"):
            net.get_submodule(name).bias.add_(torch.linspace(-1, 1, len(net.get_submodule(name).bias)))
    assert not torch.allclose(net(x), traced(x), rtol=0.05)
    correct_layers(net, targets(traced, x, correctable(net)[1]), x.split(10), with_deviation=False)
    torch.testing.assert_close(net(images(8, seed=6)), traced(images(8, seed=6)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("with_deviation", [False, True])
def test_outputs_get_the_teachers_statistics(with_deviation: bool) -> None:
    """The mean always; the deviation where it is asked for; of a rounded student, on the images of the statistics."""
    traced, x = trained(NETS["residual"][0]()), images(32)
    student = rounded(traced, 4, x)
    means = [{n: moments(net, x, n)[0] for n in ("bn1", "bn2", "bn3")} for net in (traced, student.net)]
    assert max(float((means[0][n] - means[1][n]).abs().max()) for n in means[0]) > 1e-3
    correct_layers(
        student.net, targets(traced, x, set.union(*correctable(traced))), x.split(8), with_deviation=with_deviation
    )
    deviations = []
    for name in ("bn1", "bn2", "bn3"):
        outputs = []
        for net in (traced, student.net):
            seen: list[Tensor] = []
            hook = net.get_submodule(name).register_forward_hook(lambda _, args, out, seen=seen: seen.append(out))
            with torch.no_grad():
                net(x)
            hook.remove()
            outputs.append(seen[0])
        teacher, found = outputs
        torch.testing.assert_close(found.mean((0, 2, 3)), teacher.mean((0, 2, 3)), rtol=1e-9, atol=1e-9)
        deviations.append(float((found.std((0, 2, 3)) / teacher.std((0, 2, 3)) - 1).abs().max()))
    assert max(deviations) < 1e-9 if with_deviation else max(deviations) > 1e-3


def test_example_of_the_docstring_and_bounds() -> None:
    """m = 0, v = 1, g = 1, b = 0: teacher (1, 2), student (3, 4); a ratio beyond the bounds; channels dead in one
    of the two.
    """
    net = nn.Sequential(nn.BatchNorm2d(4, eps=1e-300), nn.Flatten(), nn.Linear(4, 2, bias=False)).double().eval()
    traced = trace_classifier(net.requires_grad_(False), (4, 1, 1))
    x = torch.tensor([[7.0, 101.0, 5.0, 1.0], [-1.0, -99.0, 5.0, -1.0]], dtype=torch.float64).view(2, 4, 1, 1)
    goal = (torch.tensor([1.0, 1.0, 2.0, 3.0]).double(), torch.tensor([4.0, 1.0, 9.0, 0.0]).double())
    correct_layers(traced, {"_0": goal}, [x], with_deviation=True)
    norm = traced.get_submodule("0")
    assert norm.weight.tolist() == [0.5, 1 / LARGEST_RATIO, 1.0, 1.0]
    assert norm.bias.tolist() == [-0.5, 0.5, -3.0, 3.0]
    assert torch.equal(norm.running_mean, torch.zeros(4).double()) and norm.running_var.eq(1).all()


def test_each_layer_runs_once_for_each_batch_and_values_are_dropped() -> None:
    traced, x = trained(NETS["plain"][0]()), images(32)
    net = rounded(traced, 4, x).net
    calls: list[int] = []
    alive: list[int] = []
    tensors: list[object] = []

    def look(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        calls.append(1)
        tensors.append(weakref.ref(out))
        alive.append(sum(ref() is not None for ref in tensors))  # type: ignore[operator]

    layers = [net.get_submodule(str(n.target)) for n in net.graph.nodes if n.op == "call_module"]
    for layer in layers:
        layer.register_forward_hook(look)
    goals = targets(traced, x, correctable(net)[1])
    correct_layers(net, goals, x.split(8), with_deviation=True)
    assert len(calls) == len(layers) * 4
    assert max(alive) <= 3 * 4, "a chain of layers needs its last values alone"


def test_correction_is_kept_where_it_helps_and_the_teacher_is_untouched() -> None:
    traced = trained(NETS["depthwise"][0]())
    before = {key: value.clone() for key, value in traced.state_dict().items()}
    student, alone = (rounded(traced, 3, images(64)) for _ in range(2))
    report = correct_statistics(student.net, traced, images(64), batch_size=10)
    assert all(torch.equal(value, before[key]) for key, value in traced.state_dict().items())
    assert report["kept"] != "none" and report["batch_norms"] == 4 and report["biases"] == 1
    assert report["kl"][report["kept"]] == min(report["kl"].values()) < 0.7 * report["kl"]["none"]
    fresh = images(64, seed=9)  # neither measured nor judged on
    wanted = logits_of(traced, fresh)
    assert mean_kl(wanted, student.net, fresh) < 0.8 * mean_kl(wanted, alone.net, fresh)
    again = rounded(traced, 3, images(64))
    assert correct_statistics(again.net, traced, images(64), batch_size=10) == report
    assert all(torch.equal(value, student.net.state_dict()[key]) for key, value in again.net.state_dict().items())


def test_keep_best_keeps_a_student_that_correction_would_harm() -> None:
    """The images of the statistics overflow the ranges, those that judge do not."""
    traced = trained(NETS["pooled"][0]())
    x = images(32)
    student = rounded(traced, 8, x)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    x[order[:16]] *= 50
    before = {key: value.clone() for key, value in student.net.state_dict().items()}
    report = correct_statistics(student.net, traced, x)
    assert report["kept"] == "none" and min(report["kl"]["mean"], report["kl"]["mean and deviation"]) > 10 * max(
        report["kl"]["none"], 1e-6
    )
    assert all(torch.equal(value, before[key]) for key, value in student.net.state_dict().items())


def test_processes_follow_the_synchronized_metrics() -> None:
    traced = trained(NETS["depthwise"][0]())
    student = rounded(traced, 3, images(64))
    told: Callable[[dict[str, float]], dict[str, float]] = lambda own: {**own, "none": -1.0}  # noqa: E731
    report = correct_statistics(student.net, traced, images(64), synchronize=told)
    alone = rounded(traced, 3, images(64)).net.state_dict()
    assert report["kept"] == "none" and report["kl"]["none"] == -1.0
    assert all(torch.equal(value, alone[key]) for key, value in student.net.state_dict().items())


def test_one_image_or_nothing_to_correct_is_no_correction() -> None:
    traced = trained(NETS["residual"][0]())
    student = rounded(traced, 3, images(4))
    assert correct_statistics(student.net, traced, images(1))["kept"] == "none"
    net = nn.Sequential(nn.Conv2d(3, 5, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    bare = trained(net)
    report = correct_statistics(rounded(bare, 3, images(4)).net, bare, images(4))
    assert report == {"kept": "none", "kl": {}, "batch_norms": 0, "biases": 0}


def test_float32_images_of_another_layout() -> None:
    traced = trace_classifier(trained(NETS["residual"][0]()).float().to(memory_format=torch.channels_last), SIZE)
    x = images(64).float()
    student = rounded(traced, 3)
    observe_ranges(student.net, x, act_range="mse")
    report = correct_statistics(student.net, traced, x)
    assert all(value < float("inf") for value in report["kl"].values()) and len(report["kl"]) == 3
