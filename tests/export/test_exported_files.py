"""A file is written only if it has the student's logits, up to the difference of the simulation."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from synq.export.files import Checker, ExportRejectedError, export_onnx, export_program
from synq.export.onnx_graph import onnx_graph
from synq.export.verify import Tolerance
from synq.quant.integer_form import integer_form
from synq.runs.finished import open_run


class NoLabels:
    """A measurement without labeled images, for a `Checker`."""

    labeled, reported = None, torch.arange(0)


@pytest.mark.slow
def test_a_file_with_other_logits_is_rejected_and_not_written(finished: Path, tmp_path: Path) -> None:
    run = open_run(finished)
    teacher, student = run.teacher, run.student
    form = integer_form(student.net, operations="onnx")
    layer = form.get_submodule("linear.integer_weight")
    layer.codes.copy_(-layer.codes.clamp(min=-7))  # type: ignore[union-attr, operator]
    images = torch.randn(40, 1, 16, 16)

    check = Checker(integer_form(student.net), student.net, {"synthetic": images}, NoLabels(), Tolerance())  # type: ignore[arg-type]
    with pytest.raises(
        ExportRejectedError, match=r"model\.onnx was not written: it predicts another class than the student"
    ):
        export_onnx(tmp_path / "model.onnx", "int8", onnx_graph(form, teacher.input_size), check)
    assert list(tmp_path.iterdir()) == []


class Shifted(nn.Module):
    """Gives what it is given, two logits, the second one larger by 0.5."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tensor([0.0, 0.5])


@pytest.mark.parametrize("unsure", [5, 50])
def test_no_file_is_held_to_more_than_the_simulation(unsure: int) -> None:
    images = torch.tensor([[0.3, 0.0], [9.0, 0.0]]).repeat_interleave(torch.tensor([unsure, 100 - unsure]), dim=0)
    check = Checker(nn.Identity(), Shifted(), {"synthetic": images}, NoLabels(), Tolerance())  # type: ignore[arg-type]
    moved = torch.tensor([0.0, 0.4])
    if unsure > 10:
        with pytest.raises(
            ExportRejectedError, match=r"cannot be verified: with float sums the student .* 50 of 100 synthetic"
        ):
            check("file", lambda x: x + moved)
        return
    (found,) = check("file", lambda x: x + moved)
    (own,) = check.simulation.values()
    assert (found.differing, own.differing, own.max_difference) == (5, 5, 0.5)
    wrong = (
        r"100 of 100 synthetic images \(0.00 % agree, but at least 99.9 % must; with float sums the student "
        r"differs for 5\)"
    )
    with pytest.raises(ExportRejectedError, match=wrong):
        check("file", lambda x: x + 25 * moved)


def test_l_1_a_file_of_an_exact_student_is_held_to_the_last_bit() -> None:
    images = torch.tensor([[9.0, 0.0], [8.0, 0.0]])
    parts = (nn.Identity(), Shifted(), {"synthetic": images}, NoLabels(), Tolerance(agreement=0, mean_difference=9))
    check = Checker(*parts, exact=True)  # type: ignore[arg-type]
    (found,) = check("file", lambda x: x.clone())
    assert found.identical == 2
    with pytest.raises(ExportRejectedError, match=r"file was not written: its logits differ .* for 2 of 2 synthetic"):
        check("file", lambda x: x + 1e-6)
    check("file", lambda x: x + 1e-6, divides=False)
    Checker(*parts)("file", lambda x: x + 1e-6)  # type: ignore[arg-type]


class OneBatch(nn.Module):
    """Computes for a batch of two only."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1)


def test_bugs_10_a_network_without_a_program_is_rejected_in_one_line(tmp_path: Path) -> None:
    check = Checker(OneBatch(), OneBatch(), {"synthetic": torch.zeros(2, 3)}, NoLabels(), Tolerance())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^the student cannot be exported by torch\.export: [^\n\x1b]+$"):
        export_program(tmp_path / "model.pt2", torch.fx.symbolic_trace(OneBatch()), (3, 4, 4), check)
    assert not list(tmp_path.iterdir())
