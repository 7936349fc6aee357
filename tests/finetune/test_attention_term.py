"""The structural similarity of attention: by hand, in fine-tuning, in windows, and without attention."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from support.token_nets import SIZE, TokenNet, spread
from synq.config.run import FinetuneConfig, RunConfig, config_digest, with_overrides
from synq.finetune.loop import finetune
from synq.finetune.networks import prepare_networks
from synq.finetune.responses import TappedNetwork, teacher_response
from synq.finetune.training_loss import harder_images, training_loss
from synq.losses import STRUCTURE_C, attention_loss
from synq.network.attention.image_axis import ImageAxis
from synq.network.attention.locations import AttentionNodes
from synq.network.cam_site import locate_cam
from synq.network.tracing import trace_classifier
from synq.quant.student import quantize_model
from synq.teacher.pixel_range import PixelRange


def images(count: int) -> Tensor:
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(1))


def test_similarity_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = []
    for s, t in zip(student, teacher, strict=True):
        values = []
        for head in range(3):
            for channel in range(4):
                a, b = s[head, :, channel], t[head, :, channel]
                covariance = ((a - a.mean()) * (b - b.mean())).mean()
                variances = a.var(correction=0) + b.var(correction=0)
                values.append(1 - (2 * covariance + STRUCTURE_C) / (variances + STRUCTURE_C))
        expected.append(torch.stack(values).mean())
    torch.testing.assert_close(attention_loss([student], [teacher]), torch.stack(expected))
    same = attention_loss([student + 3.0, student], [student, student])
    torch.testing.assert_close(same, torch.zeros(2).double(), rtol=0, atol=1e-12)
    assert bool((attention_loss([-student], [student]) > 1.9).all())
    with pytest.raises(ValueError, match="as many attentions of the student as of the teacher"):
        attention_loss([], [teacher])


def networks(net: TokenNet, tmp_path: Path, **settings: Any) -> tuple[TappedNetwork, TappedNetwork]:
    traced = trace_classifier(spread(net), SIZE)
    config = with_overrides(RunConfig(), {"quant.weight_bits": 3, "quant.act_bits": 4, **settings})
    low, high = torch.full((1, 3, 1, 1), -9.0), torch.full((1, 3, 1, 1), 9.0)
    cam = locate_cam(traced)
    teacher: Any = SimpleNamespace(graph=traced, cam=cam, input_size=SIZE, pixel_range=lambda: PixelRange(low, high))
    student = quantize_model(traced, config.quant, cam_node=cam.node)
    found = prepare_networks(
        config, teacher, student, images(16), Accelerator(cpu=True), prepared=tmp_path / "none.pt", identity=""
    )
    return found[1], found[0]


@pytest.mark.parametrize("token", [True, False])
def test_fine_tuning_brings_attention_nearer(tmp_path: Path, token: bool) -> None:
    student, teacher = networks(TokenNet(token=token, depth=2), tmp_path, **{"finetune.attention_weight": 1.0})
    heads = teacher_response(teacher, images(4), torch.zeros(4, dtype=torch.int64)).heads
    assert [tuple(h.shape) for h in heads] == [(4, 2, 16, 12)] * 2
    settings = FinetuneConfig(
        epochs=6, batch_size=8, optimizer="adam", lr=3e-3, kd_weight=0, ce_weight=0, cam_weight=0, attention_weight=1.0
    )
    labels = torch.arange(16) % 5
    history = finetune(student, teacher, images(16), labels, settings, accelerator=Accelerator(cpu=True), seed=0)
    assert 0 < history[-1]["attention"] < 0.8 * history[0]["attention"]
    assert history[-1]["loss"] == pytest.approx(history[-1]["attention"], rel=1e-6)


def test_harder_images_in_the_same_pass_change_no_other_term(tmp_path: Path) -> None:
    """Also where maps need a backward pass, as with a class token: no logit depends on a part of the feature map."""
    student, teacher = networks(TokenNet(token=True), tmp_path, **{"finetune.attention_weight": 1.0})
    assert student.differentiates
    x, labels = images(4), torch.arange(4)
    settings = FinetuneConfig(cam_weight=1.0, attention_weight=1.0, perturb_weight=0.5)
    target = teacher_response(teacher, x, labels)
    _, wanted = training_loss(student.net, student, target, x, labels, settings)
    harder = harder_images(student, teacher, x, labels, 0.1)
    loss, terms = training_loss(student.net, student, target, x, labels, settings, harder)
    assert {*terms} - {*wanted} == {"perturbed"} and wanted["cam"] > 0
    for name, value in wanted.items():
        torch.testing.assert_close(terms[name], value)
    loss.backward()


def test_without_the_weight_attention_is_not_tapped(tmp_path: Path) -> None:
    student, teacher = networks(TokenNet(), tmp_path)
    assert student.attentions == teacher.attentions == ()
    with torch.no_grad():
        assert len(teacher.net(images(2))) == 2


def test_windows_of_an_image_are_heads_of_one_row() -> None:
    logits, features = torch.zeros(2, 5), torch.zeros(2, 3, 4, 4)
    windows = torch.arange(2 * 4 * 3 * 6 * 2.0).reshape(8, 3, 6, 2)  # 2 images of 4 windows
    site = SimpleNamespace(differentiates=lambda method: False)
    nodes = {"scores": "", "factors": (), "probabilities": "", "gathered": "", "heads": 3, "tokens": 6, "windows": 4}
    place = ImageAxis(axis=0, inner=4, heads_axis=1)
    attentions = tuple(AttentionNodes(**nodes, extra=extra, images=place) for extra in (0, 2))  # type: ignore[arg-type]
    network = TappedNetwork(net=None, cam_site=site, with_cam=False, attentions=attentions)  # type: ignore[arg-type]
    block = torch.ones(2, 1)
    response = network.response((logits, features, block, windows, windows), torch.zeros(2, dtype=torch.int64))
    assert response.blocks == (block,)
    assert [tuple(h.shape) for h in response.heads] == [(2, 12, 6, 2), (2, 12, 4, 2)]
    assert torch.equal(response.heads[0][1, 3:6], windows[5])
    rebuilt = response.rebuilt(list(response.tensors()))
    assert len(rebuilt.blocks) == 1 and len(rebuilt.heads) == 2 and rebuilt.cam is None


def test_digests_without_the_term_stay() -> None:
    plain = RunConfig()
    assert config_digest(plain) == "c6fd6bb4c38d875a"
    on = replace(plain, finetune=replace(plain.finetune, attention_weight=1.0))
    assert config_digest(on) != config_digest(plain)
