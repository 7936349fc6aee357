"""Settings that concern attention alone, where a network has none: one notice names them."""

import pytest
from torch import nn

from support.token_nets import SIZE, Separate, TokenNet, spread
from synq.common.notices import forget_notices
from synq.config.run import RunConfig, with_overrides
from synq.finetune.attention_settings import attention_note
from synq.network.tracing import trace_classifier
from synq.pipeline import check

ALL = {
    "synthesis.prior_weight": 0.1,
    "synthesis.head_weight": 0.1,
    "finetune.attention_weight": 1.0,
    "quant.softmax": "log",
}


def note(net: nn.Module, settings: dict[str, object]) -> str:
    return attention_note(with_overrides(RunConfig(), settings), trace_classifier(net.eval(), SIZE), "net")


def test_all_are_named_for_a_network_without_attention(tiny_classifier: nn.Module) -> None:
    named = " and ".join(f"`{name}`" for name in ALL)
    assert note(tiny_classifier, ALL) == f"note: {named} do nothing for net, which has no attention"
    engine = {"quant.target": "onnxruntime", "quant.float_attention": True}
    assert note(tiny_classifier, engine) == "note: `quant.float_attention` does nothing for net, which has no attention"


def test_nothing_is_said_where_they_are_off_or_there_is_attention(tiny_classifier: nn.Module) -> None:
    assert note(tiny_classifier, {"synthesis.prior_weight": 0.0, "synthesis.head_weight": 0.0}) == ""
    assert note(spread(TokenNet()), ALL) == ""


def test_attention_that_a_setting_does_not_concern_is_named() -> None:
    class OneHead(Separate):
        def __init__(self, width: int, heads: int) -> None:
            super().__init__(width, 1)

    found = note(spread(TokenNet(OneHead)), ALL)
    assert found == "note: `synthesis.head_weight` does nothing for net, which has no attention of several heads"

    class Half(TokenNet):
        """One attention, then another over an odd part of the positions, which are no map."""

        def forward(self, x):  # type: ignore[no-untyped-def]
            x = self.blocks[0](self.patch(x).flatten(2).transpose(1, 2))
            return self.head(self.norm(self.blocks[1](x[:, :7])).mean(1))

    found = note(spread(Half(token=False, depth=2)), ALL)
    reason = "no attention of all positions of an image in its deeper half"
    assert found == f"note: `synthesis.prior_weight` does nothing for net, which has {reason}"


def test_a_run_says_so_once(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    forget_notices()
    changed = with_overrides(config, {"synthesis.prior_weight": 0.1})
    for _ in range(2):
        check(changed)
    lines = [line for line in capsys.readouterr().err.splitlines() if "prior_weight" in line]
    assert len(lines) == 1 and lines[0].startswith("synq: note: `synthesis.prior_weight` does nothing for ")
