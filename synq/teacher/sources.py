"""Where teachers come from: one builder per source, each a function from a configuration to a module and its facts."""

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

from synq.config.run import TeacherConfig
from synq.teacher.cifar_resnet import cifar_resnet
from synq.teacher.weight_files import WEIGHT_SUFFIXES, is_weight_file, load_weights

ASSETS = Path(__file__).resolve().parent / "assets"
RANDOM = "random"


@dataclass(frozen=True, kw_only=True)
class SourceModel:
    """A module as its source gives it; None where the source cannot tell.

    `mean` and `std` are per channel, for images in [0, 1]; `input_size` is (C, H, W).
    """

    module: nn.Module
    name: str
    num_classes: int | None = None
    input_size: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    default_dataset: str | None = None


def build_source(config: TeacherConfig) -> SourceModel:
    """Build the model that `config.spec` names and fill it with `config.weights`.

    Raises:
        ValueError: if the spec, the model's name or the weights are not known, or a package is not installed.
        FileNotFoundError: if a file that the configuration names does not exist.
        ConnectionError: if pre-trained weights have to be fetched and cannot be.
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
        raise ValueError(f"`teacher.spec` must read {forms}, but got {config.spec!r}")
    # A factory may draw random weights: every process, and every start of the same command, must get the same ones.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind in builders:
            return builders[kind](rest, config)
        return _factory(config, list(builders))


def slug(*parts: str) -> str:
    """Join parts to a name of letters, digits and underscores: ("timm", "resnet18.a1_in1k") -> "timm_resnet18_a1_in1k"."""
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
            facts = file.metadata()
    except SafetensorError as error:
        raise ValueError(f"the bundled teacher {path} must be readable, but is damaged ({error}); reinstall") from error
    channels, height, width = (int(part) for part in facts["input_size"].split(","))
    module = cifar_resnet(int(facts["depth"]), int(facts["num_classes"]), channels, int(facts["width"]))
    if config.weights is None:
        load_weights(module, path)
    return SourceModel(
        module=module,
        name=slug(name, config.weights or ""),
        num_classes=int(facts["num_classes"]),
        input_size=(channels, height, width),
        mean=tuple(float(part) for part in facts["mean"].split(",")),
        std=tuple(float(part) for part in facts["std"].split(",")),
        default_dataset=facts["dataset"],
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
        entry = default  # its transforms tell the input size and the normalisation the architecture is used with
    elif file:
        # A file downloaded by hand keeps its name, and the name tells which entry it is; any other file cannot tell.
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
    facts: dict[str, Any] = {}
    if entry is not None:
        transforms = entry.transforms()
        facts = {"mean": tuple(transforms.mean), "std": tuple(transforms.std)}
        facts["input_size"] = (3, int(transforms.crop_size[0]), int(transforms.crop_size[0]))
        facts["num_classes"] = extra.get("num_classes", len(entry.meta["categories"]))
    return SourceModel(module=module, name=slug("torchvision", name, label), **facts)


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
    fetch = config.weights is None
    module: Any = _build(config.spec, lambda: timm.create_model(name, pretrained=fetch, **extra), fetch)
    if file:
        load_weights(module, file)
    facts = module.pretrained_cfg
    # The architecture's own default is another training run's normalisation: a user's file must bring its own.
    known = file is None
    return SourceModel(
        module=module,
        name=slug("timm", name, Path(file).stem if file else config.weights or ""),
        num_classes=module.num_classes,
        input_size=tuple(facts["input_size"]),
        mean=tuple(facts["mean"]) if known else None,
        std=tuple(facts["std"]) if known else None,
    )


def _pytorchcv(name: str, config: TeacherConfig) -> SourceModel:
    provider = _package("pytorchcv.model_provider", "pytorchcv")
    names = sorted(provider._models)  # the library's only list of names
    if name not in names:
        raise _unknown("a model of pytorchcv", name, names)
    file = _file_or_random("pytorchcv", config)
    extra = {"num_classes": config.num_classes} if config.num_classes and config.weights is not None else {}
    fetch = config.weights is None
    module: Any = _build(config.spec, lambda: provider.get_model(name, pretrained=fetch, **extra), fetch)
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
            f"the factory {config.spec} must be callable without arguments and return a model, but raised {_one_line(error)}"
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
    sys.modules[name] = module  # dataclasses and pickle look a class's module up by name
    sys.path.append(str(path.parent))  # behind everything else: the file may import its neighbours, not shadow us
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
    """The weight file, or None for the source's own weights and for random ones."""
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
            f"`teacher.spec` must name an installed package, but {package} cannot be imported ({error}): pip install {package}"
        ) from error


def _build(spec: str, build: Callable[[], nn.Module], fetch: bool) -> nn.Module:
    """Build a model; where its weights come over the network, every failure to get them reads the same."""
    with warnings.catch_warnings():
        # GoogLeNet and Inception announce another way to draw weights, and then get them from a file.
        warnings.filterwarnings("ignore", "The default weight initialization", FutureWarning)
        if not fetch:
            return build()
        return _fetched(spec, build)


def _fetched(spec: str, build: Callable[[], nn.Module]) -> nn.Module:
    try:
        return build()
    except Exception as error:  # urllib, httpx, huggingface_hub and hash checks have no common base class
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConnectionError(
            f"{spec} and its weights must be obtainable, but got {type(error).__name__}: {reason}; "
            "without a network, download the file elsewhere and give its path as `teacher.weights`"
        ) from error


def _unknown(what: str, got: str, names: Iterable[str]) -> ValueError:
    near = difflib.get_close_matches(got, list(names), n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return ValueError(f"`teacher` must name {what}, but got {got!r}{hint}")
