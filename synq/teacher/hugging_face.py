"""Teachers of the package transformers: a folder that ``save_pretrained`` wrote, or a model of the hub."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from synq.common.error_text import one_line, some_of
from synq.config.identity import hub_folder
from synq.teacher.input_format import InputFormat, input_format

PROCESSOR = "preprocessor_config.json"
"""File of a folder that states how images are prepared."""
LONGEST_REASON = 240
"""Characters of the library's text that an error repeats."""


def load_hugging_face(
    name: str, *, random: bool, input_size: tuple[int, int, int] | None = None, num_classes: int | None = None
) -> tuple[nn.Module, InputFormat]:
    """Return a classifier of transformers in float32, and what its image processor states about the input.

    A folder is read without the network, code in it is never run, and a model of the hub is downloaded as transformers
    does it. Weights that the files lack would be random without an error, so such files are rejected.

    Args:
        name: Path of a folder with config.json, or name of a model on the hub.
        random: Whether the weights are random, from PyTorch's global generator; nothing but config.json is read then.
        input_size: (C, H, W) that the user gave; None takes that of the image processor.
        num_classes: Number of classes of a network with random weights; None takes that of config.json.

    Raises:
        ValueError: transformers is not installed, or the files hold no complete classifier of images.
        FileNotFoundError: The folder does not exist.
        ConnectionError: A model of the hub cannot be downloaded.
    """
    folder = hub_folder(name)
    if folder is not None and not Path(folder).is_dir():
        raise FileNotFoundError(f"`teacher.spec` must name an existing folder after hf:, but got {folder}")
    try:
        library: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise ValueError(
            f"`teacher.spec` must name an installed package, but transformers cannot be imported ({error}): "
            "pip install transformers"
        ) from error
    where: dict[str, Any] = {"local_files_only": folder is not None, "trust_remote_code": False}
    source = folder or name
    with _quiet(library), _explained(name, folder):
        changed = {"num_labels": num_classes} if random and num_classes else {}
        config = library.AutoConfig.from_pretrained(source, **where, **changed)
        classes = library.AutoModelForImageClassification
        if random:
            module, missing = classes.from_config(config), []
        else:
            module, report = classes.from_pretrained(source, config=config, output_loading_info=True, **where)
            missing = sorted(str(key) for key in (*report["missing_keys"], *report["mismatched_keys"]))
        # A network without the file is normalized in a way that only its user knows.
        has_processor = folder is None or (Path(folder) / PROCESSOR).is_file()
        processor = library.AutoImageProcessor.from_pretrained(source, **where) if has_processor else None
    if missing:
        raise ValueError(
            f"`teacher.spec` must name files with all weights of a classifier, but hf:{name} lacks {len(missing)} of "
            f"{type(module).__name__} ({some_of(missing)}): they would be random; save the classifier that was trained"
        )
    model = module.eval().float()
    sides = None if input_size is not None else getattr(config, "image_size", None)
    if isinstance(sides, int):
        sides = (sides, sides)
    known = input_format(model, processor, input_size)
    if known.input_size is None and isinstance(sides, (list, tuple)) and len(sides) == 2:
        channels = int(getattr(config, "num_channels", 3))
        known = known.filled(InputFormat(input_size=(channels, int(sides[0]), int(sides[1]))))
    return model, known


@contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Silence the library's progress bars and reports inside the block; its settings are put back."""
    log = library.utils.logging
    level, had_bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if had_bars:
            log.enable_progress_bar()


@contextmanager
def _explained(name: str, folder: str | None) -> Iterator[None]:
    """Turn what the library raises inside the block into one line: it has no common class of errors."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and folder is None:
            raise ConnectionError(
                f"hf:{name} must be available for download, but got {type(error).__name__}: {one_line(error)}; without "
                "a network, give the path of a folder that save_pretrained wrote, as hf:./FOLDER"
            ) from error
        reason = one_line(error)  # some list every configuration that the library knows
        reason = reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]}..."
        raise ValueError(
            f"`teacher.spec` must name a classifier of images that transformers loads, but hf:{name} raised {reason}"
        ) from error
