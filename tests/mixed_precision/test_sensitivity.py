"""The scan of single tensors."""

import pytest
import torch
from torch import Tensor, fx

from support.small_nets import NETS, images, rounded, trained
from synq.evaluation.fidelity import kl, sqnr_db
from synq.mixed_precision.sensitivity import scan_quantizers
from synq.network.logits import logits_of
from synq.quant.layers import quantizers_bypassed

Scanned = tuple[fx.GraphModule, fx.GraphModule, Tensor, Tensor]


@pytest.fixture(scope="module")
def scanned() -> Scanned:
    """Teacher, 4-bit student, images and the teacher's logits."""
    teacher = trained(NETS["residual"][0]())
    batch = images(16)
    return teacher, rounded(teacher, 4, batch).net, batch, logits_of(teacher, batch)


def test_every_quantizer_of_a_student_has_its_line(scanned: Scanned) -> None:
    _, net, batch, reference = scanned
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    scores = scan_quantizers(net, batch, reference)
    assert [(s.name, s.role, s.bits) for s in scores if s.role == "weight"] == [
        (name, "weight", 4) for name in ("conv1", "conv2", "conv3", "fc")
    ]
    assert [s.name for s in scores if s.role == "activation"] == ["relu", "relu_1", "relu_2"]
    assert all(s.sqnr_db < 60 for s in scores), "each does something"
    few = scan_quantizers(net, batch, reference, roles=["activation"], batch_size=5)
    assert [(s.name, s.role) for s in few] == [(s.name, s.role) for s in scores if s.role == "activation"]
    assert [s.kl for s in few] == pytest.approx([s.kl for s in scores if s.role == "activation"], rel=1e-3)
    for score in scores:  # the same as a whole pass with all other rounding switched off
        name = score.name if score.role == "weight" else f"act_quantizers.{score.name}"
        module = net.get_submodule(name)
        with quantizers_bypassed(net), torch.no_grad():
            getattr(module, "weight_quantizer", module).enabled = True
            found = net(batch)
        assert score.sqnr_db == sqnr_db(reference, found)
        assert score.kl == float(kl(reference, found).mean())
    after = net.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[name], state[name]) for name in state)


def test_more_bits_cost_less_fidelity(scanned: Scanned) -> None:
    teacher, _, batch, reference = scanned
    losses: dict[tuple[str, str], list[float]] = {}
    for bits in (2, 4, 8):
        for score in scan_quantizers(rounded(teacher, bits, batch).net, batch, reference):
            losses.setdefault((score.role, score.name), []).append(score.kl)
    assert len(losses) == 7 and all(found == sorted(found, reverse=True) for found in losses.values())
