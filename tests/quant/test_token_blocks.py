"""Learned rounding of transformers: the axis of the channels, the positions that are read, and lower errors."""

import pytest
import torch
from torch import Tensor, nn

from support.adaround_tools import CPU, QUICK
from support.token_nets import SIZE, TokenNet, spread
from synq.config.run import QuantConfig
from synq.network.attention.token_map import slopes
from synq.network.blocks import block_ends
from synq.network.tracing import trace_classifier
from synq.quant.adaround import reconstruct
from synq.quant.student import observe_ranges, quantize_model
from synq.quant.transformer.block_metric import BlockMetric, block_metrics


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *SIZE, generator=torch.Generator().manual_seed(seed))


def test_distances_by_hand() -> None:
    maps = torch.zeros(2, 3, 2, 2)
    maps[0, :, 0, 0] = 2.0  # three channels of one of eight positions
    assert float(BlockMetric()(maps, torch.zeros_like(maps))) == 12 / 8
    tokens = torch.zeros(2, 5, 3)
    tokens[1, 4], tokens[1, 0, 0] = 2.0, 1.0
    assert float(BlockMetric(channel_axis=-1)(tokens, torch.zeros_like(tokens))) == pytest.approx(13 / 10)
    first = torch.tensor([True, False, False, False, False])
    assert float(BlockMetric(channel_axis=-1, is_read=first)(tokens, torch.zeros_like(tokens))) == 1 / 2


def test_behind_the_last_attention_only_the_class_token_is_read() -> None:
    for token in (True, False):
        traced = trace_classifier(spread(TokenNet(depth=2, token=token)), SIZE)
        ends = block_ends(traced)
        shapes = [end.meta["shape"] for end in ends]
        assert shapes == [(2, 16 + token, 24)] * 5 + [(2, 5)]
        metrics = block_metrics(traced, ends)
        assert [metric.channel_axis for metric in metrics] == [-1] * 5 + [1]
        counts = [17 if m.is_read is None else int(m.is_read.sum()) for m in metrics[:5]]
        assert counts == ([17, 17, 17, 1, 1] if token else [17] * 5)
        if token:
            assert all(bool(m.is_read[0]) for m in metrics[3:5] if m.is_read is not None)


class Largest(TokenNet):
    """A vision transformer that reads the largest value of each channel, which is at other positions in each image."""

    def __init__(self) -> None:
        super().__init__(token=False, width=6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x + self.positions)).amax(1))


def test_positions_that_are_chosen_by_their_values_all_count() -> None:
    traced = trace_classifier(spread(Largest()), SIZE)
    ends = block_ends(traced)
    slope = slopes(traced, [ends[2]])[ends[2]]
    assert ends[2].meta["shape"] == (2, 16, 6) and not bool((slope != 0).any(-1).any(0).all()), "some in no image"
    assert all(metric.is_read is None for metric in block_metrics(traced, ends))


class Squares(nn.Module):
    """Tokens of two axes, which a LayerNorm reads directly or behind a reshape, as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8), nn.LayerNorm(8)
        self.fc1, self.fc2, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        x = x + self.fc1(self.first(x))
        y = x.reshape(len(x), -1, 8)
        return self.head((y + self.fc2(self.second(y))).mean(1))


def test_tokens_of_two_axes_have_the_channels_last() -> None:
    traced = trace_classifier(spread(Squares()), SIZE)
    ends = block_ends(traced)
    axes = [metric.channel_axis for metric in block_metrics(traced, ends)]
    found = [(*end.meta["shape"][1:], axis) for end, axis in zip(ends, axes, strict=True)]
    assert found == [(4, 4, 8, -1), (4, 4, 8, -1), (8, 1), (5, 1)]


def test_feature_maps_have_the_channels_first() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(576, 5))
    traced = trace_classifier(net.eval(), SIZE)
    assert all(m.channel_axis == 1 and m.is_read is None for m in block_metrics(traced, block_ends(traced)))


def test_blocks_come_nearer() -> None:
    traced = trace_classifier(spread(TokenNet()), SIZE)
    quant = QuantConfig(weight_bits=3, act_bits=8, rounding="adaround")
    student = quantize_model(traced, quant)
    observe_ranges(student.net, images(64), act_range="mse")
    report = reconstruct(student.net, traced, images(64), QUICK, seed=0, device=CPU)
    *first, last = report.blocks
    assert all(block.kept for block in first) and last.error_after < 1.2 * last.error_before, (
        "few steps: the last varies"
    )
    before, after = ([getattr(block, name) for block in report.blocks] for name in ("error_before", "error_after"))
    assert after[1] < 0.9 * before[1] and after[2] < 0.9 * before[2]
