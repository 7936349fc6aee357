"""Sources of teachers: one function per source, which builds the module and collects its metadata."""

import copy
import importlib
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from synq.common.error_text import one_line
from synq.config.identity import WEIGHT_SUFFIXES, hub_folder
from synq.config.plugins import TEACHER_SOURCE, is_added, known, parsed
from synq.config.run import TeacherConfig
from synq.teacher.hugging_face import load_hugging_face
from synq.teacher.input_format import input_format
from synq.teacher.networks.bundled import bundled_network
from synq.teacher.preprocessing import Preprocessing, timm_rule, torchvision_rule
from synq.teacher.user_code import added_function, called, made_by_user, slug, unknown
from synq.teacher.weight_files import is_weight_file, load_weights
from synq.teacher.wrappers import check_layers, unwrap_parts, unwrapped

ASSETS = Path(__file__).resolve().parent / "assets"
RANDOM = "random"
MEMORY = "memory"
"""Source of a network that was a Python object, not a file."""


@dataclass(frozen=True, kw_only=True)
class SourceModel:
    """A model with the metadata that its source provides; None for unknown values."""

    module: nn.Module
    """The model."""
    name: str = ""
    """Short name of letters, digits and underscores; "" makes one from the spec."""
    num_classes: int | None = None
    """Number of logits."""
    input_size: tuple[int, int, int] | None = None
    """Channels, height and width in pixels."""
    mean: tuple[float, ...] | None = None
    """Mean per channel of the normalization, for images in [0, 1]."""
    std: tuple[float, ...] | None = None
    """Standard deviation per channel of the normalization."""
    default_dataset: str | None = None
    """Spec of the labeled images to evaluate on by default."""
    preprocessing: Preprocessing | None = None
    """How image files are resized and cropped for these weights, at the configured input size."""


def build_source(config: TeacherConfig) -> SourceModel:
    """Build the model of `config.spec` and load `config.weights` into it.

    Raises:
        ValueError: If the spec, the model's name or the weights are unknown, or a package is not installed.
        FileNotFoundError: If a file of the configuration does not exist.
        ConnectionError: If pre-trained weights must be downloaded but cannot be.
    """
    kind, _, rest = config.spec.partition(":")
    builders: dict[str, Callable[[str, TeacherConfig], SourceModel]] = {
        "bundled": _bundled,
        "torchvision": _torchvision,
        "timm": _timm,
        "pytorchcv": _pytorchcv,
        "hf": _hugging_face,
        MEMORY: _memory,
    }
    added = known(TEACHER_SOURCE)
    if not rest:
        more = "".join(f", {name}:MODEL" for name in added)
        libraries = "bundled:NAME, torchvision:NAME, timm:NAME, pytorchcv:NAME, hf:NAME"
        forms = f"{libraries}{more}, FILE.py:FACTORY or MODULE:FACTORY"
        raise ValueError(f"`teacher.spec` must have the form {forms}, but got {config.spec!r}")
    # A factory may initialize weights randomly: every process and every run must get the same weights.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind in builders:
            return builders[kind](rest, config)
        if is_added(TEACHER_SOURCE, config.spec):
            return _added(config)
        return _factory(config, [*(name for name in builders if name != MEMORY), *added])


def _bundled(name: str, config: TeacherConfig) -> SourceModel:
    path = ASSETS / f"{name}.safetensors"
    names = sorted(asset.stem for asset in ASSETS.glob("*.safetensors"))
    if name not in names:
        raise unknown("a bundled teacher", name, names)
    if config.weights not in (None, RANDOM):
        raise ValueError(f"`teacher.weights` must be left out for a bundled teacher, but got {config.weights!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
    except SafetensorError as error:
        raise ValueError(f"the bundled teacher {path} must be readable, but is damaged ({error}); reinstall") from error
    module, input_size = bundled_network(metadata)
    if config.weights is None:
        load_weights(module, path)
    return SourceModel(
        module=module,
        name=slug(name, config.weights or ""),
        num_classes=int(metadata["num_classes"]),
        input_size=input_size,
        mean=tuple(float(part) for part in metadata["mean"].split(",")),
        std=tuple(float(part) for part in metadata["std"].split(",")),
        default_dataset=metadata["dataset"],
    )


def _torchvision(name: str, config: TeacherConfig) -> SourceModel:
    models = _package("torchvision.models", "torchvision")
    names = models.list_models(module=models)
    if name not in names:
        raise unknown("a classifier of torchvision", name, names)
    entries = {entry.name: entry for entry in models.get_model_weights(name)}
    default = models.get_model_weights(name).DEFAULT
    file = config.weights if config.weights and is_weight_file(config.weights) else None
    if config.weights is None or config.weights == "DEFAULT":
        entry = default
    elif config.weights == RANDOM:
        entry = default  # for the usual input size and normalization of the architecture
    elif file:
        # A downloaded file keeps its name, which identifies its entry; for any other file the entry is unknown.
        entry = next((e for e in entries.values() if e.url.rsplit("/", 1)[-1] == Path(file).name), None)
    elif config.weights in entries:
        entry = entries[config.weights]
    else:
        raise unknown(
            f"weights of torchvision:{name} ({', '.join(entries)}), a file or {RANDOM}", config.weights, entries
        )
    extra = {"num_classes": config.num_classes} if config.num_classes and (file or config.weights == RANDOM) else {}
    pretrained = entry if config.weights != RANDOM and not file else None
    module = _build(config.spec, lambda: models.get_model(name, weights=pretrained, **extra), pretrained is not None)
    if file:
        load_weights(module, file)
    label = "" if pretrained is default else Path(file).stem if file else (config.weights or "")
    metadata: dict[str, Any] = {}
    if entry is not None:
        transforms = entry.transforms()
        metadata = {"mean": tuple(transforms.mean), "std": tuple(transforms.std)}
        metadata["input_size"] = (3, int(transforms.crop_size[0]), int(transforms.crop_size[0]))
        size = config.input_size or metadata["input_size"]
        metadata["preprocessing"] = torchvision_rule(transforms, str(entry), size)
        metadata["num_classes"] = extra.get("num_classes", len(entry.meta["categories"]))
    return SourceModel(module=module, name=slug("torchvision", name, label), **metadata)


def _timm(name: str, config: TeacherConfig) -> SourceModel:
    timm = _package("timm", "timm")
    if not timm.is_model(name):
        raise unknown("a model of timm", name, timm.list_models())
    file = _file_or_random("timm", config)
    extra = {"num_classes": config.num_classes} if config.num_classes and config.weights is not None else {}
    try:
        timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:  # an unknown tag
        architecture, _, tag = name.partition(".")
        tags = [full.partition(".")[2] for full in timm.list_models(f"{architecture}.*", pretrained=True)]
        raise unknown(f"weights of timm:{architecture} ({', '.join(tags) or 'there are none'})", tag, tags) from error
    if config.weights is None and not _timm_has_weights(timm, name):
        raise ValueError(
            f"`teacher.weights` must name a weight file or be {RANDOM!r}: timm has no weights for {name!r}"
        )
    pretrained = config.weights is None
    module: Any = _build(config.spec, lambda: timm.create_model(name, pretrained=pretrained, **extra), pretrained)
    if file:
        load_weights(module, file)
    metadata = module.pretrained_cfg
    # The default normalization of the architecture may not be that of a user's file, so it must be given explicitly.
    known = file is None
    return SourceModel(
        module=module,
        name=slug("timm", name, Path(file).stem if file else config.weights or ""),
        num_classes=module.num_classes,
        input_size=tuple(metadata["input_size"]),
        mean=tuple(metadata["mean"]) if known else None,
        std=tuple(metadata["std"]) if known else None,
        preprocessing=timm_rule(metadata, config.input_size or metadata["input_size"]) if known else None,
    )


def _timm_has_weights(timm: Any, name: str) -> bool:
    """Return whether timm has weights for a model; earlier names are mapped to today's only when a model is built."""
    if timm.is_model_pretrained(name):
        return True
    if name not in timm.models.get_deprecated_models():
        return False
    module: Any = _build(f"timm:{name}", lambda: timm.create_model(name), False)
    found = module.pretrained_cfg
    return bool(found.get("hf_hub_id") or found.get("url"))


def _pytorchcv(name: str, config: TeacherConfig) -> SourceModel:
    provider = _package("pytorchcv.model_provider", "pytorchcv")
    names = sorted(provider._models)  # the library has no public list of its models
    if name not in names:
        raise unknown("a model of pytorchcv", name, names)
    file = _file_or_random("pytorchcv", config)
    extra = {"num_classes": config.num_classes} if config.num_classes and config.weights is not None else {}
    pretrained = config.weights is None
    module: Any = _build(config.spec, lambda: provider.get_model(name, pretrained=pretrained, **extra), pretrained)
    if file:
        load_weights(module, file)
    size = getattr(module, "in_size", None)
    return SourceModel(
        module=module,
        name=slug("pytorchcv", name, Path(file).stem if file else config.weights or ""),
        num_classes=getattr(module, "num_classes", None),
        input_size=(getattr(module, "in_channels", 3), int(size[0]), int(size[1])) if size else None,
    )


def _hugging_face(name: str, config: TeacherConfig) -> SourceModel:
    file = _file_or_random("hf", config)
    module: Any
    module, known = load_hugging_face(
        name, random=config.weights is not None, input_size=config.input_size, num_classes=config.num_classes
    )
    if file:
        load_weights(module, file)
    label = Path(file).stem if file else config.weights or ""
    return SourceModel(
        module=module,
        name=slug("hf", Path(name).name if hub_folder(name) else name, label),
        num_classes=int(module.config.num_labels),
        input_size=known.input_size,
        mean=known.mean,
        std=known.std,
        preprocessing=known.rule,
    )


def _memory(name: str, config: TeacherConfig) -> SourceModel:
    raise ValueError(
        f"`teacher.spec` must name a network that can be loaded, but {config.spec} was an object in the memory of a "
        "program: give that network again, as in synq.open_run(RUN, model=net)"
    )


def _factory(config: TeacherConfig, sources: list[str]) -> SourceModel:
    target, _, name = config.spec.rpartition(":")
    file = _file_or_random("a factory", config)
    model = made_by_user(target, name, sources)
    if file:
        load_weights(model, file)
    unwrap_parts(model)
    label = Path(file).stem if file else config.weights or ""
    return SourceModel(module=model, name=slug(name, "" if label == name else label))


def _added(config: TeacherConfig) -> SourceModel:
    """Return the model of a source that a user added, and what is known about its input."""
    name, _, text = parsed(TEACHER_SOURCE, config.spec)
    rule, spec = "`teacher.spec` must return a torch.nn.Module or a synq.SourceModel", f"{name}:{text}"
    if config.weights is not None and not is_weight_file(config.weights):
        raise ValueError(f"`teacher.weights` must be a file or left out for {spec}, but got {config.weights!r}")
    made = called(added_function(TEACHER_SOURCE, config.spec), text, rule, spec)
    found = made if isinstance(made, SourceModel) else SourceModel(module=made)
    if not isinstance(found.module, nn.Module):
        raise ValueError(f"{rule}, but {spec} returned {type(found.module).__name__}")
    facts = {key: getattr(found, key) for key in ("num_classes", "input_size", "mean", "std")}
    try:
        facts = {key: getattr(TeacherConfig(**facts), key) for key in facts}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{rule} with a valid input, but {spec} returned another: {error}") from error
    check_layers(found.module, spec)
    # A copy, because a source may return one object twice, and loading weights must not change what it holds.
    model = copy.deepcopy(unwrapped(found.module))
    if config.weights is not None:
        load_weights(model, config.weights)
    unwrap_parts(model)
    known_input = input_format(model, None, config.input_size)  # by the attributes of timm and others
    for key in ("input_size", "mean", "std"):
        facts[key] = facts[key] if facts[key] is not None else getattr(known_input, key)
    label = "" if config.weights is None else Path(config.weights).stem
    return replace(
        found,
        module=model,
        name=slug(found.name or f"{name}_{text}", label),
        preprocessing=found.preprocessing or known_input.rule,
        **facts,
    )


def _file_or_random(source: str, config: TeacherConfig) -> str | None:
    """Return the path of the weight file, or None for the default weights of the source and for random weights."""
    if config.weights is None or config.weights == RANDOM:
        return None
    if is_weight_file(config.weights):
        return config.weights
    endings = ", ".join(WEIGHT_SUFFIXES)
    raise ValueError(
        f"`teacher.weights` must be a file ({endings}) or {RANDOM!r} for {source}, but got {config.weights!r}"
    )


def _package(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"`teacher.spec` must name an installed package, but {package} cannot be imported ({error}): "
            f"pip install {package}"
        ) from error


def _build(spec: str, build: Callable[[], nn.Module], pretrained: bool) -> nn.Module:
    """Build a model; report any failure to obtain pre-trained weights as a ConnectionError.

    Raises:
        ValueError: If the library does not build the model without weights, for example with this number of classes.
        ConnectionError: As described.
    """
    with warnings.catch_warnings():
        # GoogLeNet and Inception warn about their weight initialization, although the weights are loaded afterwards.
        warnings.filterwarnings("ignore", "The default weight initialization", FutureWarning)
        warnings.filterwarnings("ignore", "Mapping deprecated model name", UserWarning)  # timm's earlier names
        if pretrained:
            return _build_pretrained(spec, build)
        try:
            return build()
        except Exception as error:  # libraries check their arguments by assertions, KeyError, RuntimeError, ...
            raise ValueError(
                f"`teacher` must be a model that its library builds, but {_failure(spec, error)}"
            ) from error


def _failure(spec: str, error: Exception) -> str:
    """Return what a library raised, with the line of code if the error has no text (a bare assertion)."""
    text = one_line(error)
    if not str(error).strip():
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__} in {Path(frame.filename).name}: {' '.join((frame.line or '').split())}"
    return f"{spec} raised {text}"


def _build_pretrained(spec: str, build: Callable[[], nn.Module]) -> nn.Module:
    try:
        return build()
    except Exception as error:  # urllib, httpx, huggingface_hub and hash checks have no common base class
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConnectionError(
            f"{spec} and its weights must be available for download, but got {type(error).__name__}: {reason}; "
            "without a network, download the file elsewhere and give its path as `teacher.weights`"
        ) from error
