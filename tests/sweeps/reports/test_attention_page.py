"""Attention on the page of a run: maps of the teacher and its students, and the similarity of tokens."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from support.token_nets import SIZE, Joined, TokenNet, spread
from synq.config.run import RunConfig, with_overrides
from synq.diagnostics.attention_maps import attention_of, shown_attention, token_similarities
from synq.diagnostics.probe import probe_run
from synq.network.tracing import trace_classifier
from synq.pipeline import run
from synq.runs.record import run_folder
from synq.sweeps.reports.image_figures import attention_figures
from synq.sweeps.reports.page import Figure, Gap
from synq.synthesis.attention_prior import AttentionPrior


class Windows(nn.Module):
    """Attention of one head inside four windows of 4 x 4 positions, in rows or on an axis, then the mean over all."""

    def __init__(self, *, in_rows: bool) -> None:
        super().__init__()
        self.in_rows = in_rows
        self.stem, self.qkv, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 24), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        tokens = self.stem(x).reshape(n, 8, 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1).reshape(n, 4, 1, 16, 8)
        tokens = tokens.reshape(n * 4, 16, 8) if self.in_rows else tokens
        q, k, v = self.qkv(tokens).chunk(3, -1)
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.head(mixed.reshape(n, 64, 8).mean(1))


@pytest.mark.parametrize("extra", [0, 1])
def test_the_map_is_what_the_positions_get(extra: int) -> None:
    net = spread(TokenNet(token=bool(extra), depth=2))
    traced = trace_classifier(net, SIZE)
    shown = shown_attention(traced)
    assert shown is not None and shown.nodes.extra == extra and shown.depth == 1
    images = torch.randn(3, *SIZE)
    maps = attention_of({"teacher": (traced, shown.nodes.probabilities)}, shown, images)["teacher"]
    assert maps.shape == (3, *shown.grid) and (maps > 0).all()
    captured: list[Tensor] = []
    attention = net.blocks[-1].attention
    assert isinstance(attention, Joined)
    attention.qkv.register_forward_hook(lambda module, args, output: captured.append(output))
    net(images)
    n, t, width = captured[0].shape
    q, k, _ = captured[0].reshape(n, t, 3, attention.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    found = (q @ k.transpose(-1, -2) / (width / 3 / attention.heads) ** 0.5).softmax(-1)
    wanted = (found[..., 0, 1:] if extra else found.mean(-2)).mean(1)
    assert np.allclose(maps.reshape(3, -1), wanted.detach().numpy(), atol=1e-6)


@pytest.mark.parametrize("in_rows", [True, False])
def test_windows_have_no_map_of_the_image_but_similarities(in_rows: bool) -> None:
    traced = trace_classifier(Windows(in_rows=in_rows).eval(), SIZE)
    assert AttentionPrior(traced, torch.Generator()).names == []
    with pytest.raises(ValueError, match="in windows"):
        shown_attention(traced)
    shares = token_similarities(traced, torch.randn(4, *SIZE))
    assert shares.shape == (50,) and shares.sum() == pytest.approx(1) and (shares >= 0).all()


def test_equal_tokens_are_wholly_similar_and_no_attention_is_none() -> None:
    net = spread(TokenNet(token=False))
    nn.init.zeros_(net.positions)
    shares = token_similarities(trace_classifier(net, SIZE), torch.full((2, *SIZE), 0.5))
    assert shares[-1] == pytest.approx(1)
    assert shown_attention(trace_classifier(nn.Sequential(nn.Flatten(), nn.Linear(768, 4)).eval(), SIZE)) is None


@pytest.mark.slow
def test_the_page_of_a_transformer_shows_its_attention(tmp_path: Path, tiny_settings: dict[str, object]) -> None:
    changes = {"runtime.output_dir": str(tmp_path), "teacher.spec": "bundled:digits_vit"}
    config = with_overrides(RunConfig(), {**tiny_settings, **changes})
    run(config)
    probe = probe_run(run_folder(config))
    attention = probe.attention
    assert attention is not None and not isinstance(attention, str) and not isinstance(attention.maps, str)
    assert list(attention.maps.maps) == ["teacher", "rounded to nearest", "student"]
    teacher, rounded = (attention.maps.maps[name] for name in ("teacher", "rounded to nearest"))
    assert teacher.shape == rounded.shape and not np.array_equal(teacher, rounded)
    assert {"synthetic", "Gaussian noise"} <= attention.similarities.keys()
    figures = attention_figures(attention)
    assert [figure.name for figure in figures if isinstance(figure, Figure)] == ["attention", "token-similarity"]
    assert attention_figures(None) == [] and isinstance(attention_figures("reason")[0], Gap)
