"""Summary of a run or a sweep in sentences and short facts, for pages and `synq show`.

Imports neither torch nor Matplotlib.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from synq.common.statistics import drop_text
from synq.common.text_tables import Row, plural
from synq.config.quant import first_last_label
from synq.runs.expected_agreement import agreement_line
from synq.runs.record import FAILURES, RunRecord, run_protocol
from synq.runs.tuning_effect import effect_sentence

from ..constraints import EXPORTED, Constraint, constraints_text
from ..leaderboard.ranking import Standing
from ..leaderboard.settings import best_columns
from .sweep_view import SweepView

OUTCOMES = {"pruned": "was stopped early", "pre-empted": "was pre-empted", "lost": "was lost"}
"""Endings of a run in a sentence, where they are not the status."""
USUAL = ("completed", "pruned", "failed")
"""Statuses that are counted in any sweep; the others where they occur."""
OF = ("a drop of", "a gain of")
"""Nouns of `drop_text` in a sentence."""


def run_label(record: RunRecord) -> str:
    """Return a run's model, bits, protocol and quantization points in one line."""
    return f"{record.model} W{record.weight_bits}A{record.act_bits} {record.protocol} {record.act_points}"


def run_verdict(record: RunRecord) -> list[str]:
    """Return the result of a run in sentences."""
    if record.status != "completed":
        outcome = OUTCOMES.get(record.status, record.status)
        log = f" Its log: {record.log}." if record.log and record.status in FAILURES else ""
        return [f"The run {outcome}: {record.reason or 'no reason is recorded'}.{log}"]
    lines = []
    if record.top1 is not None and record.teacher_top1 is not None and record.num_eval:
        error, drop = record.drop_stderr, record.teacher_top1 - record.top1
        spread = "" if error is None else f" ± {error:.2f} (standard error, paired by image)"
        before = "" if record.rtn_top1 is None else f" Before fine-tuning it was {record.rtn_top1:.2f} %."
        lines.append(
            f"Top-1 {record.top1:.2f} % on {record.num_eval} labeled images; the teacher has "
            f"{record.teacher_top1:.2f} %: {drop_text(drop, nouns=OF)} percentage points{spread}.{before}"
        )
    else:
        agreement = record.fidelity.get("agreement")
        fidelity = ""
        if agreement is not None:
            fidelity = f" Student and teacher agree on {agreement:.1f} % of the held-out synthetic images."
        lines.append(f"No labeled images were given, so the accuracy is unknown.{fidelity}")
    effect = effect_sentence(record)
    if record.expected_agreement:
        expected = agreement_line(record.expected_agreement)
        lines.append(f"{expected[0].upper()}{expected[1:]}.")
    return lines + ([effect] if effect else []) + [f"Note: {text}" for text in record.warnings]


def run_facts(record: RunRecord) -> list[tuple[str, str]]:
    """Return the facts at the head of a run's page, as pairs of name and value."""
    known: list[tuple[str, str | None]] = [
        ("model", record.model or record.name),
        ("bits", f"W{record.weight_bits}A{record.act_bits}"),
        ("protocol", f"{run_protocol(record)}, {record.act_points}"),
        ("seeds", f"{record.seed} / data {record.data_seed}"),
        ("size, packed", None if record.size_bytes is None else f"{record.size_bytes / 1024:,.0f} KiB"),
        ("BitOps", None if record.bitops is None else f"{record.bitops / 1e9:.3g} G per image"),
        ("codes changed", None if record.codes_changed is None else f"{100 * record.codes_changed:.1f} %"),
        ("images kept for hard labels", None if record.kept_share is None else f"{100 * record.kept_share:.0f} %"),
        ("time", None if record.total_seconds is None else f"{record.total_seconds:.0f} s"),
        ("device", record.device or None),
    ]
    return [(name, value) for name, value in known if value]


def foot(records: Sequence[RunRecord]) -> str:
    """Return the provenance of a page in one line: records, commits, versions, date."""
    commits = sorted({record.commit for record in records})
    versions = sorted({f"torch {record.versions['torch']}" for record in records if "torch" in record.versions})
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="minutes")
    count = f"{len(records)} record{'' if len(records) == 1 else 's'}"
    return f"{count} of commit {', '.join(commits)}; {', '.join(versions) or 'versions unknown'}. Page made {now}."


def label(standing: Standing) -> str:
    """Return the name of a ranking, for example "resnet20 W4A4 A relu"."""
    row = standing.row
    parts = (
        f"{row['model']} W{row['weight_bits']}A{row['act_bits']}",
        row["protocol"],
        row["act_points"],
        first_last_label(row["first_bits"], row["last_bits"]),
        row["layer_bits"] or "",
    )
    return " ".join(part for part in parts if part)


def leaders(standings: Sequence[Standing]) -> list[Standing]:
    """Return the best row of each ranking: the first, unless it violates a constraint."""
    return [standing for standing in standings if standing.row["best"] == 1]


def sweep_verdict(sweep: SweepView, standings: Sequence[Standing]) -> list[str]:
    """Return the result of a sweep in sentences: best settings, constraints, failures, unfinished trials."""
    lines = []
    for standing in leaders(standings):
        row = standing.row
        if row["top1_mean"] is None:
            lines.append(
                f"{label(standing)}: best {row['objective']} objective {row['objective_value']:.4g} "
                "(no labeled images)."
            )
            continue
        spread = "" if row["top1_std"] is None else f" ± {row['top1_std']:.2f}"
        seeds = f"{row['num_seeds']} seed{'' if row['num_seeds'] == 1 else 's'}"
        lines.append(
            f"{label(standing)}: top-1 {row['top1_mean']:.2f}{spread} ({seeds}, {row['num_eval']} images), "
            f"{drop_text(row['drop'], nouns=OF)} from the teacher's {row['teacher_top1']:.2f}; {_before(row)}."
        )
    if not lines:
        lines.append("No trial is completed yet.")
    lines += [
        f"The search of {key} ended after {one['after']} of {one['num_trials']} trials, {one['reason']}."
        for key, one in sweep.about.get("stopped", {}).items()
    ]
    lines += constraint_lines(sweep.constraints, standings)
    failed = failed_runs(sweep)
    if failed:
        counts = Counter(record.status for _, record in failed)
        parts = ", ".join(f"{counts[status]} {status}" for status in FAILURES if counts[status])
        each = "" if set(counts) == {"failed"} else f" ({parts})"
        lines.append(f"{plural(len(failed), 'trial')} failed{each}; the tab Trials has the reasons.")
    if sweep.running:
        lines.append(
            f"{plural(len(sweep.running), 'trial')} {'is' if len(sweep.running) == 1 else 'are'} not finished: the "
            "sweep is running, or was interrupted and is resumed by "
            "the same command."
        )
    return lines + [f"Not read: {text}" for text in sweep.unread]


def constraint_lines(constraints: Sequence[Constraint], standings: Sequence[Standing]) -> list[str]:
    """Return, in sentences, which rows violate the constraints, which rankings have no other, and what is not known."""
    if not constraints:
        return []
    violating = [standing for standing in standings if standing.is_violating]
    bounds = constraints_text(constraints)
    lines = [
        f"{label(standing)}: no setting satisfies the constraints ({standing.row['violates']}), so none is best."
        for standing in violating
        if standing.row["rank"] == 1
    ]
    count = f"{len(violating)} of {plural(len(standings), 'setting')}"
    lines.append(f"Constraints: {bounds}. {count} violate them and are ranked after all others.")
    for one in constraints:
        unknown = sum(standing.row[one.name] is None for standing in standings)
        if unknown:
            cure = "; `synq export` of their runs measures it" if one.name in EXPORTED else ""
            lines.append(
                f"{one.name} is not known for {plural(unknown, 'setting')}, which count as satisfying it{cure}."
            )
        elif one.name == "drop":
            lines.append("The bound on drop chooses settings by the labeled images on which top-1 is reported.")
    return lines


def failed_runs(sweep: SweepView) -> list[tuple[str, RunRecord]]:
    """Return the name and record of each run that ended without a result and was not stopped early."""
    return [(name, record) for name, record in sweep.records.items() if record.status in FAILURES]


def _before(row: Mapping[str, Any]) -> str:
    return "unknown before fine-tuning" if row["rtn_top1"] is None else f"{row['rtn_top1']:.2f} before fine-tuning"


def sweep_facts(sweep: SweepView) -> list[tuple[str, str]]:
    """Return the facts at the head of a sweep's page, as pairs of name and value."""
    numbers = Counter(record.status for record in sweep.records.values())
    counts = {name: numbers[name] for name in ("completed", "pruned", *FAILURES) if name in USUAL or numbers[name]}
    hours = sum(record.total_seconds or 0.0 for record in sweep.records.values()) / 3600
    machines = {record.host for record in sweep.records.values() if record.host}
    search = sweep.about.get("search", {})
    known = [
        *((status, str(count)) for status, count in counts.items()),
        ("groups", str(len(sweep.groups)) if sweep.is_sweep else ""),
        ("objective", str(search.get("objective", ""))),
        ("sampler", str(search.get("sampler", ""))),
        ("scheduler", str(search.get("scheduler", ""))),
        ("constraints", constraints_text(sweep.constraints)),
        ("time of all trials", f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"),
        ("machines", str(len(machines))),
    ]
    return [(name, value) for name, value in known if value]


def best_rows(sweep: SweepView, standings: Sequence[Standing]) -> list[Row]:
    """Return the best row of each ranking, with columns for its settings and its trial."""
    rows = []
    for standing in leaders(standings):
        name = run_of(sweep, standing)
        cells = {column.key: standing.cell(column.key) for column in best_columns(sweep.settings)[:-1]}
        rows.append(standing.row | cells | {"trial": name})
    return rows


def run_of(sweep: SweepView, standing: Standing) -> str | None:
    """Return the name of the first completed run of a row, or None."""
    records = sweep.records.items()
    found = [
        name
        for name, record in records
        if record.config_digest == standing.row["config_digest"] and record.status == "completed"
    ]
    return min(found) if found else None
