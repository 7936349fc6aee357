"""Page of one run: result, training, images, predictions, layers, settings."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synq.common.files import DamagedFileError
from synq.common.notices import print_notice
from synq.config.run import RunConfig
from synq.diagnostics.probe_parts import Probe
from synq.runs.finished_folder import finished_folder
from synq.runs.record import RunRecord

from .headline import run_chart
from .image_figures import attention_figures, cam_overlays, image_grids, spectra
from .page import Block, Gap, Page, Tab, Table, Text
from .run_figures import confusion, error_by_difficulty, layer_errors, losses, range_strips
from .summary import foot, run_facts, run_label, run_verdict
from .sweep_view import record_of

if TYPE_CHECKING:
    from synq.teacher.teacher import Teacher

LAYER_COLUMNS = ("name", "kind", "role", "bits", "shape", "parameters", "numel", "macs", "bitops")
LAYER_HEADINGS = {
    "name": "layer",
    "role": "tensor",
    "parameters": "weights",
    "numel": "values",
    "macs": "MACs per image",
    "bitops": "BitOps per image",
}
LAYER_MEANINGS = {
    "role": "the layer's weight, or the activation that it returns",
    "numel": "number of values; of one image for an activation",
    "macs": "multiply-accumulate operations",
    "bitops": "MACs x weight bits x input bits; a float operand counts 32 bits",
}


def run_page(
    path: str | Path,
    path_overrides: Mapping[str, Any] | None = None,
    num_images: int | None = None,
    teacher: "Teacher | None" = None,
) -> Page:
    """Return the page of a run.

    Args:
        path: Folder of the run, its record, or the record of a trial of a sweep. A failed or pruned run has a page of
            its record only.
        path_overrides: Current paths of teacher, images and labels, as for ``open_run``.
        num_images: As for ``probe_run``.
        teacher: As for ``open_run``.

    Raises:
        FileNotFoundError, ValueError: There is no record, or it is damaged.
    """
    path = Path(path)
    record = record_of(path)
    return Page(
        title=run_title(record),
        verdict=run_verdict(record),
        facts=run_facts(record),
        tabs=[
            *run_tabs(path, record, path_overrides, num_images, teacher=teacher),
            Tab(title="Settings", blocks=settings_blocks(record)),
        ],
        foot=foot([record]),
        chart=run_chart(record),
    )


def run_tabs(
    path: Path,
    record: RunRecord,
    path_overrides: Mapping[str, Any] | None = None,
    num_images: int | None = None,
    prefix: str = "",
    teacher: "Teacher | None" = None,
) -> list[Tab]:
    """Return the figures and tables of a run in tabs.

    Args:
        path: As for ``run_page``.
        record: The record of the run.
        path_overrides, num_images: As for ``run_page``.
        prefix: Prefix of the names of figures and tables, which are file names and URL fragments.
        teacher: As for ``run_page``.

    Raises:
        DamagedFileError: A file of the run is damaged, and there is no prefix; with one, a notice names it.
    """
    try:
        finished_folder(path)
        from synq.diagnostics.probe import probe_run  # loads torch, which a page of records only does not need

        probe: Probe | str = probe_run(path, path_overrides, num_images, teacher)
    except DamagedFileError as error:
        if not prefix:  # a page of this run alone would be one of a damaged file
            raise
        print_notice(f"warning: {error}")
        probe = str(error)
    except (Exception, SystemExit) as error:  # of the teacher's code; the page of the record is still made
        probe = " ".join(str(error).split()) or type(error).__name__
    if isinstance(probe, str):
        blocks_by_title: dict[str, Sequence[Block]] = {
            "Training": losses(record),
            "Images": [Gap(title="Images, predictions, activation maps and layers", reason=probe)],
        }
    else:
        settings, classes = record.config["finetune"], int(record.teacher.get("num_classes") or 0)
        blocks_by_title = {
            "Training": losses(record),
            "Images": [*image_grids(probe.images, _filter_text(settings)), *spectra(probe.spectra)],
            "Predictions": [
                cam_overlays(probe.maps),
                *attention_figures(probe.attention),
                error_by_difficulty(
                    probe.predictions, settings["difficulty_threshold"], uses_labels=settings["ce_weight"] > 0
                ),
                confusion(probe.predictions, classes),
            ],
            "Layers": [layer_errors(probe.layers), range_strips(probe.ranges), _layer_table(record)],
        }
    return [
        Tab(title=title, blocks=[block.with_prefix(prefix) if prefix else block for block in blocks])
        for title, blocks in blocks_by_title.items()
    ]


def run_title(record: RunRecord) -> str:
    """Return the heading of a run: its name, unless it is the default, and its label."""
    return f"Run {'' if record.name == RunConfig().name else f'{record.name}: '}{run_label(record)}"


def _filter_text(settings: Mapping[str, Any]) -> str:
    cutoff = settings.get("lowpass_cutoff")
    return "none" if cutoff is None else f"Gaussian, D0 = {cutoff:g} {settings.get('lowpass_unit')}"


def _layer_table(record: RunRecord) -> Table | Gap:
    if not record.layers:
        return Gap(title="Bits", reason="the record has no layers")
    columns = [name for name in LAYER_COLUMNS if any(name in row for row in record.layers)]
    columns += sorted({name for row in record.layers for name in row} - set(LAYER_COLUMNS))
    caption = "Bits of each weight and activation; 32 means float."
    return Table(
        name="bits",
        title="Bits",
        caption=caption,
        columns=columns,
        rows=record.layers,
        headings=LAYER_HEADINGS,
        meanings=LAYER_MEANINGS,
    )


def settings_blocks(record: RunRecord) -> list[Block]:
    """Return the settings of a run, the time of its stages, and its provenance."""
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
    return [*blocks, Text(title="Provenance", lines=about, listed=True)]


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of nested mappings with its dotted name."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", "none" if value is None else value
