"""`synq.quantize` and what else starts from a model: `synthesize`, `load_teacher`, `inspect`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

from synq import pipeline
from synq.api.models import Model, open_model, teacher_arguments, working_copy
from synq.api.run import Run
from synq.api.session import named_as_arguments, session
from synq.api.settings import Config, chosen_num_images, planned_keys_of, settings_of
from synq.budget import budgeted
from synq.common.notices import print_notice
from synq.common.progress import Progress
from synq.common.text_tables import to_text
from synq.config.run import RunConfig, make_absolute, with_overrides
from synq.config.synthesis import OWN_IMAGES
from synq.evaluation.labeled_memory import in_memory, is_in_memory, labeled_in_memory, unlabeled_in_memory
from synq.export.targets.formats import missing_note
from synq.own_images import num_own_images
from synq.runs.expected_agreement import closing_notes
from synq.runs.record import run_folder
from synq.synthesis.dataset import SyntheticSet
from synq.teacher.teacher import Teacher

Target = Literal["research", "onnxruntime", "openvino", "litert", "executorch", "tensorrt", "qnn"]
InspectTarget = Target
Device = Literal["auto", "cpu", "cuda"]
Quality = Literal["draft", "standard", "best"]
MANY = 2**31
"""Number of training images until those of the user are counted."""


@named_as_arguments
def quantize(
    model: Model = None,
    weight_bits: int | None = None,
    act_bits: int | None = None,
    *,
    target: Target | None = None,
    weights: str | Path | None = None,
    input_size: Sequence[int] | None = None,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    preprocessing: object = None,
    images: Any = None,
    dataset: Any = None,
    config: Config = None,
    quality: Quality | None = None,
    max_minutes: float | None = None,
    num_images: int | None = None,
    epochs: int | None = None,
    seed: int | None = None,
    device: Device | None = None,
    output_dir: str | Path | None = None,
    name: str | None = None,
    progress: bool = True,
    on_progress: Callable[[Progress], None] | None = None,
) -> Run:
    """Quantize a trained classifier without its data: synthesize images, and train a low-bit student on them.

    The same call again returns the finished run at once, or resumes one that was stopped (by Ctrl-C, for example) after
    its last epoch. A network in memory is known by the digest of its code and weights: give the same network again.
    Calls of several threads run one after the other.

    Args:
        model: A network (`torch.nn.Module`, on any device, in any mode), which is copied and itself not changed; a
            pipeline of Hugging Face with one; or a spec such as torchvision:resnet18, timm:NAME, FILE.py:FACTORY or
            bundled:digits_resnet8. None takes `teacher.spec` of `config`.
        weight_bits: Bit-width of the weights, 2 to 8; by default 4.
        act_bits: Bit-width of the activations, 2 to 8; by default 4.
        target: Engine that is to run the student: onnxruntime (the default), openvino, litert, executorch; tensorrt or
            qnn, whose files are checked against published rules and not run; or research, for comparison with papers.
            The default does not apply where `config` chooses a target, as a `RunConfig`
            always does.
        weights: Of a spec: a weight file, or the name of weights. "random" quantizes an untrained network on purpose.
        input_size: (C, H, W). Like mean and std, taken from timm's pretrained_cfg or an attached processor of Hugging
            Face if the network has it.
        mean: Mean per channel, for images in [0, 1], that the network was trained with.
        std: Standard deviation per channel, for images in [0, 1].
        preprocessing: An object that knows input size, mean and std: weights of torchvision
            (`ResNet18_Weights.IMAGENET1K_V1`) or their `transforms()`, an image processor of Hugging Face, timm's
            pretrained_cfg, or a Compose with Normalize.
        images: Unlabeled images of yours on which the student is trained instead of synthetic ones, as many as there
            are: a folder, an .npz file (array x), an array or tensor (N, ...), a `torch.utils.data.Dataset`, or any
            iterable of images; uint8, or float in [0, 1] and not normalized. Such a run has the protocol own_images and
            is never ranked with zero-shot ones. Its held-out images are synthetic.
        dataset: Labeled images that the result is measured on, and nothing else: digits, cifar10, cifar100,
            fashion-mnist, imagefolder:PATH, npz:FILE or none; a path; (images, labels); a `torch.utils.data.Dataset` of
            (image, label), or a `DataLoader`. Images are uint8, or float in [0, 1] and not normalized.
        config: All other settings: a `RunConfig`, a .toml or .json file, or a mapping with its keys, such as
            {"finetune.lr": 1e-3} or {"synthesis": {"iterations": 50}}. Arguments of the call go before it.
        quality: draft, standard or best: chooses numbers of images, iterations and epochs, how weights are rounded and
            whether images are blended (`quant.weight_range`, `quant.rounding`, `finetune.augment`), from what rounding
            alone loses. A mapping or file keeps what it sets, a `RunConfig` rounding and blending that are not the
            defaults; arguments of the call are kept. By default standard, unless an argument or `config` sets a number
            of images or steps, as a `RunConfig` always does.
        max_minutes: Longest time of the run by its forecast; fewer images where `quality` takes longer.
        num_images: Number of training images; with `images`, all of them unless it or `config` chooses fewer.
        epochs: Passes over them.
        seed: Seed of fine-tuning and of the synthetic images.
        device: auto (the default: a GPU if there is one), cpu or cuda.
        output_dir: Folder in which the run gets a folder, by default runs; nothing is written elsewhere.
        name: First part of the name of the run's folder.
        progress: Whether to show progress bars and notices on standard error; False prints nothing.
        on_progress: Called when a stage begins and after each epoch. An exception that it raises stops the run.

    Returns:
        The finished run.

    Raises:
        ValueError: Invalid input, before anything is computed. If input size, mean or std are unknown, one message asks
            for all that is missing.
        OSError: A file cannot be read or written.
        NonFiniteLossError: Fine-tuning diverged.
    """
    settings = settings_of(
        config,
        {
            **teacher_arguments(weights=weights, input_size=input_size, mean=mean, std=std),
            "quant.weight_bits": weight_bits,
            "quant.act_bits": act_bits,
            "quant.target": target,
            **_common(num_images if images is None else MANY, seed, device, output_dir, progress),
            "finetune.epochs": epochs,
            "name": name,
        },
    )
    number = None if images is None else num_images if num_images is not None else chosen_num_images(config)
    chosen = planned_keys_of(config, {"synthesis.num_images": num_images, "finetune.epochs": epochs}, quality)
    with session(progress=progress):
        labeled = in_memory(dataset)
        with labeled_in_memory(labeled) as spec, unlabeled_in_memory(images) as source:
            settings = with_overrides(settings, {} if spec is None else {"evaluation.dataset": spec})
            settings = settings if source is None else _with_own(settings, source, number)
            settings, teacher = _open(model, settings, preprocessing, config)
            if missing := missing_note(settings.quant.target):
                print_notice(missing)
            settings, budget = budgeted(settings, quality, max_minutes, chosen, teacher=working_copy(teacher))
            record = pipeline.run(settings, teacher=working_copy(teacher), on_progress=on_progress, budget=budget)
            for note in closing_notes(record):
                print_notice(note)
            return Run(run_folder(settings), settings, teacher, labeled if is_in_memory(spec) else None)


@named_as_arguments
def synthesize(
    model: Model = None,
    num_images: int | None = None,
    *,
    weights: str | Path | None = None,
    input_size: Sequence[int] | None = None,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    preprocessing: object = None,
    config: Config = None,
    quality: Quality | None = None,
    seed: int | None = None,
    device: Device | None = None,
    output_dir: str | Path | None = None,
    progress: bool = True,
) -> SyntheticSet:
    """Synthesize training images from a classifier, and its held-out ones; `quantize` finds both in the store.

    Their number depends on the bits, which `config` may hold, unless `num_images` or `config` sets it.

    Args:
        model: As for `quantize`; so are all other arguments.
        num_images: Number of training images.
        weights: See `quantize`.
        input_size: See `quantize`.
        mean: See `quantize`.
        std: See `quantize`.
        preprocessing: See `quantize`.
        config: See `quantize`.
        quality: See `quantize`.
        seed: Seed of the images.
        device: See `quantize`.
        output_dir: Folder whose subfolder store/ has the images.
        progress: See `quantize`.

    Returns:
        The training images, (N, C, H, W) float32, normalized as the input of the network, and their labels (N,).

    Raises:
        ValueError: As `quantize`.
        OSError: As `quantize`.
    """
    settings = settings_of(
        config,
        {
            **teacher_arguments(weights=weights, input_size=input_size, mean=mean, std=std),
            **_common(num_images, seed, device, output_dir, progress),
            "evaluation.dataset": "none",
        },
    )
    chosen = planned_keys_of(config, {"synthesis.num_images": num_images}, quality)
    with session(progress=progress):
        settings, teacher = _open(model, settings, preprocessing, config)
        settings, _ = budgeted(settings, quality, None, chosen, teacher=working_copy(teacher))
        return pipeline.prepare(settings, teacher=working_copy(teacher))[0]


@named_as_arguments
def load_teacher(
    model: Model = None,
    *,
    weights: str | Path | None = None,
    input_size: Sequence[int] | None = None,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    preprocessing: object = None,
    config: Config = None,
) -> Teacher:
    """Return a classifier as `quantize` sees it: a checked and traced copy with its input size and normalization.

    Args:
        model: As for `quantize`; so are all other arguments.
        weights: See `quantize`.
        input_size: See `quantize`.
        mean: See `quantize`.
        std: See `quantize`.
        preprocessing: See `quantize`.
        config: See `quantize`; the part `teacher` is used.

    Raises:
        ValueError: It cannot be quantized, or its input is unknown.
        OSError: A file cannot be read.
    """
    arguments = teacher_arguments(weights=weights, input_size=input_size, mean=mean, std=std)
    with session(progress=True):
        return _open(model, settings_of(config, arguments), preprocessing, config)[1]


@dataclass(frozen=True, eq=False)
class Inspection:
    """How a classifier would be quantized, layer by layer."""

    values: dict[str, Any]
    """teacher, synthesis, cam, student, onnx, kernels and layers, as `synq inspect --json` prints them."""

    @property
    def layers(self) -> list[dict[str, Any]]:
        """One row for each node of the graph: its kind, its bits (32 is float), its cost, and why it is float."""
        rows: list[dict[str, Any]] = self.values["layers"]
        return rows

    @property
    def kernels(self) -> list[dict[str, Any]]:
        """One row for each step in the engine: its kernel, whether it runs in integers, floats or is rejected, and why.

        Empty under target research, which is for no engine.
        """
        rows: list[dict[str, Any]] = self.values["kernels"].get("steps", [])
        return rows

    def __str__(self) -> str:
        from synq.diagnostics.inspection import COLUMNS, HEADINGS, summary
        from synq.diagnostics.kernel_table import table_text

        rows = [{name: value or None for name, value in row.items()} for row in self.layers]
        return f"{to_text(rows, COLUMNS, HEADINGS)}\n{table_text(self.values['kernels'])}{summary(self.values)}"

    def __repr__(self) -> str:
        teacher, student = self.values["teacher"], self.values["student"]
        return f"<synq.Inspection {teacher['name']} {student['bits']}: {len(self.layers)} nodes>"

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


@named_as_arguments
def inspect(
    model: Model = None,
    weight_bits: int | None = None,
    act_bits: int | None = None,
    *,
    target: InspectTarget | None = None,
    weights: str | Path | None = None,
    input_size: Sequence[int] | None = None,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    preprocessing: object = None,
    config: Config = None,
) -> Inspection:
    """Show how a classifier would be quantized, layer by layer; nothing is computed and no file is written.

    Args:
        model: As for `quantize`; so are all other arguments.
        weight_bits: See `quantize`.
        act_bits: See `quantize`.
        target: See `quantize`; `Inspection.kernels` then has the engine's kernel of each step. "tensorrt" or "qnn":
            by their published rules, not run.
        weights: See `quantize`.
        input_size: See `quantize`.
        mean: See `quantize`.
        std: See `quantize`.
        preprocessing: See `quantize`.
        config: See `quantize`; the parts `teacher` and `quant` are used.

    Raises:
        ValueError: It cannot be quantized, with the reason.
        OSError: A file cannot be read.
    """
    from synq.diagnostics import inspection
    from synq.diagnostics.kernel_table import for_target
    from synq.quant.student import build_student

    settings = settings_of(
        config,
        {
            **teacher_arguments(weights=weights, input_size=input_size, mean=mean, std=std),
            "quant.weight_bits": weight_bits,
            "quant.act_bits": act_bits,
        },
    )
    with session(progress=True):
        settings, teacher = _open(model, settings, preprocessing, config)
        quant, rules = for_target(settings.quant, target)
        return Inspection(inspection.inspect(teacher, build_student(teacher, quant), quant, rules))


def _open(model: Model, settings: RunConfig, preprocessing: object, config: Config) -> tuple[RunConfig, Teacher]:
    if model is None and config is None:
        raise ValueError("`model` must be a network or a spec such as torchvision:resnet18, but got none")
    return open_model(model, settings, preprocessing)


def _with_own(settings: RunConfig, source: str, number: Any) -> RunConfig:
    """Return a run on unlabeled images, by default all; a batch has at most as many as there are."""
    settings = make_absolute(with_overrides(settings, {"synthesis.method": OWN_IMAGES, "synthesis.source": source}))
    counted = number if number is not None else num_own_images(str(settings.synthesis.source))
    synthesis = with_overrides(settings, {"synthesis.num_images": counted, "finetune.batch_size": 1}).synthesis
    batch = min(settings.finetune.batch_size, synthesis.num_images)
    return with_overrides(settings, {"synthesis.num_images": counted, "finetune.batch_size": batch})


def _common(
    num_images: int | None, seed: int | None, device: str | None, output_dir: str | Path | None, progress: bool
) -> Mapping[str, Any]:
    return {
        "synthesis.num_images": num_images,
        "seed": seed,
        "data_seed": seed,
        "runtime.device": device,
        "runtime.output_dir": output_dir,
        "runtime.progress": progress,
    }
