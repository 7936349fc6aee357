"""Weight files as others write them: more than the network in a file, other containers, kinds of numbers, damage."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from support.tiny_model import trained_state
from synq.cli import run as command
from synq.common.notices import forget_notices
from synq.config.identity import map_spec_path
from synq.config.run import TeacherConfig
from synq.teacher.teacher import load_teacher
from synq.teacher.weight_files import is_weight_file, load_weights, read_weights

State = dict[str, Tensor]
RIGHT = trained_state()
OTHER = {name: value + 1 for name, value in RIGHT.items()}


@pytest.fixture(autouse=True)
def _notes_are_new() -> None:
    forget_notices()


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )


def loaded(path: Path) -> State:
    module = network()
    load_weights(module, path)
    return module.state_dict()


def saved(folder: Path, content: object, name: str = "w.pth") -> Path:
    with warnings.catch_warnings():  # of sparse and quantized tensors
        warnings.simplefilter("ignore")
        torch.save(content, folder / name)
    return folder / name


def prefixed(prefix: str, state: State = RIGHT) -> State:
    return {prefix + name: value for name, value in state.items()}


def assert_right(state: State) -> None:
    assert all(torch.equal(state[name], value) for name, value in RIGHT.items())


def assert_rejected(path: Path, *words: str) -> None:
    """One line that names the file and holds the words; the command ends with 2."""
    before = copy.deepcopy(module := network()).state_dict()
    with pytest.raises((ValueError, OSError)) as caught:
        load_weights(module, path)
    text = str(caught.value)
    assert "\n" not in text and "`teacher.weights` must" in text and path.name in text, text
    assert all(word in text for word in words), text
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("content", "note"),
    [
        ({"state_dict": {**prefixed("model."), "criterion.weight": torch.ones(3)}}, "(criterion.weight)"),
        ({"state_dict": {**prefixed("model."), "train_acc.tp": torch.ones(3), "epoch": 3}}, "(train_acc.tp)"),
        ({**prefixed("module.encoder."), "module.projection.weight": torch.ones(2, 2)}, "(module.projection.weight)"),
        ({**prefixed("net."), "net_loss.scale": torch.ones(1)}, "(net_loss.scale)"),
        ({"state_dict": {**prefixed("_forward_module.model."), "metric.n": torch.ones(1)}}, "(metric.n)"),
        ({"model": {**prefixed("classifier._orig_mod."), "ema_decay": torch.ones(1)}}, "(ema_decay)"),
    ],
)
def test_bugs_12_entries_beside_the_prefixed_network_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: object, note: str
) -> None:
    assert_right(loaded(saved(tmp_path, content)))
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and note in err and "are not the model's" in err


def test_bugs_12_extra_entries_of_the_network_itself_are_rejected(tmp_path: Path) -> None:
    extra = {"state_dict": {**prefixed("model."), "model.7.weight": torch.ones(3)}}
    assert_rejected(saved(tmp_path, extra), "1 tensors of the file are not in the model (7.weight)")
    partly = {**prefixed("model.", {name: RIGHT[name] for name in list(RIGHT)[1:]}), "loss.weight": torch.ones(1)}
    assert_rejected(saved(tmp_path, partly), "1 tensors of the model are not in the file (0.weight)", "'model.'")


@pytest.mark.parametrize("key", ["weights", "params", "network", "ema", "model_state", "best", "backbone"])
def test_bugs_12_containers_under_other_keys(tmp_path: Path, key: str) -> None:
    path = saved(tmp_path, {key: RIGHT, "epoch": 7, "optimizer": {"state": {0: {"exp_avg": torch.ones(4)}}}})
    assert_right(loaded(path))


def test_bugs_12_containers_nested_listed_and_split(tmp_path: Path) -> None:
    for content in (
        {"run": {"best": {"weights": prefixed("module.")}}},
        [RIGHT, 3],
        {"0": {"weight": RIGHT["0.weight"]}, **{name: value for name, value in RIGHT.items() if name[0] != "0"}},
        {name.replace("1.", "1._orig_mod."): value for name, value in RIGHT.items()},
        {name.replace("1.", "1.module."): value for name, value in RIGHT.items()},
        {f"_fsdp_wrapped_module.{name.replace('.', '._checkpoint_wrapped_module.')}": v for name, v in RIGHT.items()},
    ):
        assert_right(loaded(saved(tmp_path, content)))
    assert read_weights(saved(tmp_path, {"weights": RIGHT})).keys() == RIGHT.keys()
    with pytest.raises(ValueError, match=r"several tables of tensors: best, last"):
        read_weights(saved(tmp_path, {"best": RIGHT, "last": OTHER}))


@pytest.mark.parametrize(
    ("content", "taken"),
    [
        ({"model": OTHER, "ema": RIGHT}, "'ema.' is taken, not 'model.'"),
        ({"state_dict": OTHER, "ema_state_dict": RIGHT}, "'ema_state_dict.'"),
        ({"state_dict": {**prefixed("model.", OTHER), **prefixed("model_ema.module.")}}, "'state_dict.model_ema.mod"),
        ({**prefixed("net.", OTHER), **prefixed("ema_model.module."), "ema_model.n_averaged": torch.ones(())}, "'ema_"),
        ({"model": RIGHT, "teacher": OTHER}, "'model.' is taken, not 'teacher.'"),
    ],
)
def test_bugs_12_of_several_networks_the_averaged_or_common_one_is_taken_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: object, taken: str
) -> None:
    assert_right(loaded(saved(tmp_path, content)))
    assert f"holds the model several times: {taken}" in capsys.readouterr().err


def test_bugs_12_several_networks_without_a_rule_are_rejected(tmp_path: Path) -> None:
    both = {**prefixed("student."), **prefixed("teacher.", OTHER)}
    assert_rejected(saved(tmp_path, both), "'student.', 'teacher.' with different values")
    assert_rejected(saved(tmp_path, {"best": RIGHT, "last": OTHER}), "'best.', 'last.'")
    assert_rejected(saved(tmp_path, {"ema": OTHER, "swa": RIGHT, "model": RIGHT}), "'ema.', 'swa.'")
    assert_right(loaded(saved(tmp_path, {"best": RIGHT, "last": dict(RIGHT)})))


def sharded(folder: Path, kind: str) -> tuple[Path, dict[str, str]]:
    write: Callable[..., object] = save_file if kind == "safetensors" else torch.save
    stem = "model" if kind == "safetensors" else "pytorch_model"
    files = [f"{stem}-0000{number}-of-00002.{kind}" for number in (1, 2)]
    places = {name: files[number % 2] for number, name in enumerate(RIGHT)}
    for file in files:
        write({name: RIGHT[name] for name, place in places.items() if place == file}, folder / file)
    index = folder / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index, places


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_bugs_12_sharded_sets(tmp_path: Path, kind: str) -> None:
    index, places = sharded(tmp_path, kind)
    assert_right(loaded(index))
    assert is_weight_file(index.name) and map_spec_path(index.name, lambda path: f"/{path}") == f"/{index.name}"
    first = next(iter(places.values()))
    assert_rejected(tmp_path / first, "it is one file of several")
    for weight_map, words in (
        ({**places, "x": first}, "has no 'x'"),
        (dict(list(places.items())[1:]), "does not list '0.weight'"),
        ({**places, "x": "../w.bin"}, "in its own folder"),
        ({**places, "x": "gone.bin"}, "does not"),
        ({**places, "x": index.name}, "in its own folder"),
        ({**places, "x": 3}, "without one"),
        ([], "without one"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert_rejected(index, words)
    for text in ("{", "[]", "[" * 100_000, ""):
        index.write_text(text)
        assert_rejected(index)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "pointer of Git LFS"),
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\n <html lang='en'>", "web page"),
        (b"\x89HDF\r\n\x1a\n and more", "HDF5"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"GGUF\x03", "GGUF"),
        (b"\x93NUMPY\x01\x00", "NumPy array"),
        (b"\x08\x0a\x12\x07pytorch", ""),
        (b"PK\x03\x04", ""),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".BIN", ".ckpt"])
def test_bugs_12_files_of_other_kinds(tmp_path: Path, content: bytes, words: str, suffix: str) -> None:
    (tmp_path / f"w{suffix}").write_bytes(content)
    assert_rejected(tmp_path / f"w{suffix}", words)


def test_bugs_12_archives_of_other_kinds_and_folders(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", **{name: value.numpy() for name, value in RIGHT.items()})
    assert_rejected(tmp_path / "w.npz", ".npz", "save_file(model.state_dict(), FILE)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(network()), tmp_path / "script.pt")
    assert_rejected(tmp_path / "script.pt", "TorchScript")
    sharded(tmp_path, "safetensors")
    assert_rejected(tmp_path, "is a folder", "model.safetensors.index.json")


def test_bugs_12_the_content_decides_not_the_suffix(tmp_path: Path) -> None:
    for name in ("X.SafeTensors", "w.bin", "w.pth", "W.CKPT"):
        save_file(RIGHT, tmp_path / name)
        assert is_weight_file(name)
        assert_right(loaded(tmp_path / name))
    assert_right(loaded(saved(tmp_path, RIGHT, "w.safetensors")))
    torch.save(RIGHT, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert_right(loaded(tmp_path / "old.pth"))
    assert map_spec_path("X.SafeTensors", lambda path: f"/{path}") == "/X.SafeTensors"


@pytest.mark.parametrize(
    ("convert", "words"),
    [
        (lambda t: t.to_sparse(), "is not dense (sparse_coo)"),
        (lambda t: t.flatten(1).to_sparse_csr(), "is not dense (sparse_csr)"),
        (lambda t: t.to("meta"), "has no values"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "is quantized (qint8)"),
        (lambda t: t.to(torch.int8), "has type int8, but must be float"),
        (lambda t: t.to(torch.uint8), "has type uint8"),
        (lambda t: t.to(torch.int64), "has type int64"),
        (lambda t: t.to(torch.bool), "has type bool"),
        (lambda t: t.to(torch.complex64), "has type complex64"),
        (lambda t: t.to(torch.float8_e4m3fn), "has type float8_e4m3fn"),
        (lambda t: t.double() * 1e300, "float32 cannot hold"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning", "ignore:.*deprecated")
def test_bugs_12_kinds_of_tensors_that_are_no_weights(
    tmp_path: Path, convert: Callable[[Tensor], Tensor], words: str
) -> None:
    changed = convert(RIGHT["0.weight"])
    shaped = changed.shape == RIGHT["0.weight"].shape
    path = saved(tmp_path, {**RIGHT, "0.weight": changed})
    assert_rejected(path, *(["0.weight", words] if shaped else ["1 shapes differ (0.weight"]))


@pytest.mark.parametrize(
    ("dtype", "note"),
    [(torch.float16, "exactly these values"), (torch.bfloat16, "bfloat16"), (torch.float64, "rounded to float32")],
)
def test_bugs_12_other_floats_are_loaded_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: torch.dtype, note: str
) -> None:
    state = {name: value.to(dtype) for name, value in RIGHT.items()}  # counters, too, as model.half() never does
    found = loaded(saved(tmp_path, state))
    assert all(torch.equal(found[name], value.to(found[name].dtype)) for name, value in state.items())
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and note in err
    loaded(tmp_path / "w.pth")
    assert not capsys.readouterr().err, "a note is said once"


@pytest.mark.parametrize("legacy", [False, True])
def test_bugs_r_8_truncated_files_are_named(tmp_path: Path, legacy: bool) -> None:
    torch.save(RIGHT, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    raw = (tmp_path / "w.pth").read_bytes()
    for length in (1, 3, 10, 60, 200, len(raw) // 2, len(raw) - 30, len(raw) - 1):
        (tmp_path / "cut.pth").write_bytes(raw[:length])
        assert_rejected(tmp_path / "cut.pth")


def test_bugs_12_the_command_ends_with_one_line(
    make_config: Callable[..., TeacherConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sparse = saved(tmp_path, {**RIGHT, "0.weight": RIGHT["0.weight"].to_sparse()}, "sparse.pth")
    config = make_config(weights=str(sparse))
    values = ["--teacher.input_size", "3,12,12", "--teacher.mean", ".5,.5,.5", "--teacher.std", ".5,.5,.5"]
    assert command(["inspect", config.spec, "--teacher.weights", str(sparse), *values]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "sparse.pth" in err and "is not dense" in err


def test_bugs_12_lazy_layers_are_named(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match="lazy ones without shapes"):
        load_weights(module, saved(tmp_path, RIGHT))


def test_bugs_12_weights_of_another_part_load_with_the_teacher(
    make_config: Callable[..., TeacherConfig], tmp_path: Path
) -> None:
    path = saved(tmp_path, {"state_dict": {**prefixed("model."), "criterion.weight": torch.ones(3)}})
    teacher = load_teacher(make_config(weights=str(path)))
    assert torch.equal(teacher.module.get_buffer("1.running_var"), RIGHT["1.running_var"])
