"""Sources of teachers: one function per source, which builds the module and collects its metadata."""

import difflib
import importlib
import importlib.util
import re
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from synq.config.identity import WEIGHT_SUFFIXES
from synq.config.run import TeacherConfig
from synq.teacher.cifar_resnet import cifar_resnet
from synq.teacher.preprocessing import Preprocessing, timm_rule, torchvision_rule
from synq.teacher.weight_files import is_weight_file, load_weights

ASSETS = Path(__file__).resolve().parent / "assets"
RANDOM = "random"


@dataclass(frozen=True, kw_only=True)
class SourceModel:
    """A model with the metadata that its source provides; None for unknown values.

    Attributes:
        module: The model.
        name: Short name of letters, digits and underscores.
        num_classes: Number of logits.
        input_size: (C, H, W).
        mean, std: Normalization per channel, for images in [0, 1].
        default_dataset: Spec of the labeled images to evaluate on by default.
        preprocessing: How image files are resized and cropped for these weights, at the configured input size.
    """

    module: nn.Module
    name: str
    num_classes: int | None = None
    input_size: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    default_dataset: str | None = None
    preprocessing: Preprocessing | None = None


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
    }
    if not rest:
        forms = "bundled:NAME, torchvision:NAME, timm:NAME, pytorchcv:NAME, FILE.py:FACTORY or MODULE:FACTORY"
        raise ValueError(f"`teacher.spec` must have the form {forms}, but got {config.spec!r}")
    # A factory may initialize weights randomly: every process and every run must get the same weights.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind in builders:
            return builders[kind](rest, config)
        return _factory(config, list(builders))


def slug(*parts: str) -> str:
    """Join parts into a lower-case name of letters, digits and underscores.

    ("timm", "resnet18.a1_in1k") gives "timm_resnet18_a1_in1k".
    """
    return re.sub(r"[^0-9A-Za-z]+", "_", "_".join(part for part in parts if part)).strip("_").lower()


def _bundled(name: str, config: TeacherConfig) -> SourceModel:
    path = ASSETS / f"{name}.safetensors"
    names = sorted(asset.stem for asset in ASSETS.glob("*.safetensors"))
    if name not in names:
        raise _unknown("a bundled teacher", name, names)
    if config.weights not in (None, RANDOM):
        raise ValueError(f"`teacher.weights` must be left out for a bundled teacher, but got {config.weights!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
    except SafetensorError as error:
        raise ValueError(f"the bundled teacher {path} must be readable, but is damaged ({error}); reinstall") from error
    channels, height, width = (int(part) for part in metadata["input_size"].split(","))
    module = cifar_resnet(int(metadata["depth"]), int(metadata["num_classes"]), channels, int(metadata["width"]))
    if config.weights is None:
        load_weights(module, path)
    return SourceModel(
        module=module,
        name=slug(name, config.weights or ""),
        num_classes=int(metadata["num_classes"]),
        input_size=(channels, height, width),
        mean=tuple(float(part) for part in metadata["mean"].split(",")),
        std=tuple(float(part) for part in metadata["std"].split(",")),
        default_dataset=metadata["dataset"],
    )


def _torchvision(name: str, config: TeacherConfig) -> SourceModel:
    models = _package("torchvision.models", "torchvision")
    names = models.list_models(module=models)
    if name not in names:
        raise _unknown("a classifier of torchvision", name, names)
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
        raise _unknown(
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
        raise _unknown("a model of timm", name, timm.list_models())
    file = _file_or_random("timm", config)
    extra = {"num_classes": config.num_classes} if config.num_classes and config.weights is not None else {}
    if config.weights is None and not timm.is_model_pretrained(name):
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


def _pytorchcv(name: str, config: TeacherConfig) -> SourceModel:
    provider = _package("pytorchcv.model_provider", "pytorchcv")
    names = sorted(provider._models)  # the library has no public list of its models
    if name not in names:
        raise _unknown("a model of pytorchcv", name, names)
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


def _factory(config: TeacherConfig, sources: list[str]) -> SourceModel:
    target, _, name = config.spec.rpartition(":")
    file = _file_or_random("a factory", config)
    module = _load_file(target) if target.endswith(".py") else _import(target, sources)
    factory = getattr(module, name, None)
    if not callable(factory):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise _unknown(f"a function of {target}", name, names)
    try:
        model = factory()
    except Exception as error:  # the user's code may raise anything
        raise ValueError(
            f"the factory {config.spec} must be callable without arguments and return a model, "
            f"but raised {_one_line(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"the factory {config.spec} must return a torch.nn.Module, but got {type(model).__name__}")
    if file:
        load_weights(model, file)
    label = Path(file).stem if file else config.weights or ""
    return SourceModel(module=model, name=slug(name, "" if label == name else label))


def _load_file(target: str) -> ModuleType:
    path = Path(target).expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError(f"`teacher.spec` must name an existing Python file, but got {path}")
    name = slug("synq_user", path.stem, f"{zlib.crc32(str(path).encode()):x}")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look up a class's module by name
    sys.path.append(str(path.parent))  # last, so that the files in this folder can be imported but shadow no package
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code may raise anything
        raise ValueError(
            f"`teacher.spec` must name a Python file that can be imported, but {path} raised {_one_line(error)}"
        ) from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def _import(target: str, sources: list[str]) -> ModuleType:
    try:
        return importlib.import_module(target)
    except ImportError as error:
        near = difflib.get_close_matches(target, sources, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; sources are {', '.join(sources)}, FILE.py and MODULE"
        raise ValueError(f"`teacher.spec` must name a known source, but {target!r}: {error}{hint}") from error
    except Exception as error:  # the user's code may raise anything
        raise ValueError(
            f"`teacher.spec` must name a module that can be imported, but {target!r} raised {_one_line(error)}"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


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
    """Build a model; report any failure to obtain pre-trained weights as a ConnectionError."""
    with warnings.catch_warnings():
        # GoogLeNet and Inception warn about their weight initialization, although the weights are loaded afterwards.
        warnings.filterwarnings("ignore", "The default weight initialization", FutureWarning)
        if not pretrained:
            return build()
        return _build_pretrained(spec, build)


def _build_pretrained(spec: str, build: Callable[[], nn.Module]) -> nn.Module:
    try:
        return build()
    except Exception as error:  # urllib, httpx, huggingface_hub and hash checks have no common base class
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConnectionError(
            f"{spec} and its weights must be available for download, but got {type(error).__name__}: {reason}; "
            "without a network, download the file elsewhere and give its path as `teacher.weights`"
        ) from error


def _unknown(what: str, got: str, names: Iterable[str]) -> ValueError:
    near = difflib.get_close_matches(got, list(names), n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return ValueError(f"`teacher` must name {what}, but got {got!r}{hint}")
