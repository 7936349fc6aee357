"""Verification of an export: its files by the digests of its card, the card by itself and by its run."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from synq.common.digests import file_digest, read_sealed_json, report_unsealed
from synq.config.quant import RESEARCH
from synq.config.run import RunConfig, config_digest, config_from_dict
from synq.export.out_folder import MANAGED
from synq.export.packed import load_packed, read_packed
from synq.export.verify import Tolerance, compare, engine_of, open_session
from synq.quant.integer_form import integer_form
from synq.runs.finished import open_run
from synq.runs.record import RunRecord
from synq.runs.record_checks import is_same
from synq.verification.findings import Findings

MAX_CHECKED = 256
"""Images on which a file is run again."""


def verify_export(folder: Path, findings: Findings, *, record: RunRecord | None = None, deep: bool = False) -> None:
    """Check the files of an export.

    Args:
        folder: Its folder, with card.json.
        findings: Takes what is wrong.
        record: Record of the run that it was made of, if known.
        deep: Whether to run the files again, next to the student of the run whose folder it is in.
    """
    path = folder / "card.json"
    card = findings.check(path, lambda: _read_card(path))
    if card is None:
        return
    named = {"README.md", "card.json"}
    for row in card["deployment"]["files"]:
        file = folder / row["name"]
        named.add(row["name"])
        findings.check(file, partial(_check, file, row["sha256"]))
    if (digest := card.get("readme_sha256")) is not None:
        findings.check(folder / "README.md", partial(_check, folder / "README.md", digest))
    for name in MANAGED:
        if name not in named and (folder / name).exists():
            findings.add(folder / name, "is not on the card of its export, card.json")
    for text in _contradictions(card, record):
        findings.add(path, text)
    packed = folder / "model.safetensors"
    if packed.is_file():
        verify_packed(packed, findings, digest=str(card["digests"]["config"]))
    if deep:
        _run_again(folder, card, findings)


def verify_packed(path: Path, findings: Findings, *, digest: str = "") -> None:
    """Check a packed student.

    Args:
        path: The file.
        findings: Takes what is wrong.
        digest: Digest of the configuration of its run; "" if it is not known.
    """
    read = findings.check(path, lambda: read_packed(path))
    if read is None:
        return
    about = read[1]["about"]
    if "config" not in about:
        return
    config = findings.check(path, lambda: config_from_dict(RunConfig, about["config"], source=str(path)))
    if config is not None and digest and config_digest(config) != digest:
        findings.add(path, f"is of another run, with config_digest {config_digest(config)}")


def _read_card(path: Path) -> dict[str, Any]:
    card, is_sealed = read_sealed_json(path, "`synq export` writes it again")
    required = {"deployment": dict, "digests": dict, "accuracy": dict, "config": dict}
    for name, kind in required.items():
        if not isinstance(card, dict) or not isinstance(card.get(name), kind):
            raise ValueError(f"`{path}` must be the card of an export, but has no {name}")
    files = card["deployment"].get("files")
    if not isinstance(files, list):
        raise ValueError(f"`{path}` must be the card of an export, but has no deployment.files")
    for row in files:
        texts = isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("name", "sha256"))
        if not texts or Path(row["name"]).name != row["name"]:
            raise ValueError(f"`{path}` must name files with their digests, but got {row!r:.80}")
    if not is_sealed:
        report_unsealed(path)
    return card


def _check(file: Path, digest: str) -> None:
    if file_digest(file) != digest:
        raise ValueError(f"`{file}` must be the file of its card, card.json, but differs from its digest")


def _contradictions(card: Mapping[str, Any], record: RunRecord | None) -> Iterator[str]:
    config = config_from_dict(RunConfig, card["config"])
    if config_digest(config) != card["digests"].get("config"):
        yield f"digests.config is {card['digests'].get('config')}, but its config has {config_digest(config)}"
    for name, value in (("weight_bits", config.quant.weight_bits), ("act_bits", config.quant.act_bits)):
        if card.get(name) != value:
            yield f"{name} is {card.get(name)}, but its config has {value}"
    teacher, top1, drop = (card["accuracy"].get(name) for name in ("teacher_top1", "top1", "drop"))
    if None not in (teacher, top1, drop) and not is_same(teacher - top1, drop):
        yield f"accuracy.drop is {drop:g}, but teacher_top1 - top1 is {teacher - top1:g}"
    if record is None:
        return
    if record.config_digest != card["digests"].get("config"):
        yield "is of another run than the folder that it is in"
    for name in ("teacher_top1", "rtn_top1", "top1", "drop", "num_eval"):
        if not is_same(card["accuracy"].get(name), getattr(record, name)):
            yield f"accuracy.{name} is {card['accuracy'].get(name)}, but its run has {getattr(record, name)}"


def _run_again(folder: Path, card: Mapping[str, Any], findings: Findings) -> None:
    """Run the ONNX and the packed file on held-out images, and compare them with the student of the run."""
    if not (folder.parent / "record.json").is_file():
        findings.skipped.append(f"`{folder}` is not in the folder of its run: its files were not run")
        return
    if card["config"].get("quant", {}).get("target", RESEARCH) != RESEARCH:
        findings.skipped.append(f"the file of an engine in `{folder}` was not run: `synq export` verifies it")
        return
    for row in card["deployment"]["files"]:
        file = folder / row["name"]
        if row.get("format") not in ("onnx", "packed"):
            findings.skipped.append(f"`{file}` was not run: only ONNX and packed files are")
            continue
        violation = findings.check(file, partial(_violation, file, row["format"]))
        if violation:
            findings.add(file, violation)


@torch.no_grad()
def _violation(file: Path, kind: str) -> str:
    run = open_run(file.parent.parent)
    images = run.synthetic_sets()[1].images[:MAX_CHECKED]
    form = integer_form(run.student.net)
    engine = load_packed(file, run.student.net) if kind == "packed" else engine_of(open_session(file.read_bytes()))
    batches = ((form(part), part, None) for part in images.split(64))
    return Tolerance().violation(compare(engine, batches, source="synthetic", margin=0.0))
