"""Verification of a run: its record by itself, its files and images by their digests, its student measured again."""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from synq.common.digests import read_sealed
from synq.config.quant import RESEARCH
from synq.config.run import RunConfig, config_digest, config_from_dict, load_run, make_absolute
from synq.evaluation.measure import Measure
from synq.runs.finished import Run, open_run
from synq.runs.record import RunRecord, read_record
from synq.runs.record_checks import contradictions, is_same
from synq.runs.reuse import check_student
from synq.runtime import make_accelerator, place
from synq.synthesis.dataset import MANIFEST_FILE, load_set
from synq.verification.findings import Findings

STATES = ("checkpoint.pt", "prepared.pt")
MAX_IMAGES = 2
"""Labeled images on which another machine may classify differently."""
MAX_FIDELITY = 1e-3
"""Relative difference of a fidelity that another machine may make."""
COMPARED = ("top1", "rtn_top1", "teacher_top1", "top5", "drop", "objective_value", "size_bytes", "eval_digest")
"""Metrics that two records of one run must have in common."""


def verify_run(
    folder: Path, findings: Findings, *, deep: bool = False, with_sets: bool = True, is_stopped: bool = False
) -> None:
    """Check the files of a run, finished or not.

    Args:
        folder: Folder of the run.
        findings: Takes what is wrong.
        deep: Whether to measure the student again.
        with_sets: Whether to check its synthetic images as well.
        is_stopped: Whether it is known to have ended without a record, as a pruned trial of a sweep.
    """
    for name in STATES:
        if (path := folder / name).is_file():
            findings.check(path, partial(read_sealed, path))
    file = folder / "config.json"
    config = findings.check(file, lambda: load_run(file)) if file.is_file() else None
    if not (folder / "record.json").is_file():
        if not is_stopped:
            findings.skipped.append(f"`{folder}` is not finished: it has no record.json")
        return
    record = verify_record(folder / "record.json", findings)
    if record is None:
        return
    named = re.search(r"-([0-9a-f]{16})$", folder.name)
    if named is not None and named[1] != record.config_digest:
        findings.add(folder, f"has the record of another run, with config_digest {record.config_digest}")
    if config is not None and config_digest(config) != record.config_digest:
        findings.add(file, "has other settings than the record of its run")
    if record.status != "completed":
        return
    findings.check(folder / "student.safetensors", lambda: check_student(folder, record))
    if with_sets:
        _verify_sets(folder, record, findings)
    if deep:
        _measure_again(folder, findings)


def verify_record(path: Path, findings: Findings) -> RunRecord | None:
    """Check a record by itself; return it unless it cannot be read.

    Args:
        path: Its file.
        findings: Takes what is wrong.
    """
    record = findings.check(path, lambda: read_record(path))
    if record is None:
        return None
    config = findings.check(path, lambda: config_from_dict(RunConfig, record.config, source=str(path)))
    if config is None:
        return None
    if config_digest(config) != record.config_digest:
        findings.add(
            path, f"config_digest is {record.config_digest}, but its configuration has {config_digest(config)}"
        )
    for text in [*contradictions(record, config), *_finer(record, config)]:
        findings.add(path, text)
    return record


def same_results(one: RunRecord, other: RunRecord) -> str:
    """Return the first metric in which two records of one run differ, "" if they agree."""
    for name in COMPARED:
        values = getattr(one, name), getattr(other, name)
        differs = values[0] != values[1] if isinstance(values[0], str) else not is_same(*values)
        if differs:
            return f"{name} is {values[0]} and {values[1]}"
    return ""


def _finer(record: RunRecord, config: RunConfig) -> Iterator[str]:
    """Yield contradictions that only a record of a real run can have: of counts, objective and bits of its tensors."""
    if record.num_eval:
        for name in ("teacher_top1", "rtn_top1", "top1", "top5"):
            share = getattr(record, name)
            if share is not None and not is_same(share * record.num_eval / 100, round(share * record.num_eval / 100)):
                yield f"{name} is {share:g}, but that is no number of {record.num_eval} images"
    measured = record.fidelity.get(config.evaluation.fidelity_measure)
    is_measured = record.status == "completed" and record.objective == "synthetic" and measured is not None
    if is_measured and not is_same(measured, record.objective_value):
        yield f"objective_value is {record.objective_value}, but fidelity has {measured}"
    quant = config.quant
    if quant.target == RESEARCH:
        allowed = {quant.weight_bits, quant.act_bits, *quant.end_bits, 32}
        allowed |= {*quant.layer_weight_bits.values(), *quant.layer_act_bits.values()}
        for row in record.layers:
            if row["bits"] not in allowed:
                yield f"{row['role']} {row['name']} has {row['bits']} bits, which its configuration gives no tensor"


def _verify_sets(folder: Path, record: RunRecord, findings: Findings) -> None:
    """Check the synthetic sets of a run, wherever its store is now."""
    settings = record.config.get("runtime", {})
    near = [folder.parent / "store", folder.parent.parent / "store"]
    stores = [*near, *(Path(settings[key]) / part for key, part in _STORES.items() if settings.get(key))]
    wanted = {record.set_digest, record.heldout_digest} - {""}
    missing = set(wanted)
    for manifest in sorted({file.resolve() for store in stores for file in store.glob(f"*/{MANIFEST_FILE}")}):
        if manifest.parent.suffix:  # unfinished, or set aside
            continue
        if any(digest.encode() in manifest.read_bytes() for digest in wanted):
            loaded = findings.check(manifest.parent, partial(load_set, manifest.parent))
            missing -= {loaded.digest} if loaded is not None else wanted
    if missing:
        findings.skipped.append(f"synthetic images of `{folder}` are not in {near[0]}: not checked")


_STORES = {"store_dir": "", "output_dir": "store"}
"""Settings that name the store of a run, and the folder in them."""


def _measure_again(folder: Path, findings: Findings) -> None:
    """Measure the student of a run again, and compare with its record."""
    run = findings.check(folder, lambda: open_run(folder))
    if run is None:
        return
    found = findings.check(folder, lambda: _measured(run))
    for text in found or ():
        findings.add(folder / "record.json", text)


def _measured(run: Run) -> list[str]:
    config, record = make_absolute(run.config), run.record
    accelerator = make_accelerator(config.runtime)
    for net in (run.teacher.graph, run.student.net):
        place(net, config.runtime, accelerator.device, run.teacher.input_size)
    measure = Measure.prepare(config.evaluation, run.teacher, accelerator, quant=config.quant)
    if not measure.has_labels_of(record.eval_digest):
        return [f"eval_digest is {record.eval_digest or 'empty'}, but the labeled images are others now"]
    _, heldout = run.synthetic_sets()
    measure.hold_out(heldout.images, heldout.labels)
    teacher, student = measure(run.teacher.graph), measure(run.student.net)
    wrong = []
    images = 100 * MAX_IMAGES / student.num_eval if student.num_eval else 0.0
    values = {"teacher_top1": teacher.top1, "top1": student.top1, "top5": student.top5}
    for name, value in values.items():
        stored = getattr(record, name)
        if (value is None) != (stored is None) or (value is not None and abs(value - stored) > images):
            wrong.append(f"{name} is {stored}, but measured again {value}")
    for name, value in student.fidelity.items():
        stored = record.fidelity.get(name)
        if stored is None or value is None:
            continue
        allowed = 100 * MAX_IMAGES / len(heldout) if name == "agreement" else MAX_FIDELITY * max(1, abs(value))
        if abs(value - stored) > allowed:
            wrong.append(f"fidelity.{name} is {stored:g}, but measured again {value:g}")
    if student.lost is not None and record.lost is not None and abs(student.lost - record.lost) > MAX_IMAGES:
        wrong.append(f"lost is {record.lost}, but measured again {student.lost}")
    return wrong
