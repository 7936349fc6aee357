"""Weight files: every way to write them that is read, and every way they can be wrong."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import synq.teacher.sources as teacher_sources
from support.tiny_model import trained_state
from synq.config.run import TeacherConfig
from synq.teacher.cifar_resnet import cifar_resnet
from synq.teacher.teacher import load_teacher
from synq.teacher.weight_files import load_weights, read_weights


@pytest.mark.parametrize("nest", [(), ("state_dict",), ("model",), ("state_dict_ema",), ("model", "state_dict")])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "model."])
def test_nesting_and_prefixes(
    make_config: Callable[..., TeacherConfig], tmp_path: Path, nest: tuple[str, ...], prefix: str
) -> None:
    content: dict[str, object] = {prefix + key: value for key, value in trained_state().items()}
    for key in reversed(nest):
        content = {key: content, "epoch": 3, "best_prec1": np.float64(91.7)}
    torch.save(content, tmp_path / "nested.th")
    teacher = load_teacher(make_config(weights=str(tmp_path / "nested.th")))
    assert torch.equal(teacher.module.get_buffer("1.running_var"), trained_state()["1.running_var"])


def test_averaged_weights_go_before_raw_ones(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}, "state_dict_ema": {"a": torch.ones(1)}}, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth")["a"].item() == 1


def test_half_precision_files_become_float32(make_config: Callable[..., TeacherConfig], tmp_path: Path) -> None:
    half = {key: value.half() if value.is_floating_point() else value for key, value in trained_state().items()}
    save_file(half, tmp_path / "half.safetensors")
    teacher = load_teacher(make_config(weights=str(tmp_path / "half.safetensors")))
    assert {p.dtype for p in teacher.module.parameters()} == {torch.float32}


def test_missing_batch_counters_do_not_matter(tmp_path: Path) -> None:
    model = cifar_resnet(8, 3, width=2)
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "w.safetensors")
    load_weights(cifar_resnet(8, 3, width=2), tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("0.weight"), r"1 tensors of the model are not in the file \(0\.weight\)"),
        (lambda s: s.update(extra=torch.ones(1)), r"1 tensors of the file are not in the model \(extra\)"),
        (
            lambda s: s.update({"5.weight": torch.ones(7, 4), "5.bias": torch.ones(7)}),
            r"5\.weight \(7, 4\) in the file, \(5, 4\).*set `teacher.num_classes`",
        ),
        (lambda s: s.update({"0.weight": torch.ones(4, 1, 3, 3)}), r"0\.weight \(4, 1, 3, 3\) in the file"),
        (lambda s: s["5.weight"].fill_(float("nan")), r"must be finite, but tiny has NaN .*\(5\.weight\)"),
        (lambda s: s["1.running_var"].fill_(float("inf")), r"must be finite, .*\(1\.running_var\)"),
        (lambda s: s["1.running_var"].fill_(-1.0), r"must be >= 0, .*1\.running_var"),
    ],
)
def test_wrong_weights(
    make_config: Callable[..., TeacherConfig],
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], object],
    message: str,
) -> None:
    state = trained_state()
    change(state)
    save_file(state, tmp_path / "tiny.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        load_teacher(make_config(weights=str(tmp_path / "tiny.safetensors")))
    assert "\n" not in str(caught.value)


def test_only_the_first_few_keys_are_listed(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"\(conv1\.weight, bn1\.weight, bn1\.bias, \.\.\.\)"):
        load_weights(cifar_resnet(8, 3, width=2), tmp_path / "w.safetensors")


class Payload:
    """Pickles to a call: a file that holds it must not run it."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return Path.touch, (Path("executed"),)  # type: ignore[return-value]


def test_unsafe_files_are_rejected_and_not_run(
    make_config: Callable[..., TeacherConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": trained_state(), "extra": Payload()}, "bad.pth")
    with pytest.raises(ValueError, match=r"must contain plain tensors.*torch\.save\(model\.state_dict"):
        load_teacher(make_config(weights=str(tmp_path / "bad.pth")))
    assert not Path("executed").exists()
    torch.save(cifar_resnet(8, 3, width=2), "module.pth")
    with pytest.raises(ValueError, match="must contain plain tensors"):
        read_weights("module.pth")


@pytest.mark.parametrize("name", ["cut.safetensors", "cut.pth", "empty.pth", "empty.safetensors", "text.th"])
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.startswith("cut"):
        save_file(trained_state(), path) if path.suffix == ".safetensors" else torch.save(trained_state(), path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_bytes(b"" if name.startswith("empty") else b"not weights")
    with pytest.raises(ValueError, match=f"`teacher.weights` must .*{re.escape(name)}"):
        read_weights(path)


def test_files_without_a_state_dict(tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"must contain a state dict .* with list"):
        read_weights(tmp_path / "list.pth")


def test_absent_weight_file(make_config: Callable[..., TeacherConfig], tmp_path: Path) -> None:
    for weights in (str(tmp_path / "nowhere.pth"), str(tmp_path)):
        with pytest.raises(FileNotFoundError, match=r"`teacher.weights` must name an existing file, but got"):
            load_teacher(make_config(weights=weights))
    with pytest.raises(ValueError, match=r"must be a file .* or 'random' for a factory, but got 'IMAGENET1K_V1'"):
        load_teacher(make_config(weights="IMAGENET1K_V1"))


def test_a_network_that_asks_for_the_versions_of_its_layers(tmp_path: Path) -> None:
    """MNASNet of torchvision rejects tensors without a version, which no safetensors file has."""
    config = TeacherConfig(spec="torchvision:mnasnet0_5", weights="random", num_classes=7)
    module = teacher_sources.build_source(config).module
    path = tmp_path / "mnasnet.safetensors"
    save_file({name: tensor.clone() for name, tensor in module.state_dict().items()}, path)
    other = teacher_sources.build_source(config).module
    with torch.no_grad():
        other.layers[0].weight.zero_()  # type: ignore[union-attr,operator]
    load_weights(other, path)
    assert torch.equal(other.layers[0].weight, module.layers[0].weight)  # type: ignore[union-attr,arg-type]
