"""Drivers of one sweep that share a database, without Ray and without training."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.databases import quick_sqlite
from support.sweep_tools import tiny
from synq.config.run import config_to_dict
from synq.runs.record import RunRecord, write_record
from synq.sweeps.driver.dashboard import StudyCopy
from synq.sweeps.driver.searcher import SweepSearcher
from synq.sweeps.driver.stop_reason import StopReason
from synq.sweeps.state.shared_ledger import SharedLedger, open_ledger

SPACE = {"finetune.lr": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}}
KEYS: dict[str, Any] = {
    "bits": ["W3A3"],
    "sampler": "points",
    "scheduler": "none",
    "points": [{"finetune.lr": 0.001 * number} for number in range(1, 7)],
    "seeds": [0, 1],
}


class Driver:
    """One driver: its ledger and searcher, and trials whose objective is their learning rate."""

    def __init__(self, folder: Path, address: str, *, copied: bool = False, **keys: Any) -> None:
        spec = tiny(folder, **{**KEYS, "study_storage": address, **keys})
        opened = open_ledger(spec)
        assert isinstance(opened, SharedLedger)
        self.ledger = opened
        self.ledger.open()
        self.stop = StopReason()
        copy = StudyCopy(self.ledger.spec) if copied else None  # takes most of a second
        self.searcher = SweepSearcher(self.ledger.spec, self.ledger, copy=copy, stop_reason=self.stop)
        self.searcher.complete_copy()
        self.number = 0

    def start(self) -> tuple[str, str] | None:
        """Start a trial: its id and name; None if there is none now."""
        self.searcher._synced = 0.0
        self.number += 1
        key = f"{id(self)}-{self.number}"
        task = self.searcher.suggest(key)
        return (key, task["trial"]) if isinstance(task, dict) else None

    def write(self, trial: str, **fields: Any) -> None:
        """Write the record of a trial, as its worker does."""
        plan = self.ledger.plans[trial]
        config = plan.config
        values = {
            "name": trial, "config": config_to_dict(config), "config_digest": plan.config_digest, "model": "net",
            "weight_bits": 3, "act_bits": 3, "protocol": config.protocol, "act_points": config.quant.points,
            "objective": "synthetic", "objective_value": config.finetune.lr, "seed": config.seed,
            "data_seed": config.data_seed, "log": f"logs/{trial}.log", **fields,
        }  # fmt: skip
        write_record(self.ledger.record_path(trial), RunRecord(**values))

    def end(self, started: tuple[str, str], **fields: Any) -> None:
        """Run a started trial to its end."""
        key, trial = started
        value = self.ledger.plans[trial].config.finetune.lr
        for epoch in (1, 2):
            self.searcher.on_trial_result(key, {"epoch": epoch, "epochs": 2, "objective_value": value})
        self.ledger.note(trial, {1: value, 2: value})
        self.write(trial, **fields)
        record = RunRecord(**{"objective_value": value, **fields})
        last = {"status": record.status, "objective_value": record.objective_value}
        self.searcher.on_trial_complete(key, last)
        self.ledger.settle(trial, status="lost", reason="", history=[(1, value), (2, value)], seconds=1.0)

    def die(self) -> None:
        """Stop as after `kill -9`: nothing is given back, and others see that the process has ended."""
        database = self.ledger.database
        database._stop.set()
        drivers = database._tables["drivers"]
        with database._engine.begin() as connection:
            connection.execute(drivers.delete().where(drivers.c.owner == database.owner))
        self.ledger.folder.give_back()
        self.ledger._is_open = False
        DRIVERS.remove(self)


DRIVERS: list[Driver] = []

NAMES = [f"digits_resnet8-W3A3-t{index:03d}" for index in range(6)]


@contextmanager
def joining(tmp_path: Path, *, is_common: bool) -> Iterator[Callable[..., Driver]]:
    """Start drivers by their names: each in a folder of its own, or all in one; they are closed in the end."""

    def make(name: str = "a", **keys: Any) -> Driver:
        folder = tmp_path / ("all" if is_common else name)
        DRIVERS.append(Driver(folder, f"sqlite:///{tmp_path}/studies.db", copied=not is_common, **keys))
        return DRIVERS[-1]

    with quick_sqlite():
        yield make
        for one in DRIVERS:
            one.ledger.close()
        DRIVERS.clear()
