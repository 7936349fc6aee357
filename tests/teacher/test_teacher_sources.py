"""Every source of teachers, and the metadata that must never be guessed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import synq.teacher.sources as teacher_sources
from support.tiny_model import HALF, SIZE, trained_state
from synq.config.run import TeacherConfig
from synq.teacher.teacher import load_teacher

# --- files and factories ---


def test_factory_file_teacher(make_config: Callable[..., TeacherConfig]) -> None:
    teacher = load_teacher(make_config())
    assert (teacher.name, teacher.num_classes, teacher.input_size) == ("tiny", 5, SIZE)
    assert torch.equal(teacher.module.get_buffer("1.running_mean"), trained_state()["1.running_mean"])
    assert (teacher.mean, teacher.std) == (HALF, HALF)
    assert teacher.default_dataset is None


def test_factory_of_an_importable_module(
    make_config: Callable[..., TeacherConfig], model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_file.rename(model_file.with_name("zoo_for_test.py"))
    monkeypatch.syspath_prepend(str(model_file.parent))
    expected = load_teacher(make_config(spec=f"{model_file.with_name('zoo_for_test.py')}:tiny"))
    assert load_teacher(make_config(spec="zoo_for_test:tiny")).digest == expected.digest


def test_weight_stem_distinguishes_two_teachers_of_one_factory(
    make_config: Callable[..., TeacherConfig], tmp_path: Path
) -> None:
    save_file(trained_state(), tmp_path / "Run-2.safetensors")
    assert load_teacher(make_config(weights=str(tmp_path / "Run-2.safetensors"))).name == "tiny_run_2"
    assert load_teacher(make_config(weights="random")).name == "tiny_random"


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("tinny", "must name a function of .*did you mean tiny"),
        ("not_a_module", r"must return a torch.nn.Module, but got int"),
        ("wants_argument", "must be callable without arguments .* raised TypeError: .*'width'"),
        ("divides", "must be callable without arguments .* raised ZeroDivisionError: division by zero"),
        ("Drops", "must be deterministic in eval mode"),
        ("weight_normed", r"weight of layer '5' is computed .* remove the parametrization first"),
    ],
)
def test_bad_factories(make_config: Callable[..., TeacherConfig], factory: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_teacher(make_config(factory, weights="random"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torchvison:resnet18", "torchvison.*did you mean torchvision"),
        ("no_such_module_here:net", "no_such_module_here.*sources are bundled, torchvision"),
        ("bundled:", "must have the form bundled:NAME"),
    ],
)
def test_unknown_sources(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_teacher(TeacherConfig(spec=spec))


def test_absent_and_broken_model_files(
    make_config: Callable[..., TeacherConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match=r"must name an existing Python file, but got .*nowhere\.py"):
        load_teacher(make_config(spec=f"{tmp_path}/nowhere.py:tiny"))
    (tmp_path / "broken.py").write_text("def (:")
    with pytest.raises(ValueError, match=r"broken\.py"):
        load_teacher(make_config(spec=f"{tmp_path}/broken.py:tiny"))
    (tmp_path / "raises_on_import.py").write_text("{}['two\\nlines']")
    for spec in (f"{tmp_path}/raises_on_import.py:tiny", "raises_on_import:tiny"):
        monkeypatch.syspath_prepend(str(tmp_path))
        with pytest.raises(ValueError, match=r"raises_on_import.* raised KeyError: ") as caught:
            load_teacher(make_config(spec=spec))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["input_size", "mean"])
def test_facts_are_never_guessed(make_config: Callable[..., TeacherConfig], missing: str) -> None:
    fields = {"mean": None, "std": None} if missing == "mean" else {missing: None}
    with pytest.raises(ValueError, match=f"`teacher.{missing}`.* must be given"):
        load_teacher(make_config(**fields))


def test_number_of_classes_must_be_the_number_of_logits(make_config: Callable[..., TeacherConfig]) -> None:
    with pytest.raises(ValueError, match=r"`teacher.num_classes` must be the number of logits, 5, but got 6"):
        load_teacher(make_config(num_classes=6))


def test_untrained_model_without_weights_is_rejected(make_config: Callable[..., TeacherConfig]) -> None:
    with pytest.raises(ValueError, match=r"must be trained, .* have their initial values"):
        load_teacher(make_config(weights=None))
    assert load_teacher(make_config(weights="random")).num_classes == 5


# --- libraries ---


def test_torchvision_random_teacher() -> None:
    teacher = load_teacher(TeacherConfig(spec="torchvision:mobilenet_v3_small", weights="random", num_classes=7))
    assert teacher.name == "torchvision_mobilenet_v3_small_random"
    assert (teacher.num_classes, teacher.input_size) == (7, (3, 224, 224))
    assert (teacher.mean, teacher.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert teacher.cam.kind == "autograd"


def test_torchvision_errors_name_the_choices() -> None:
    with pytest.raises(ValueError, match=r"resnet81.*did you mean resnet18"):
        load_teacher(TeacherConfig(spec="torchvision:resnet81", weights="random"))
    with pytest.raises(ValueError, match=r"IMAGENET1K_V1, IMAGENET1K_V2\).*'IMAGENET1K_V3'.*did you mean IMAGENET1K_V"):
        load_teacher(TeacherConfig(spec="torchvision:resnet50", weights="IMAGENET1K_V3"))


def test_torchvision_file_is_recognised_by_its_official_name(tmp_path: Path) -> None:
    from torchvision import models

    model = models.squeezenet1_1(num_classes=3)  # no BatchNorm: only the source is looked at
    official = models.get_model_weights("squeezenet1_1").DEFAULT.url.rsplit("/", 1)[-1]
    for name, known in ((official, True), ("mine.pth", False)):
        torch.save(model.state_dict(), tmp_path / name)
        config = TeacherConfig(spec="torchvision:squeezenet1_1", weights=str(tmp_path / name), num_classes=3)
        source = teacher_sources.build_source(config)
        assert (source.mean is not None) == known
        assert source.num_classes == (3 if known else None)


def test_download_failures_name_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import models

    def offline(*_: object, **__: object) -> nn.Module:
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr(models, "get_model", offline)
    with pytest.raises(ConnectionError, match="no route to host; without a network, download the file") as caught:
        load_teacher(TeacherConfig(spec="torchvision:resnet18"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("package", ["timm", "pytorchcv"])
def test_absent_packages_are_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    monkeypatch.setitem(__import__("sys").modules, f"{package}.model_provider", None)
    with pytest.raises(ValueError, match=f"{package} cannot be imported .*pip install {package}"):
        load_teacher(TeacherConfig(spec=f"{package}:resnet18", weights="random"))


def test_timm_random_teacher(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    teacher = load_teacher(TeacherConfig(spec="timm:resnet10t", weights="random", num_classes=6))
    assert (teacher.name, teacher.num_classes, len(teacher.mean)) == ("timm_resnet10t_random", 6, 3)
    with pytest.raises(ValueError, match=r"resnet1x.*did you mean"):
        load_teacher(TeacherConfig(spec="timm:resnet1x", weights="random"))
    torch.save(timm.create_model("resnet10t", num_classes=6).state_dict(), tmp_path / "mine.pth")
    config = TeacherConfig(spec="timm:resnet10t", weights=str(tmp_path / "mine.pth"), num_classes=6)
    source = teacher_sources.build_source(config)
    assert source.mean is None and source.name == "timm_resnet10t_mine"


def test_pytorchcv_random_teacher() -> None:
    pytest.importorskip("pytorchcv")
    spec = "pytorchcv:resnet20_cifar10"
    teacher = load_teacher(TeacherConfig(spec=spec, weights="random", mean=HALF, std=HALF))
    assert (teacher.num_classes, teacher.input_size) == (10, (3, 32, 32))
    with pytest.raises(ValueError, match=r"`teacher.mean` and `teacher.std` must be given"):
        load_teacher(TeacherConfig(spec=spec, weights="random"))
    with pytest.raises(ValueError, match="did you mean resnet20_cifar10"):
        load_teacher(TeacherConfig(spec="pytorchcv:resnet20_cifar1", weights="random", mean=HALF, std=HALF))


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_no_warning_about_weights_that_are_not_kept(name: str) -> None:
    teacher_sources.build_source(
        TeacherConfig(spec=f"torchvision:{name}", weights="random")
    )  # warnings are errors here


@pytest.mark.parametrize(
    ("spec", "num_classes", "message"),
    [
        (
            "timm:resnet18.a1_in1",
            None,
            r"weights of timm:resnet18 \(.*a1_in1k.*\), but got 'a1_in1'; did you mean a1_in1k",
        ),
        ("timm:resnet18.typo", None, r"weights of timm:resnet18 \(.*a1_in1k.*\), but got 'typo'"),
        (
            "timm:gluon_resnet18_v1b.typo",
            None,
            r"timm:gluon_resnet18_v1b.typo raised RuntimeError: Invalid pretrained tag",
        ),
        ("pytorchcv:resnet20_cifar10", 7, r"pytorchcv:resnet20_cifar10 raised AssertionError in .*: .*num_classes"),
    ],
)
def test_l_3_what_a_library_does_not_build_is_one_line(spec: str, num_classes: int | None, message: str) -> None:
    pytest.importorskip(spec.partition(":")[0])
    with pytest.raises(ValueError, match=message) as caught:
        load_teacher(TeacherConfig(spec=spec, weights="random", num_classes=num_classes, mean=HALF, std=HALF))
    assert "\n" not in str(caught.value)


def test_l_4_earlier_names_of_timm_have_the_weights_of_todays() -> None:
    timm = pytest.importorskip("timm")
    assert all(
        teacher_sources._timm_has_weights(timm, name)
        for name in ("swsl_resnet18", "ssl_resnet18", "gluon_resnet18_v1b", "resnet18.a1_in1k", "resnet18")
    )
    without = sorted(
        set(timm.list_models("resnet*")) - {n.partition(".")[0] for n in timm.list_models(pretrained=True)}
    )
    assert without and not teacher_sources._timm_has_weights(timm, without[0])
    with pytest.raises(ValueError, match=f"timm has no weights for '{without[0]}'"):
        load_teacher(TeacherConfig(spec=f"timm:{without[0]}"))
