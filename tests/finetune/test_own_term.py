"""Loss terms of a user: by a decorator, an entry point and a file; in the loss, the digest, the search space."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import synq
from support.api_tools import INPUT, RESEARCH, GrayNet
from synq.config import plugins
from synq.config.identity import config_digest, make_absolute
from synq.config.run import with_overrides
from synq.finetune.own_term import check_own_term

FILE = '''
def margin(inputs):
    """The squared distance of the logits, the mean over classes."""
    return (inputs.student_logits - inputs.teacher_logits).square().mean(1)
'''


@pytest.fixture(autouse=True)
def _no_other_terms(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(plugins, "REGISTERED", {})
    plugins._entry_points.cache_clear()
    yield
    plugins._entry_points.cache_clear()


def quantize(folder: Path, **settings: Any) -> synq.Run:
    config = {**RESEARCH, **{f"finetune.{key}": value for key, value in settings.items()}}
    return synq.quantize(GrayNet(), **INPUT, config=config, epochs=1, output_dir=folder, progress=False)


def distance(inputs: synq.LossInputs) -> Tensor:
    return (inputs.student_logits - inputs.teacher_logits).square().mean(1)


def test_a_term_is_part_of_the_loss(tmp_path: Path) -> None:
    seen: list[synq.LossInputs] = []

    @synq.loss_term("distance", version="1")
    def term(inputs: synq.LossInputs) -> Tensor:
        seen.append(inputs)
        return distance(inputs)

    run = quantize(tmp_path, own_term="distance", own_weight=3.0)
    last, batch = run.record.loss_history[-1], seen[-1]
    weights = run.config.finetune
    expected = last["kd"] + weights.ce_weight * last["ce"] + weights.cam_weight * last["cam"] + 3.0 * last["own"]
    assert last["own"] > 0 and last["loss"] == pytest.approx(expected, rel=1e-5)
    assert batch.student_map is not None and batch.student_map.shape[0] == len(batch.labels) == 16
    assert not batch.teacher_logits.requires_grad and batch.student_logits.requires_grad
    assert run.record.config["finetune"]["own_term"] == "distance@1"
    plain = quantize(tmp_path)
    assert "own" not in plain.record.loss_history[-1]
    changed = [run.student.state_dict()[name] for name in ("conv1.weight", "fc.weight")]
    assert not all(map(torch.equal, changed, [plain.student.state_dict()[n] for n in ("conv1.weight", "fc.weight")]))


def test_the_version_is_part_of_the_digest_and_is_checked(tmp_path: Path) -> None:
    digests = []
    for version in ("1", "2"):
        synq.loss_term("distance", version=version)(distance)
        config = with_overrides(synq.RunConfig(), {"finetune.own_term": "distance", "finetune.own_weight": 1.0})
        digests.append(config_digest(make_absolute(config)))
    assert digests[0] != digests[1]
    old = with_overrides(config, {"finetune.own_term": "distance@1"})
    assert make_absolute(old) == make_absolute(make_absolute(old))
    with pytest.raises(ValueError, match="must have the version of its settings, 1, but distance has version 2 now"):
        check_own_term(old.finetune, 5)


def test_a_finished_run_is_opened_without_its_term(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synq.loss_term("distance", version="1")(distance)
    run = quantize(tmp_path, own_term="distance", own_weight=1.0)
    monkeypatch.setattr(plugins, "REGISTERED", {})
    opened = synq.open_run(run.path, model=GrayNet())
    assert opened.record == run.record
    with pytest.raises(ValueError, match=r"a name that synq\.loss_term or an entry point of synq\.loss_terms"):
        quantize(tmp_path, own_term="distance", own_weight=2.0)


def test_a_function_of_a_file_by_command(
    tmp_path: Path, tiny_settings: dict[str, object], as_args: Callable[..., list[str]], capsys: Any
) -> None:
    from synq.train import main

    file = tmp_path / "my_losses.py"
    file.write_text(FILE)
    settings = {**tiny_settings, "runtime.output_dir": str(tmp_path / "out")}
    settings |= {"finetune.own_term": f"{file}:margin", "finetune.own_weight": 0.5}
    assert main(as_args(settings)) == 0 and main(as_args(settings)) == 0
    assert "finished before" in capsys.readouterr().err
    file.write_text(FILE.replace("mean(1)", "sum(1)"))
    assert main(as_args(settings)) == 0
    assert len(list((tmp_path / "out").glob("run-*"))) == 2, "a changed file is another run"
    assert main(as_args({**settings, "finetune.own_term": f"{file}:margins"})) == 2
    assert "did you mean `margin`" in capsys.readouterr().err
    assert main(as_args({**settings, "finetune.own_term": f"{tmp_path}/none.py:margin"})) == 2
    assert "must name an existing Python file" in capsys.readouterr().err


def test_the_path_of_a_file_may_have_an_at_sign(tmp_path: Path) -> None:
    file = tmp_path / "me@home" / "my_losses.py"
    file.parent.mkdir()
    file.write_text(FILE)
    run = quantize(tmp_path / "out", own_term=f"{file}:margin", own_weight=0.5)
    name, version, _ = plugins.parsed(plugins.LOSS_TERM, str(run.record.config["finetune"]["own_term"]))
    assert name == f"{file}:margin" and len(version) == plugins.DIGITS and run.record.loss_history[-1]["own"] > 0


def test_an_entry_point_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "acme_losses.py").write_text(FILE)
    info = tmp_path / "acme_losses-2.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-losses\nVersion: 2.5\n")
    (info / "entry_points.txt").write_text("[synq.loss_terms]\nacme = acme_losses:margin\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins._entry_points.cache_clear()
    run = quantize(tmp_path / "out", own_term="acme", own_weight=0.5)
    assert run.record.config["finetune"]["own_term"] == "acme@2.5" and run.record.loss_history[-1]["own"] > 0
    sys.modules.pop("acme_losses")
    with pytest.raises(ValueError, match=r"must be one of acme, .* did you mean `acme`"):
        quantize(tmp_path / "out", own_term="acm", own_weight=0.5)


def test_a_term_that_cannot_be_trained_is_rejected(tmp_path: Path) -> None:
    cases: list[tuple[Callable[[synq.LossInputs], Any], str]] = [
        (lambda inputs: distance(inputs).mean(), r"returned shape \(\) for 3 images"),
        (lambda inputs: distance(inputs).detach(), "returned no gradient"),
        (lambda inputs: distance(inputs) / 0, "returned NaN or infinity"),
        (lambda inputs: 3.0, "returned float"),
        (lambda inputs: inputs.nothing, "raised AttributeError"),
    ]
    for number, (function, reason) in enumerate(cases):
        synq.loss_term(f"bad{number}", version="1")(function)
        with pytest.raises(ValueError, match=reason):
            quantize(tmp_path, own_term=f"bad{number}", own_weight=1.0)
    with pytest.raises(ValueError, match=r"`finetune\.own_weight` must be 0 unless"):
        quantize(tmp_path, own_weight=1.0)
    with pytest.raises(ValueError, match="`version` must be a text"):
        synq.loss_term("x", version="1@2")
    assert not (tmp_path / "store").exists()


def test_the_weight_is_searched_and_the_term_is_not(tmp_path: Path) -> None:
    from synq.sweeps.spec_file import spec_from_dict

    (tmp_path / "my_losses.py").write_text(FILE)
    base = {"finetune": {"own_term": f"{tmp_path}/my_losses.py:margin"}}
    space = {"finetune.own_weight": {"type": "choice", "values": [0.0, 0.5]}}
    spec = spec_from_dict({"base": base, "space": space, "sampler": "grid", "output_dir": str(tmp_path / "out")})
    assert spec.groups[0].base.finetune.own_term == plugins.versioned(
        plugins.LOSS_TERM, f"{tmp_path}/my_losses.py:margin"
    )
    with pytest.raises(ValueError, match=r"finetune\.own_term"):
        spec_from_dict({"base": base, "space": {"finetune.own_term": {"type": "choice", "values": ["a:b"]}}})


def test_a_term_that_needs_maps_is_rejected_where_the_network_has_none() -> None:
    synq.loss_term("maps", version="1")(
        lambda inputs: distance(inputs) + (inputs.student_map - inputs.teacher_map).square().mean((1, 2))
    )
    config = with_overrides(synq.RunConfig(), {"finetune.own_term": "maps@1", "finetune.own_weight": 1.0}).finetune
    check_own_term(config, 5)
    with pytest.raises(ValueError, match=r"must return one value with a gradient for each image, but maps@1 raised"):
        check_own_term(config, 5, with_maps=False)


def test_a_term_is_checked_on_the_device_of_the_run() -> None:
    devices: list[str] = []

    @synq.loss_term("placed", version="1")
    def term(inputs: synq.LossInputs) -> Tensor:
        tensors = (inputs.student_logits, inputs.teacher_logits, inputs.labels, inputs.student_map, inputs.teacher_map)
        devices.extend(tensor.device.type for tensor in tensors if tensor is not None)
        return torch.zeros(3, requires_grad=True)

    config = with_overrides(synq.RunConfig(), {"finetune.own_term": "placed@1", "finetune.own_weight": 1.0}).finetune
    check_own_term(config, 5, device="meta")
    assert devices == ["meta"] * 5
