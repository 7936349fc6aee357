"""Which finished runs belong to the table of a study."""

from dataclasses import replace

import pytest

from support.records import record
from synq.config.run import RunConfig, with_overrides
from synq.pipeline import check
from synq.runs.record import run_folder, write_record
from synq.sweeps.studies.study_folder import with_finished


@pytest.mark.parametrize(("which", "number"), [("same", 2), ("earlier", 2), ("other", 1), ("none", 1)])
def test_runs_on_the_same_labeled_images_are_in_the_table(which: str, number: int, config: RunConfig) -> None:
    _, measure = check(config)
    assert measure.labeled is not None
    earlier = measure.labeled.earlier_fingerprint()
    digests = {"same": measure.labels_digest, "earlier": earlier, "other": "0" * len(earlier), "none": ""}
    assert earlier != measure.labels_digest
    order = {seed: with_overrides(config, {"seed": seed}) for seed in (0, 1)}
    first = record(seed=0, eval_digest=measure.labels_digest)
    second = replace(first, seed=1, eval_digest=digests[which])
    write_record(run_folder(order[1]) / "record.json", second)
    assert len(with_finished({0: order[0]}, {0: first}, order)) == number
