"""Networks that are given as objects: given back as they were, found again by their digest, or rejected by name."""

import ast
import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import synq
from support.api_tools import INPUT, RESEARCH, SIZE, GrayNet
from synq.api.settings import settings_of
from synq.teacher.process_state import _precisions, _set_precisions, process_settings_kept


def test_a_network_is_given_back_as_it_was(tmp_path: Path) -> None:
    net = GrayNet().train()
    net.conv1.weight.requires_grad_(False)
    calls: list[str] = []
    net.conv1.register_forward_hook(lambda *_: calls.append("forward"))
    net.conv2.register_full_backward_hook(lambda *_: calls.append("backward"))
    net(torch.randn(4, *SIZE)).sum().backward()
    calls.clear()
    state = copy.deepcopy(net.state_dict())
    gradients = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    flags = [(name, p.requires_grad, p.is_leaf) for name, p in net.named_parameters()]
    modes = [part.training for part in net.modules()]
    hooks = [len(part._forward_hooks) + len(part._backward_hooks) for part in net.modules()]
    synq.quantize(net, **INPUT, config=RESEARCH, epochs=1, output_dir=tmp_path, progress=False)
    assert not calls, "no hook of the user is called"
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in state.items())
    assert [(name, p.requires_grad, p.is_leaf) for name, p in net.named_parameters()] == flags
    assert [part.training for part in net.modules()] == modes and all(modes)
    assert [len(part._forward_hooks) + len(part._backward_hooks) for part in net.modules()] == hooks
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)


def test_the_generators_of_gpus_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two states of CUDA, started and not, in place of a GPU; with one, see end_to_end/test_gpu.py."""
    states = [torch.arange(4, dtype=torch.uint8)]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [state.clone() for state in states])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda values: states.__setitem__(slice(None), values))
    with process_settings_kept():
        states[0].fill_(9)
    assert states[0].tolist() == [0, 1, 2, 3]
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        with process_settings_kept():
            torch.manual_seed(0)
    assert seeds[-1] == 7, "the seed of the caller waits for CUDA to start, and not ours"


def test_the_process_keeps_its_settings(tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # of other tests in this process
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    state, generator = dict(accelerator.state._shared_state), torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast("cpu"):
            synq.quantize(GrayNet().float(), **INPUT, config=RESEARCH, epochs=1, output_dir=tmp_path, progress=False)
            assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert accelerator.mixed_precision == "bf16" and accelerator.state._shared_state == state
    assert torch.equal(torch.get_rng_state(), generator)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_every_default_of_the_process_is_accepted() -> None:
    net = GrayNet()
    with torch.device("meta"):  # as inside `with torch.device("cuda")`
        assert synq.load_teacher(net, **INPUT).digest == synq.load_teacher(net, **INPUT).digest
        assert torch.get_default_device().type == "meta"
    assert torch.get_default_device().type == "cpu"


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="PyTorch 2.9 and later")
@pytest.mark.parametrize("part", [torch.backends.cuda.matmul, torch.backends.cudnn.conv])
def test_the_precision_of_float32_may_be_set_by_part(part: Any) -> None:
    before = _precisions()
    try:
        part.fp32_precision = "ieee" if part.fp32_precision == "tf32" else "tf32"
        mixed = _precisions()
        with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
            assert torch.get_float32_matmul_precision() and torch.backends.cudnn.allow_tf32
        with process_settings_kept():
            torch.set_float32_matmul_precision("medium")
            torch.backends.cudnn.allow_tf32 = False
        assert _precisions()[2] == mixed[2] != before[2]
    finally:
        _set_precisions(before)
    assert _precisions() == before


def test_the_digest_is_of_code_and_weights() -> None:
    def spec(net: nn.Module) -> str:
        return synq.load_teacher(net, **INPUT).spec

    net = GrayNet()
    assert spec(net) == spec(GrayNet()) == spec(GrayNet().train()) == spec(torch.nn.DataParallel(GrayNet()))
    changed = GrayNet()
    with torch.no_grad():
        changed.fc.bias.add_(1e-3)
    assert spec(changed) != spec(net)

    class Other(GrayNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    other = Other()
    other.__class__.__name__ = "GrayNet"
    assert spec(other) != spec(net)


class _Pipeline:
    """As `transformers.pipeline("image-classification")` looks: a model and its processor."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

        self.image_processor = SimpleNamespace(
            image_mean=[0.5], image_std=[0.25], do_normalize=True, size={"height": 12, "width": 12}
        )


def test_a_pipeline_knows_its_input() -> None:
    teacher = synq.load_teacher(_Pipeline(GrayNet()))
    assert (teacher.input_size, teacher.mean, teacher.std) == (SIZE, (0.5,), (0.25,))
    assert teacher.spec == synq.load_teacher(GrayNet(), **INPUT).spec


def test_all_that_is_missing_is_asked_for_together() -> None:
    with pytest.raises(ValueError, match="`input_size`, `mean` and `std` must be given: the network does not") as error:
        synq.quantize(GrayNet())
    assert "teacher." not in str(error.value)
    with pytest.raises(ValueError, match="`mean` and `std` must be given"):
        synq.quantize(GrayNet(), input_size=SIZE)
    untrained = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match="or set `weights='random'`") as error:
        synq.quantize(untrained, **INPUT)
    assert "load its weights into it first" in str(error.value) and "file" not in str(error.value)
    with pytest.raises(ValueError, match="load trained ones into it first") as error:
        synq.quantize(untrained)
    assert "file" not in str(error.value)
    assert synq.load_teacher(untrained, weights="random", **INPUT).num_classes == 4


def test_a_weight_file_is_not_ignored_beside_a_network_in_memory() -> None:
    for call in (synq.quantize, synq.load_teacher, synq.inspect, synq.synthesize):
        with pytest.raises(ValueError, match=r"`weights` must be left out, or be 'random', .* but got '.*best\.pth'"):
            call(GrayNet(), weights="best.pth", **INPUT)


def test_fewer_images_than_the_default_batch_name_an_argument_that_works() -> None:
    with pytest.raises(ValueError, match="but got 64, the default: add config=") as error:
        synq.quantize(GrayNet(), num_images=32, **INPUT)
    advised = ast.literal_eval(str(error.value).rpartition("add config=")[2])
    assert settings_of(advised, {"synthesis.num_images": 32}).finetune.batch_size == 32


@pytest.mark.filterwarnings("ignore::FutureWarning:torch.jit", "ignore::DeprecationWarning")
def test_what_is_no_network_is_rejected_with_the_reason(tmp_path: Path) -> None:
    scripted = torch.jit.trace(GrayNet(), torch.zeros(1, *SIZE))
    file = tmp_path / "net.pt"
    torch.jit.save(scripted, str(file))
    weights = tmp_path / "weights.pth"
    torch.save(GrayNet().state_dict(), weights)
    exported = torch.export.export(GrayNet(), (torch.zeros(2, *SIZE),))
    cases: list[tuple[Any, str]] = [
        (scripted, "TorchScript .* a compiled program without layers to train"),
        (file, "is TorchScript, a compiled program"),
        (exported, "torch.export .*a compiled program"),
        ("net.onnx", "is ONNX, a compiled program"),
        (str(weights), "holds weights: build the network, load them"),
        (GrayNet().state_dict(), "a dict of weights: build the network and call its load_state_dict"),
        (GrayNet, "the class GrayNet: call it"),
        ("net.py", "name the function in it"),
        ("resnet18", "did you mean torchvision:resnet18"),
        (3, "but got int"),
        (nn.Sequential(scripted, nn.Flatten()), "its part '0' is TorchScript"),
    ]
    for model, reason in cases:
        with pytest.raises(ValueError, match=reason) as error:
            synq.quantize(model, **INPUT, output_dir=tmp_path / "out")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="`model` must be a network or a spec"):
        synq.quantize()
