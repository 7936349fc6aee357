"""What must hold for every classifier: the product computes what PyTorch computes, or says truly why it will not.

Each check compares two ways to one result, of which one is PyTorch's own run of the module or an earlier stage.
"""

import copy
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from fuzz.networks import Network
from fuzz.networks_rejections import DifferenceError, checked_rejection
from fuzz.networks_targets import engine_student, faults_of
from synq.config.quant import QuantConfig
from synq.config.run import TeacherConfig
from synq.network.blocks import block_ends, segment
from synq.network.gradcam import autograd_weights, closed_form_weights
from synq.network.tracing import with_features
from synq.quant.equalization import channel_ranges, channel_scales, find_pairs, scale_pair, weight_ranges
from synq.quant.integer_form import integer_form
from synq.quant.integer_layers import IntegerActivation
from synq.quant.layers import ActQuantizer, effective_weight, quantizers_bypassed
from synq.quant.student import Student, build_student, observe_ranges
from synq.teacher.teacher import Teacher, load_teacher

BITS = ((8, 8), (4, 4), (4, 8), (3, 3), (2, 2), (8, 4), (6, 5), (2, 8))
COUNT = 5
"""Images of a comparison."""
CLOSE = 1e-4
"""Largest difference of values that may be summed in another order, relative to the largest of them."""
STEPS = ("% 2.0", ".sign()", ".round()", "floor(")
"""Functions of floats with a step, across which rounding moves a value."""
LAYOUT = 2.5e-7
"""Largest such difference if a value written anew has another memory layout in the traced network than in the module:
the values are the same, but PyTorch adds them in another order."""
NOISE = 1e-5
"""Size of sums of values around 1 that cancel: a mean over maps that were normalized each is nothing but rounding."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a network.

    Attributes:
        rejected: Reason of its rejection, "" if it was accepted.
        exports: Number of files.
        is_identical: Whether the traced network's logits have the bits of the module's.
    """

    rejected: str = ""
    exports: int = 0
    is_identical: bool = True


def check_network(network: Network, *, exports: bool = False) -> Outcome:
    """Run every check on a network.

    Args:
        network: A random network.
        exports: Whether to export it to every format too, which takes seconds.

    Raises:
        DifferenceError: If one fails. Any other error but this one is a fault as well.
    """
    module, rng = network.build().requires_grad_(False), random.Random(f"check {network.seed}")
    images = torch.randn(COUNT, *network.size, generator=torch.Generator().manual_seed(network.seed))
    with torch.no_grad():
        expected = module(images.clone())
    try:
        teacher = load(network)
    except ValueError as error:
        return Outcome(rejected=checked_rejection(network, module, error))
    logits, expected = expected, check_float(network, teacher, module, images, expected)
    is_identical = torch.equal(expected, logits) or "log_softmax" in network.source
    check_cam(teacher)
    points: Literal["relu", "inputs"] = rng.choice(("relu", "inputs"))
    weight_bits, act_bits = rng.choice(BITS)
    where, steps = f"W{weight_bits}A{act_bits} {points}", rng.choice(("none", "none", "all"))
    quant = QuantConfig(weight_bits=weight_bits, act_bits=act_bits, act_points=points, learned_steps=steps)
    try:
        student = build_student(teacher, quant)
    except ValueError as error:
        return Outcome(rejected=checked_rejection(network, module, error))
    with quantizers_bypassed(student.net), torch.no_grad():
        equal(student.net(images.clone()), expected, f"{where}: student with its quantizers bypassed, module")
    observed = torch.randn(32, *network.size, generator=torch.Generator().manual_seed(network.seed + 1))
    act_range = rng.choice(("minmax",) * 5 + ("mse",))
    observe_ranges(student.net, observed, act_range=act_range, image_range=teacher.pixel_range())
    if not any(step in network.source for step in STEPS):
        check_integer_form(student, images, where)
    check_gradients(student, images, where)
    check_engine(network, teacher, images, observed, expected)
    check_blocks(teacher, images)
    check_equalization(network, teacher, images)
    if not exports:
        return Outcome(is_identical=is_identical)
    from fuzz.networks_exports import check_exports

    try:
        return Outcome(exports=check_exports(teacher, student, observed, where, rng), is_identical=is_identical)
    except ValueError as error:
        return Outcome(rejected=checked_rejection(network, module, error))


def check_engine(network: Network, teacher: Teacher, images: Tensor, observed: Tensor, expected: Tensor) -> None:
    """A student for an engine has every tensor on a grid, and takes a step of training."""
    student, where = engine_student(teacher, random.Random(f"engine {network.seed}"), observed)
    if faults := faults_of(student, where.split()[1], images, expected):
        raise DifferenceError(f"{where}: {faults[0]}")
    check_gradients(student, images, where)


def load(network: Network) -> Teacher:
    """Load a network as a user would, from a file."""
    channels = network.size[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fuzzed.py"
        path.write_text(network.source)
        return load_teacher(
            TeacherConfig(
                spec=f"{path}:make",
                weights="random",
                input_size=network.size,
                mean=(0.5,) * channels,
                std=(0.25,) * channels,
            )
        )


def check_float(network: Network, teacher: Teacher, module: nn.Module, images: Tensor, expected: Tensor) -> Tensor:
    """Compare the traced network with the module, on a batch and on single images; return its logits."""
    with torch.no_grad():
        loaded, found = teacher.module(images.clone()), teacher.graph(images.clone())
        if "log_softmax" in network.source and teacher.module is not module and not torch.equal(loaded, expected):
            loaded = loaded.log_softmax(1)  # of a module without a gradient, whose place its graph takes
        equal(loaded, expected, "loaded module, module")
        if "log_softmax" in network.source and not torch.equal(found, expected):  # the graph ends before it
            equal(found.log_softmax(1), expected, "traced network with its log-softmax, module")
            expected = found
        close(found, expected, "traced network, module", scale=LAYOUT / CLOSE)
        expected = found
        for number in (0, COUNT - 1):
            single = teacher.graph(images[number : number + 1].clone())
            close(single, expected[number : number + 1], "traced network on one image, module on a batch")
    if teacher.num_classes != expected.shape[1]:
        raise DifferenceError(f"num_classes {teacher.num_classes}, but {tuple(expected.shape)} logits")
    return expected


def check_cam(teacher: Teacher) -> None:
    """Compare the CAM weights in closed form with autograd's, on images of their own."""
    cam = teacher.cam
    if cam.kind == "none":
        return
    images = torch.randn(COUNT, *teacher.input_size, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(COUNT) % teacher.num_classes
    logits, features = with_features(teacher.graph, cam.node)(images)
    if features.shape[1:] != (cam.channels, cam.height, cam.width):
        raise DifferenceError(f"the CAM's features are {tuple(features.shape)}, but its site says {cam}")
    with torch.no_grad():
        equal(logits.detach(), teacher.graph(images), "network with features, traced network")
    alpha = autograd_weights(logits, features, labels, retain_graph=False)
    if cam.kind == "closed_form":
        weight = effective_weight(teacher.graph.get_submodule(cam.linear or "")).flatten(1)
        closed = closed_form_weights(weight, labels, cam.channels, cam.cells, cam.height * cam.width)
        close(closed, alpha, "CAM weights in closed form, autograd", scale=10)


def check_blocks(teacher: Teacher, images: Tensor) -> None:
    """Run a network block by block: together they are the network."""
    graph = teacher.graph
    start = next(node for node in graph.graph.nodes if node.op == "placeholder")
    ends, x = block_ends(graph), images.clone()
    output = next(node for node in reversed(graph.graph.nodes) if node.op == "output").all_input_nodes[0]
    if not ends or ends[-1] is not output:
        ends.append(output)
    with torch.no_grad():
        for end in ends:
            x, start = segment(graph, start, end)(x), end
        equal(x, graph(images.clone()), "network in blocks, traced network")


def check_equalization(network: Network, teacher: Teacher, images: Tensor) -> None:
    """Scale the channels between layers: the function stays."""
    pairs = find_pairs(teacher.graph)
    if not pairs or "float" in network.source:  # a network that converts to float32 cannot be run in float64
        return
    changed = copy.deepcopy(teacher.graph).double()
    before = changed(images.double()).detach()
    for pair, activations in zip(pairs, channel_ranges(changed, pairs, images.double()), strict=True):
        weights = weight_ranges(changed.get_submodule(pair.consumer), pair.channels)
        scale_pair(changed, pair, channel_scales(activations, weights))
    with torch.no_grad():
        close(changed(images.double()), before, f"equalized network ({len(pairs)} pairs), traced network")


def check_integer_form(student: Student, images: Tensor, where: str) -> None:
    """Compare the integer form with the simulation, activation by activation: only the order of sums may differ."""
    form = integer_form(student.net)
    simulated = _Codes(student.net)
    with torch.no_grad():
        expected = simulated.run(images.clone())
        equal(student.net(images.clone()), expected, f"{where}: student in two runs")
        led = _Led(form, simulated, where)
        close(
            led.run(images.clone()),
            expected,
            f"{where}: integer form behind the simulation's codes, simulation",
            scale=10,
        )
        free, single = form(images.clone()), form(images[:1].clone())
    if not bool(torch.isfinite(free).all()):
        raise DifferenceError(f"{where}: the integer form's logits are not finite")
    if single.shape != free[:1].shape:
        raise DifferenceError(f"{where}: the integer form gives {tuple(single.shape)} for one image")
    again = _Codes(student.net)
    one = again.run(images[:1].clone())
    close(
        _Led(form, again, where).run(images[:1].clone()),
        one,
        f"{where}: integer form of one image, simulation",
        scale=10,
    )


def check_gradients(student: Student, images: Tensor, where: str) -> None:
    """Take one backward pass: every trained parameter gets a finite gradient."""
    net = student.net
    trained = [(name, p) for name, p in net.named_parameters() if p.is_floating_point()]
    for _, parameter in trained:
        parameter.requires_grad_(True)
    try:
        net(images.clone()).square().sum().backward()
        for name, parameter in trained:
            if parameter.grad is None:
                raise DifferenceError(f"{where}: {name} has no gradient")
            if not bool(torch.isfinite(parameter.grad).all()):
                raise DifferenceError(f"{where}: the gradient of {name} is not finite")
    finally:
        for _, parameter in trained:
            parameter.requires_grad_(False)
            parameter.grad = None


class _Codes(fx.Interpreter):
    """Run a student and keep the input and the codes of every activation quantizer, by the name of its node."""

    def __init__(self, net: fx.GraphModule) -> None:
        super().__init__(net, garbage_collect_values=False)
        self.inputs: dict[str, Tensor] = {}
        self.codes: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        quantizer = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        if isinstance(quantizer, ActQuantizer):
            self.inputs[n.name] = self.env[n.args[0]]  # type: ignore[index]
            self.codes[n.name] = (value / quantizer.scale).round()
        return value


class _Led(fx.Interpreter):
    """Run an integer form; after each quantizer go on with the codes of the simulation."""

    def __init__(self, form: fx.GraphModule, simulated: _Codes, where: str) -> None:
        super().__init__(form, garbage_collect_values=False)
        self.simulated, self.where, self.seen = simulated, where, 0

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        activation = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        if not isinstance(activation, IntegerActivation):
            return value
        source, expected = self.env[n.args[0]], self.simulated.codes[n.name]  # type: ignore[index]
        if float(self.simulated.inputs[n.name].abs().max()) < NOISE:  # codes of nothing but rounding
            return expected
        close(
            source,
            self.simulated.inputs[n.name],
            f"{self.where}: input of {n.name} in the integer form, simulation",
            scale=10,
        )
        difference = (value - expected).abs()
        if float(difference.max()) > 1:
            raise DifferenceError(f"{self.where}: codes of {n.name} differ by {float(difference.max())}")
        position = source / activation.scale
        from_tie = (position - position.floor() - 0.5).abs()[difference > 0]
        allowed = 1e-4 * float(position.abs().max() + 1)
        if from_tie.numel() and float(from_tie.max()) > allowed:
            raise DifferenceError(
                f"{self.where}: codes of {n.name} differ {float(from_tie.max()):.3g} of a step from a tie"
            )
        return expected


def equal(found: Tensor, expected: Tensor, what: str) -> None:
    """Raise DifferenceError unless two tensors are equal to the last bit."""
    if not torch.equal(found, expected):
        raise DifferenceError(f"{what}: {_gap(found, expected)}")


def close(found: Tensor, expected: Tensor, what: str, scale: float = 1) -> None:
    """Raise DifferenceError unless two tensors differ by rounding only."""
    tolerance = scale * CLOSE * float(expected.abs().max() + 1e-6)
    if found.shape != expected.shape or not float((found - expected).abs().max()) <= tolerance:
        raise DifferenceError(f"{what}: {_gap(found, expected)}")


def _gap(found: Tensor, expected: Tensor) -> str:
    if found.shape != expected.shape:
        return f"shapes {tuple(found.shape)} and {tuple(expected.shape)}"
    return f"differ by {float((found - expected).abs().max()):.3g} of {float(expected.abs().max()):.3g}"
