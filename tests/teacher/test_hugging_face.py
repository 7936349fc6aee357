"""Networks of transformers, from folders that its ``save_pretrained`` wrote."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from synq.cli import run
from synq.config.identity import config_digest, make_absolute, map_spec_path
from synq.config.run import RunConfig, TeacherConfig
from synq.network.attention.locations import locate_attention
from synq.teacher.sources import build_source
from synq.teacher.teacher import load_teacher


@pytest.fixture(scope="module")
def hf() -> Any:
    """The package transformers."""
    return pytest.importorskip("transformers")


def vit_config(hf: Any) -> Any:
    """A ViT of two blocks for seven classes, images of 32 px."""
    return hf.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        num_labels=7,
    )


@pytest.fixture(scope="module")
def vit(hf: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A folder with the ViT and its image processor, and the ViT."""
    folder = tmp_path_factory.mktemp("hf") / "small_vit"
    torch.manual_seed(3)
    net = hf.ViTForImageClassification(vit_config(hf)).eval()
    net.save_pretrained(folder)
    hf.ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.25]
    ).save_pretrained(folder)
    return folder, net


def test_a_folder_is_the_network_that_was_saved(vit: tuple[Path, nn.Module]) -> None:
    folder, net = vit
    teacher = load_teacher(TeacherConfig(spec=f"hf:{folder}"))
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = net(images).logits
    # The graph multiplies queries and keys itself: its sums end in other last digits than the fused kernel's.
    assert torch.allclose(teacher.graph(images), expected, rtol=1e-4, atol=1e-6)
    assert len(locate_attention(teacher.graph)) == 2
    assert teacher.name == "hf_small_vit"
    assert (teacher.input_size, teacher.num_classes) == ((3, 32, 32), 7)
    assert (teacher.mean, teacher.std) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    assert teacher.preprocessing.resize_size == (32, 32) and teacher.preprocessing.crop_mode == "squash"


def test_one_given_mean_is_that_of_all_channels_of_the_network(vit: tuple[Path, nn.Module]) -> None:
    teacher = load_teacher(TeacherConfig(spec=f"hf:{vit[0]}", mean=(0.3,), std=(0.2,)))
    assert (teacher.mean, teacher.std) == ((0.3,) * 3, (0.2,) * 3)


@pytest.mark.parametrize("kind", ["ConvNext", "ResNet"])
def test_networks_of_other_kinds(hf: Any, kind: str, tmp_path: Path) -> None:
    sizes = {"hidden_sizes": [8, 12], "depths": [1, 1], "num_labels": 5}
    more = {"num_stages": 2} if kind == "ConvNext" else {"embedding_size": 8, "layer_type": "basic"}
    net = getattr(hf, f"{kind}ForImageClassification")(getattr(hf, f"{kind}Config")(**sizes, **more)).eval()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):  # as in a trained network
            part.running_mean.normal_(std=0.1), part.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    net.save_pretrained(tmp_path)
    config = TeacherConfig(spec=f"hf:{tmp_path}", input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
    teacher = load_teacher(config)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = net(images).logits
    assert torch.allclose(teacher.graph(images), expected, atol=1e-6) and teacher.num_classes == 5


def test_random_weights_are_those_of_no_file(vit: tuple[Path, nn.Module]) -> None:
    folder, net = vit
    config = TeacherConfig(spec=f"hf:{folder}", weights="random", num_classes=4)
    made = build_source(config).module.state_dict()
    again = build_source(config).module.state_dict()
    assert all(torch.equal(made[name], again[name]) for name in made)
    name = "vit.encoder.layer.0.attention.attention.query.weight"
    name = name if name in made else next(key for key in made if "0" in key and key.endswith("weight"))
    assert not torch.equal(made[name], net.state_dict()[name])
    assert made["classifier.weight"].shape == (4, 32)


def test_half_precision_is_widened(vit: tuple[Path, nn.Module], tmp_path: Path) -> None:
    _, net = vit
    half = type(net)(net.config)  # type: ignore[arg-type, call-arg]
    half.load_state_dict(net.state_dict())
    half.to(torch.bfloat16).save_pretrained(tmp_path)
    made = build_source(TeacherConfig(spec=f"hf:{tmp_path}")).module.state_dict()
    assert {tensor.dtype for tensor in made.values()} == {torch.float32}
    saved = half.state_dict()
    assert all(torch.equal(made[name], saved[name].float()) for name in saved)


def test_a_file_of_weights_goes_into_the_network_of_the_folder(vit: tuple[Path, nn.Module], tmp_path: Path) -> None:
    folder, net = vit
    changed = {name: tensor + 1 for name, tensor in net.state_dict().items()}
    torch.save(changed, tmp_path / "other.pth")
    made = build_source(TeacherConfig(spec=f"hf:{folder}", weights=str(tmp_path / "other.pth")))
    assert made.name == "hf_small_vit_other"
    assert all(torch.equal(tensor, changed[name]) for name, tensor in made.module.state_dict().items())


def test_without_its_processor_the_normalization_is_asked_for(vit: tuple[Path, nn.Module], tmp_path: Path) -> None:
    vit[1].save_pretrained(tmp_path)
    made = build_source(TeacherConfig(spec=f"hf:{tmp_path}"))
    assert (made.input_size, made.mean, made.std) == ((3, 32, 32), None, None)
    with pytest.raises(ValueError, match=r"`teacher\.mean` and `teacher\.std`"):
        load_teacher(TeacherConfig(spec=f"hf:{tmp_path}"))


def test_weights_that_the_files_lack_are_rejected(hf: Any, tmp_path: Path) -> None:
    hf.ViTModel(vit_config(hf)).save_pretrained(tmp_path)  # a body without a classifier
    with pytest.raises(
        ValueError, match=r"lacks 2 of ViTForImageClassification \(classifier\.bias, classifier\.weight"
    ):
        build_source(TeacherConfig(spec=f"hf:{tmp_path}"))


@pytest.mark.parametrize(
    "content", ["{}", '{"model_type": "bert"}', '{"model_type": ', None], ids=["empty", "text", "damaged", "missing"]
)
def test_what_is_no_classifier_is_one_line(
    hf: Any, content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert run(["inspect", f"hf:{tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert "must name a classifier of images that transformers loads" in error and error.count("\n") == 1
    assert len(error) < 600


def test_a_folder_without_its_source_is_recognized(
    vit: tuple[Path, nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", str(vit[0])]) == 2
    assert f"did you mean hf:{vit[0]}?" in capsys.readouterr().err


def test_a_folder_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "hf:./nowhere"]) == 2
    error = capsys.readouterr().err
    assert "must name an existing folder after hf:" in error and error.count("\n") == 1


def test_a_model_of_the_hub_without_a_network(
    hf: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert run(["inspect", "hf:microsoft/resnet-50", "--teacher.weights", "random"]) != 0
    error = capsys.readouterr().err
    assert "give the path of a folder that save_pretrained wrote, as hf:./FOLDER" in error and error.count("\n") == 1


def test_a_folder_may_move(in_tmp: Path) -> None:
    (in_tmp / "a").mkdir()
    near = RunConfig(teacher=TeacherConfig(spec="hf:a"))
    full = make_absolute(near)
    assert full.teacher.spec == f"hf:{in_tmp / 'a'}"
    moved = replace(near, teacher=TeacherConfig(spec="hf:/elsewhere/a"))
    assert config_digest(full) == config_digest(moved)
    assert map_spec_path("hf:microsoft/resnet-50", str.upper) == "hf:microsoft/resnet-50"
