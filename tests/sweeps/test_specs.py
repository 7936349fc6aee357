"""Every file of sweeps/specs reads and is what its folder says, with the folders that it names set to any."""

import tomllib
from pathlib import Path

import pytest

from synq.config.run import RunConfig, config_from_dict, load_config, make_absolute
from synq.sweeps.spec import run_config
from synq.sweeps.spec_file import load_spec
from synq.sweeps.studies.ablation import load_ablation, plan
from synq.sweeps.studies.recipes import load_recipe
from synq.sweeps.studies.recipes import plan as plan_recipe

SPECS = Path(__file__).resolve().parents[2] / "sweeps" / "specs"
FOLDERS = ("", "runs", "ablations", "recipes")


def _files(folder: str) -> list[Path]:
    return sorted((SPECS / folder).glob("*.toml"))


@pytest.fixture(autouse=True)
def _folders(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SYNQ_DATA_DIR", "IMAGENET_DIR"):
        monkeypatch.setenv(name, f"/data/{name.lower()}")


def test_no_file_is_left_out() -> None:
    assert sorted(SPECS.rglob("*.*")) == sorted(file for folder in FOLDERS for file in _files(folder))
    assert all(_files(folder) for folder in FOLDERS)


@pytest.mark.parametrize("path", _files(""), ids=lambda path: path.stem)
def test_sweeps(path: Path) -> None:
    spec = load_spec(path)
    assert path.stem == spec.search.name and spec.groups and spec.dimensions
    for group in spec.groups:
        config = run_config(spec, group, {})
        assert config.teacher.spec.startswith("bundled:") or config.evaluation.dataset not in (None, "none")
        assert "$" not in f"{config.teacher.spec} {config.teacher.weights} {config.evaluation.dataset}"


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_sweeps_on_imagenet_have_the_normalisation_of_their_weights(name: str) -> None:
    from torchvision.models import get_model_weights

    spec = load_spec(SPECS / f"imagenet_{name}.toml")
    assert [group.key for group in spec.groups] == [f"{name}-W4A4", f"{name}-W3A3"]
    teacher, synthesis = spec.groups[0].base.teacher, spec.groups[0].base.synthesis
    transforms = get_model_weights(name)[teacher.weights or ""].transforms()
    assert (list(teacher.mean or ()), list(teacher.std or ())) == (transforms.mean, transforms.std)
    assert teacher.input_size == (3, transforms.crop_size[0], transforms.crop_size[0])
    assert spec.groups[0].base.evaluation.dataset == "imagefolder:/data/imagenet_dir/val"
    assert (synthesis.num_images, synthesis.shard_size) == (5120, 128)
    assert 16 <= spec.groups[0].base.finetune.batch_size <= 64
    assert "Not run" in (SPECS / f"imagenet_{name}.toml").read_text(), "until somebody has"


@pytest.mark.parametrize("path", _files("runs"), ids=lambda path: path.stem)
def test_single_runs(path: Path) -> None:
    config = make_absolute(config_from_dict(RunConfig, load_config(path)))
    brings_its_own = config.teacher.spec.startswith("synq.diagnostics.example_networks:")
    weights = None if brings_its_own else f"/data/synq_data_dir/{path.stem}.safetensors"
    assert config.name == path.stem and config.teacher.weights == weights


@pytest.mark.parametrize("path", _files("ablations"), ids=lambda path: path.stem)
def test_ablations(path: Path) -> None:
    spec = load_ablation(path)
    runs = plan(make_absolute(spec.base), spec.bits, spec.seeds, spec.rows)
    assert spec.name == f"ablation_{path.stem}" and len(spec.seeds) == 3 and len(runs) == 3 * 9 * len(spec.bits)


def test_the_ablation_of_the_real_network_is_the_single_run_at_its_budget() -> None:
    (run,) = (path for path in _files("runs") if path.stem == "cifar10_resnet20")
    base = load_ablation(SPECS / "ablations" / "cifar10_resnet20.toml").base
    single = config_from_dict(RunConfig, load_config(run))
    assert make_absolute(base).teacher == make_absolute(single).teacher
    assert make_absolute(base).evaluation == make_absolute(single).evaluation
    assert base.finetune == RunConfig().finetune
    assert (base.synthesis.num_images, base.synthesis.iterations) == (1024, 100)


@pytest.mark.parametrize("path", _files("recipes"), ids=lambda path: path.stem)
def test_recipes(path: Path) -> None:
    recipe = load_recipe(path)
    runs = plan_recipe(make_absolute(recipe.base()), recipe.seeds, None, recipe.real_images)
    assert recipe.name == path.stem and path.stem.endswith(f"_{recipe.bits.lower()}") and len(runs) >= 3
    assert "teacher" in tomllib.loads(path.read_text())


def test_a_group_of_a_hugging_face_folder_is_named_by_the_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it is: the files of a sweep may be moved, and a long path is no name."""
    deep = tmp_path / "deep" / "vit"
    deep.mkdir(parents=True)
    file = tmp_path / "spec.toml"
    file.write_text(
        f"bits = ['W4A4']\nmodels = ['hf:./deep/vit', {{spec = 'hf:{deep}', name = 'other'}}, 'hf:a/b-1']\n"
    )
    monkeypatch.chdir(tmp_path)
    groups = load_spec(file).groups
    assert [group.key for group in groups] == ["hf_vit-W4A4", "other-W4A4", "hf_a_b_1-W4A4"]
    assert [group.base.teacher.spec for group in groups] == [f"hf:{deep}", f"hf:{deep}", "hf:a/b-1"]
