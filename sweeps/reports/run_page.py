"""The page of one run: did it work, what was it made of, where does it lose."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from synq.diagnostics.probe import probe_run
from synq.diagnostics.probe_parts import Probe
from synq.runs.record import RunRecord

from .image_figures import cam_overlays, image_grid, spectra
from .page import Block, Gap, Page, Tab, Table, Words
from .run_figures import confusion, error_by_difficulty, layer_errors, losses, range_strips
from .summary import foot, run_facts, run_label, run_verdict
from .sweep_view import record_of

LAYER_COLUMNS = ("name", "kind", "role", "bits", "shape", "parameters", "macs", "bitops")


def run_page(path: str | Path, path_overrides: Mapping[str, Any] | None = None, num_images: int | None = None) -> Page:
    """Return the page of a run.

    Args:
        path: Its folder, its record, or a sweep's record of it. A run without a result has a page as well, of its record alone.
        places: Where its teacher, images and labels lie now, as for ``open_run``.
        num_images: As for ``probe_run``.

    Raises:
        FileNotFoundError, ValueError: There is no record, or it is damaged.
    """
    path = Path(path)
    record = record_of(path)
    return Page(
        title=f"Run {record.name}: {run_label(record)}",
        verdict=run_verdict(record),
        facts=run_facts(record),
        tabs=[
            *run_tabs(path, record, path_overrides, num_images),
            Tab(title="Settings", blocks=settings_blocks(record)),
        ],
        foot=foot([record]),
    )


def run_tabs(
    path: Path,
    record: RunRecord,
    path_overrides: Mapping[str, Any] | None = None,
    num_images: int | None = None,
    prefix: str = "",
) -> list[Tab]:
    """Return what is to be seen of a run, in tabs.

    Args:
        path: As for ``run_page``.
        record: Its record.
        places, num_images: As for ``run_page``.
        prefix: Put before the names of drawings and tables, which are those of files and of places in the page.
    """
    try:
        probe: Probe | str = probe_run(path, path_overrides, num_images)
    except (
        Exception,
        SystemExit,
    ) as error:  # the teacher's own code runs here; what the record says is still worth a page
        probe = " ".join(str(error).split()) or type(error).__name__
    if isinstance(probe, str):
        seen: dict[str, Sequence[Block]] = {
            "Training": losses(record),
            "Images": [Gap(title="Images, maps, layers and answers", reason=probe)],
        }
    else:
        settings, classes = record.config["finetune"], int(record.teacher.get("num_classes") or 0)
        seen = {
            "Training": losses(record),
            "Images": [image_grid(probe.images, _filter_words(settings)), *spectra(probe.spectra)],
            "Answers": [
                cam_overlays(probe.maps),
                error_by_difficulty(
                    probe.answers, settings["difficulty_threshold"], uses_labels=settings["ce_weight"] > 0
                ),
                confusion(probe.answers, classes),
            ],
            "Layers": [layer_errors(probe.layers), range_strips(probe.ranges), _layer_table(record)],
        }
    return [
        Tab(title=title, blocks=[block.named(prefix) if prefix else block for block in blocks])
        for title, blocks in seen.items()
    ]


def _filter_words(settings: Mapping[str, Any]) -> str:
    cutoff = settings.get("lowpass_cutoff")
    return "none" if cutoff is None else f"Gaussian, D0 = {cutoff:g} {settings.get('lowpass_unit')}"


def _layer_table(record: RunRecord) -> Table | Gap:
    if not record.layers:
        return Gap(title="Widths", reason="the record names no layers")
    columns = [name for name in LAYER_COLUMNS if any(name in row for row in record.layers)]
    columns += sorted({name for row in record.layers for name in row} - set(LAYER_COLUMNS))
    caption = "Every weight and activation with its width; 32 is float."
    return Table(name="widths", title="Widths", caption=caption, columns=columns, rows=record.layers)


def settings_blocks(record: RunRecord) -> list[Block]:
    """Return the settings of a run, the time of its stages, and where it comes from."""
    rows = [{"setting": name, "value": value} for name, value in flat(record.config)]
    seconds = [{"stage": name, "seconds": value} for name, value in record.seconds.items()]
    blocks: list[Block] = [
        Table(
            name="settings",
            title="Settings",
            caption="The resolved configuration.",
            columns=("setting", "value"),
            rows=rows,
        )
    ]
    if seconds:
        blocks.append(
            Table(
                name="seconds",
                title="Time",
                caption="Seconds of each stage.",
                columns=("stage", "seconds"),
                rows=seconds,
            )
        )
    versions = [f"{name} {version}" for name, version in sorted(record.versions.items())]
    about = [
        f"commit {record.commit}, host {record.host}, started {record.started}",
        f"synthetic set {record.set_digest or 'unknown'}",
        f"held-out set {record.heldout_digest or 'unknown'}",
        f"labeled images {record.eval_digest or 'none'}",
        ", ".join(versions),
    ]
    return [*blocks, Words(title="Where it comes from", lines=about, listed=True)]


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Give every value of nested mappings with its dotted name."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", "none" if value is None else value
