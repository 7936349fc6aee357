"""The examples of the documentation, as a user runs them; and a notebook with the first one."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "docs" / "examples").glob("*.py"))
PRINTED = {
    "quantize_your_model": "labels",
    "export_and_run": "bits that differ from the student: 0",
    "own_images": "A own_images",
    "add_a_loss": "params.finetune.own_weight",
    "add_a_synthesis": "add_a_synthesis.py:ascent@",
    "add_a_teacher": "teacher myzoo@1:digits_cnn",
    "add_a_dataset": "my_digits@1:odd | 906 images",
    "add_a_sampler": "params.finetune.lr",
    "sweep_from_python": "params.quant.mse_norm",
}


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(example: Path, tmp_path: Path, run_process: Callable[..., tuple[int, str, str]]) -> None:
    root = str(example.parents[2])
    code, out, err = run_process([sys.executable, str(example)], cwd=tmp_path, timeout=280, PYTHONPATH=root)
    assert code == 0, out + err
    assert PRINTED[example.stem] in out


CELLS = (
    "import asyncio, synq\nassert asyncio.get_running_loop().is_running()",
    "import sys; sys.path.insert(0, EXAMPLES)\nfrom quantize_your_model import trained_network\n"
    "net, images, labels = trained_network()",
    "run = synq.quantize(net, input_size=(1, 8, 8), mean=0.5, std=0.5, target='research', num_images=64, epochs=1,\n"
    "    dataset=(images, labels), output_dir='runs', config={'synthesis.iterations': 10, 'finetune.batch_size': 32})\n"
    "run",
)


@pytest.mark.slow
def test_a_notebook_runs(tmp_path: Path) -> None:
    """In a kernel, whose cells run inside an event loop; the last cell shows the run as HTML."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    cells = [nbformat.v4.new_code_cell(cell.replace("EXAMPLES", repr(str(EXAMPLES[0].parent)))) for cell in CELLS]
    notebook = nbformat.v4.new_notebook(cells=cells)
    kernel = {"env": {**os.environ, "PYTHONPATH": str(EXAMPLES[0].parents[2])}}
    nbclient.NotebookClient(notebook, timeout=280, resources={"metadata": {"path": str(tmp_path)}}).execute(**kernel)
    shown = [output for output in notebook.cells[-1].outputs if output.output_type == "execute_result"]
    assert "W4A4" in shown[0].data["text/html"] and "<table>" in shown[0].data["text/html"]
    assert not [output for cell in notebook.cells for output in cell.outputs if output.output_type == "error"]
