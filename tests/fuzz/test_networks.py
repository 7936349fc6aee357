"""Random small classifiers: what the product computes from one is what PyTorch computes, or it says truly why not.

Some dozens run with the quick tests. Many thousands: `python -m pytest -m fuzz tests/fuzz/test_networks.py`, with the
variables SYNQ_FUZZ_COUNT (networks), SYNQ_FUZZ_EXPORTS (networks that are exported too), SYNQ_FUZZ_SEED (the first) and
SYNQ_FUZZ_SHARDS (tests among which `-n` can share them); `networks_run.py` does the same without pytest.
"""

import os

import pytest
import torch

from fuzz.networks import MAX_VALUES, Network, draft
from fuzz.networks_checks import Outcome, check_network, equal
from fuzz.networks_rejections import DifferenceError, checked_rejection
from fuzz.networks_run import fault_of, run, shortened

COUNT, EXPORTS = int(os.environ.get("SYNQ_FUZZ_COUNT", "1000")), int(os.environ.get("SYNQ_FUZZ_EXPORTS", "100"))
SEED, SHARDS = int(os.environ.get("SYNQ_FUZZ_SEED", "0")), int(os.environ.get("SYNQ_FUZZ_SHARDS", "2"))
QUICK = 20
"""Networks of the quick test."""
PAST: dict[int, str] = {
    506: "equalization took a linear layer over the width for the producer of as many channels",
    1130: "x.data.mul_(0.5) cut the gradient of the layers before it",
    20000: "torch.hstack was exported to an invalid ONNX file (only seen with exports)",
}
"""Seeds of networks that once showed a fault, and which. A change of the grammar changes them, so each fault has a test
of its own, too."""


def test_random_networks_compute_what_pytorch_computes() -> None:
    report = run(range(QUICK))
    assert not report.faults, "\n\n".join(report.faults)
    assert report.accepted >= QUICK * 0.6, report.rejections


def test_networks_of_past_faults() -> None:
    report = run(PAST)
    assert not report.faults, "\n\n".join(report.faults)


@pytest.mark.slow
def test_a_random_network_in_every_format() -> None:
    pytest.importorskip("onnxruntime")
    report = run([2], exports=True)
    assert not report.faults, "\n\n".join(report.faults)
    assert report.exports >= 3, report.rejections


@pytest.mark.fuzz
@pytest.mark.timeout(0)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_many_networks(shard: int) -> None:
    report = run(range(SEED + shard, SEED + COUNT, SHARDS))
    print(report)
    assert not report.faults, "\n\n".join(report.faults)


@pytest.mark.fuzz
@pytest.mark.timeout(0)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_many_networks_in_every_format(shard: int) -> None:
    pytest.importorskip("onnxruntime")
    report = run(range(SEED + shard, SEED + EXPORTS, SHARDS), exports=True)
    print(report)
    assert not report.faults, "\n\n".join(report.faults)


def test_a_seed_is_one_network() -> None:
    first, again, other = draft(11), draft(11), draft(12)
    assert first == again
    assert first.source != other.source
    images = torch.randn(2, *first.size)
    equal(first.build()(images), again.build()(images), "one seed twice")


def test_pieces_that_are_left_out_leave_the_others_as_they_are() -> None:
    whole = next(network for network in map(draft, range(50)) if len(network.pieces) >= 6)
    shorter = draft(whole.seed, {2, 3})
    assert shorter.pieces[:2] == whole.pieces[:2]
    assert len(shorter.source) < len(whole.source)


def test_networks_are_small_and_of_many_kinds() -> None:
    networks = [draft(seed) for seed in range(60)]
    assert len({piece for network in networks for piece in network.pieces}) > 25
    assert {network.size[0] for network in networks} == {1, 3, 4}
    for network in networks[:10]:
        assert 2 <= network.build()(torch.zeros(2, *network.size)).shape[1] <= 64 <= MAX_VALUES


def _faulty(body: str, **fields: object) -> Network:
    source = f"""
import torch
import torch.nn.functional as F
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)))
        {body}
        return self.fc(x.mean((2, 3)))

def make():
    torch.manual_seed(0)
    return Net().eval()
"""
    values: dict[str, object] = {"seed": 0, "size": (3, 8, 8), "source": source, "pieces": (), "rejectable": ()}
    return Network(**{**values, **fields})  # type: ignore[arg-type]


def test_a_network_without_a_fault_has_none() -> None:
    assert fault_of(_faulty("x = x * 2"), exports=False) is None


def test_a_difference_of_the_last_digits_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from synq.network import tracing

    plain = tracing.trace_classifier

    def wrong(module: torch.nn.Module, size: tuple[int, int, int]) -> torch.fx.GraphModule:
        traced = plain(module, size)
        with torch.no_grad():
            next(traced.parameters()).mul_(1 + 2e-6)
        return traced

    monkeypatch.setattr("synq.teacher.teacher.trace_classifier", wrong)
    with pytest.raises(DifferenceError, match="traced network, module"):
        check_network(_faulty("x = x * 2"))


def test_a_wrong_code_of_the_integer_form_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from synq.quant.integer_layers import IntegerActivation

    plain = IntegerActivation.forward

    def wrong(self: IntegerActivation, x: torch.Tensor) -> torch.Tensor:
        codes = plain(self, x).clone()
        codes.view(-1)[3] += 1
        return codes

    monkeypatch.setattr(IntegerActivation, "forward", wrong)
    with pytest.raises(DifferenceError, match="codes of"):
        check_network(_faulty("x = x * 2"))


@pytest.mark.parametrize(
    ("reason", "complaint"),
    [
        ("first line\nsecond line", "not one clear line"),
        ("node 'cumsum' is cumsum: its tensors would stay float", "names cumsum"),
        ("Remove control flow that depends on tensor values", "not true"),
        ("something that no piece allows", "must be accepted"),
    ],
)
def test_a_reason_that_is_not_true_is_a_fault(reason: str, complaint: str) -> None:
    network = _faulty("x = x * 2")
    with pytest.raises(DifferenceError, match=complaint):
        checked_rejection(network, network.build(), ValueError(reason))


def test_a_reason_that_is_true_is_none() -> None:
    network = _faulty("x = x.cumsum(2)", rejectable=("quantization is known",))
    reason = "operations whose quantization is known, but node 'cumsum' is cumsum"
    assert checked_rejection(network, network.build(), ValueError(reason)) == reason


def test_a_failing_network_is_made_short(monkeypatch: pytest.MonkeyPatch) -> None:
    seed = next(s for s in range(200) if "max_pool" in draft(s).pieces and len(draft(s).pieces) >= 5)

    def check(network: Network, *, exports: bool = False) -> Outcome:
        if "max_pool" in network.pieces:
            raise DifferenceError("pool: wrong")
        return Outcome()

    monkeypatch.setattr("fuzz.networks_run.check_network", check)
    short = shortened(seed, str(fault_of(draft(seed), exports=False)), exports=False)
    assert set(short.pieces[:-1]) == {"max_pool"} or short.pieces[1:-1] == ("max_pool",)
