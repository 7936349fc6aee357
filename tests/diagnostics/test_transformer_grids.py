"""What `synq inspect` says about the grids of a transformer."""

import pytest
from torch import nn

from support.token_nets import SIZE, TokenNet, spread
from synq.config.run import QuantConfig
from synq.diagnostics.transformer_grids import grids_line, transformer_grids
from synq.network.tracing import trace_classifier
from synq.quant.student import quantize_model


@pytest.mark.parametrize(
    ("quant", "line"),
    [
        (QuantConfig(), "5 LayerNorms as they are, 2 softmax asymmetric, 2 gelu asymmetric"),
        (
            QuantConfig(softmax="log", scale_shift=True),
            "5 LayerNorms one range for all channels (quant.scale_shift), 2 softmax logarithmic, 2 gelu asymmetric",
        ),
    ],
)
def test_each_kind_is_counted_with_its_grid(quant: QuantConfig, line: str) -> None:
    traced = trace_classifier(spread(TokenNet(depth=2)), SIZE)
    assert grids_line(transformer_grids(traced, quantize_model(traced, quant), quant)) == line


def test_a_network_of_convolutions_has_no_line() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(784, 5)).eval()
    traced = trace_classifier(net, SIZE)
    assert grids_line(transformer_grids(traced, quantize_model(traced, QuantConfig()), QuantConfig())) == ""
