"""SynQ: zero-shot quantization of image classifiers by synthesis-aware fine-tuning.

    run = synq.quantize(net, weight_bits=4, act_bits=4, mean=..., std=..., input_size=(3, 224, 224))
    run.metrics, run.student, run.evaluate(dataset), run.export(folder)

Names are loaded on first use: `import synq` alone imports neither PyTorch nor Ray.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from synq import sweeps as sweeps
    from synq.api.quantize import Inspection as Inspection
    from synq.api.quantize import inspect as inspect
    from synq.api.quantize import load_teacher as load_teacher
    from synq.api.quantize import quantize as quantize
    from synq.api.quantize import synthesize as synthesize
    from synq.api.run import Export as Export
    from synq.api.run import Run as Run
    from synq.api.run import load_student as load_student
    from synq.api.run import open_run as open_run
    from synq.common.progress import Progress as Progress
    from synq.config.registration import dataset_source as dataset_source
    from synq.config.registration import loss_term as loss_term
    from synq.config.registration import sampler as sampler
    from synq.config.registration import synthesis_method as synthesis_method
    from synq.config.registration import teacher_source as teacher_source
    from synq.config.run import RunConfig as RunConfig
    from synq.finetune.own_term import LossInputs as LossInputs
    from synq.runs.record import RunRecord as RunRecord
    from synq.runs.recount import Recount as Recount
    from synq.sweeps.driver.own_sampler import SamplerInputs as SamplerInputs
    from synq.synthesis.dataset import SyntheticSet as SyntheticSet
    from synq.synthesis.own_method import SynthesisInputs as SynthesisInputs
    from synq.teacher.sources import SourceModel as SourceModel
    from synq.teacher.teacher import Teacher as Teacher

__version__ = "0.1.0"

_SOURCES = {
    "Export": ("synq.api.run", "Export"),
    "Inspection": ("synq.api.quantize", "Inspection"),
    "LossInputs": ("synq.finetune.own_term", "LossInputs"),
    "Progress": ("synq.common.progress", "Progress"),
    "Recount": ("synq.runs.recount", "Recount"),
    "Run": ("synq.api.run", "Run"),
    "RunConfig": ("synq.config.run", "RunConfig"),
    "RunRecord": ("synq.runs.record", "RunRecord"),
    "SamplerInputs": ("synq.sweeps.driver.own_sampler", "SamplerInputs"),
    "SourceModel": ("synq.teacher.sources", "SourceModel"),
    "SynthesisInputs": ("synq.synthesis.own_method", "SynthesisInputs"),
    "SyntheticSet": ("synq.synthesis.dataset", "SyntheticSet"),
    "Teacher": ("synq.teacher.teacher", "Teacher"),
    "dataset_source": ("synq.config.registration", "dataset_source"),
    "inspect": ("synq.api.quantize", "inspect"),
    "load_student": ("synq.api.run", "load_student"),
    "load_teacher": ("synq.api.quantize", "load_teacher"),
    "loss_term": ("synq.config.registration", "loss_term"),
    "open_run": ("synq.api.run", "open_run"),
    "quantize": ("synq.api.quantize", "quantize"),
    "sampler": ("synq.config.registration", "sampler"),
    "sweeps": ("synq.sweeps", ""),
    "synthesis_method": ("synq.config.registration", "synthesis_method"),
    "synthesize": ("synq.api.quantize", "synthesize"),
    "teacher_source": ("synq.config.registration", "teacher_source"),
}
"""Public name -> its module and its name there; "" is the module itself."""

__all__ = ["__version__", *_SOURCES]


def __getattr__(name: str) -> Any:
    """Load a public name on first use."""
    if name not in _SOURCES:
        raise AttributeError(f"module 'synq' has no attribute {name!r}")
    import importlib

    source, attribute = _SOURCES[name]
    module = importlib.import_module(source)
    value = getattr(module, attribute) if attribute else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, for completion."""
    return sorted({*globals(), *_SOURCES})
