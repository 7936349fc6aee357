"""The ledger of a sweep that several drivers run together, each trial claimed in a database before it starts.

The database has the text of every plan and record; a driver's folder has copies of all, so that its tables do. Folders
may be one (a shared file system, an address) or several; the database decides where they differ. A folder's plans and
records that the database lacks are added to it, so that the loss of the database, or of a folder, loses nothing. The
record of an earlier attempt than that of the database (`Plan.attempt`) is not: what `--retry` runs again stays so.
Imports neither Ray nor torch.
"""

import json
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from synq.common.digests import KEY, sealed_text
from synq.common.files import write_text_atomic
from synq.runs.record import RunRecord, Status, read_record

from ..spec import SweepSpec
from ..storage.databases import PAUSES
from ..storage.trial_database import MAX_REJECTIONS, SharedTrial, TrialDatabase
from .identity import check_identity, merged_identity, settled_identity, stopped_groups
from .ledger import Ledger
from .plans import Plan, in_order, parse_plan, plan_values, read_plan, read_sweep_file


class SharedLedger(Ledger):
    """Plans and records of one sweep, in memory, on disk, and in the database that its drivers share."""

    database: TrialDatabase

    def __init__(self, spec: SweepSpec, **timing: float) -> None:
        """Create the ledger of one driver.

        Args:
            spec: The sweep, with the address of a database as its `study_storage`.
            timing: `every` and `stale_after` of `TrialDatabase`.
        """
        super().__init__(spec)
        self._timing = timing
        self._owners: dict[str, str] = {}
        self._texts: dict[str, int] = {}
        """Hash of the text of each record."""
        self._changed: list[Plan] = []
        """Plans that other drivers have changed and that `sync` has not returned yet."""
        self._rejections = 0
        """Consecutive changes that the database rejected although nothing in it explains why."""
        self._is_open = False

    def _take(self) -> None:
        self.folder.take(shared=True)

    def _begin(self, stored: Mapping[str, Any], plans: dict[str, Plan], records: dict[str, RunRecord]) -> None:
        spec = self.spec
        self.database = TrialDatabase(spec.search.study_storage, spec.search.name, **self._timing)
        self._is_open = True

        def decide(agreed: dict[str, Any]) -> dict[str, Any]:
            if agreed:
                try:
                    check_identity(agreed, spec)
                except ValueError:
                    raise ValueError(
                        f"`study_storage` must have no other sweep of the same name, but got {spec.search.name} in "
                        f"{self.database}; choose another `name`"
                    ) from None
            self.spec, values = settled_identity(spec, merged_identity(agreed, stored))
            return values

        self._write_identity(self.database.agree(decide))
        known = {row.trial: row for row in self.database.changes()}
        for row in known.values():
            self._owners[row.trial] = row.owner
        for plan in in_order(plans.values()):
            self._send(plan, records.get(plan.trial), known)
        for row in [*known.values(), *self.database.changes()]:
            self._absorb(row)
        found = in_order(self.plans.values())
        self.plans.clear()
        self._by_group.clear()
        for plan in found:
            self._keep(plan)
        for trial, record in list(self.records.items()):
            if record.status not in spec.search.retry:
                continue
            plan = replace(self.plans[trial], attempt=self.plans[trial].attempt + 1)
            if self.database.reopen(trial, _text(plan), self._record_text(trial)):
                self._owners[trial] = ""
                self._forget(trial)
                self.add_plan(plan)

    def close(self) -> None:
        """Give back the trials of this driver that have not ended, and release the lock of the folder."""
        if self._is_open:
            self._is_open = False
            self.database.leave()
        super().close()

    @property
    def lost(self) -> str:
        """Reason why this driver must stop; "" while there is none."""
        return self.folder.lost or self.database.lost

    def sync(self) -> list[Plan]:
        """Read what other drivers have changed, and return the changed plans; `records` has their records."""
        self._read()
        if self.spec.search.stop_when != "budget":
            self._adopt(self.database.agreed())
        changed, self._changed = self._changed, []
        return changed

    def _read(self, but: str = "") -> None:
        """Take over what other drivers have changed; `sync` returns it later, but for one trial."""
        found = [self._absorb(row) for row in self.database.changes()]
        self._changed += [plan for plan in found if plan is not None and plan.trial != but]

    def freed(self) -> list[Plan]:
        """Return the plans without a record that no living driver runs, in the order of proposal."""
        waiting = [plan for plan in self.plans.values() if plan.trial not in self.records]
        owners = {self._owners.get(plan.trial, "") for plan in waiting}
        alive = {owner for owner in owners if self.database.is_alive(owner)}
        return [plan for plan in waiting if self._owners.get(plan.trial, "") not in alive]

    def elsewhere(self, trial: str) -> bool:
        """Return whether another living driver runs a trial."""
        owner = self._owners.get(trial, "")
        return trial not in self.records and owner != self.database.owner and self.database.is_alive(owner)

    def claim(self, plan: Plan) -> bool:
        """Claim a new trial and write its plan; return False if another driver was first, with its name or settings."""
        if not self.database.add(plan.trial, f"{plan.group} {plan.stage}", plan.config_digest, _text(plan)):
            self._read()  # who runs it, for `elsewhere`: else a driver without other trials would end
            same = {other.config_digest for other in self._by_group.get((plan.group, plan.stage), {}).values()}
            self._count_rejection(plan.trial, is_explained=plan.trial in self.plans or plan.config_digest in same)
            return False
        self._rejections = 0
        self._owners[plan.trial] = self.database.owner
        self.add_plan(plan)
        return True

    def take_over(self, plan: Plan) -> Plan | None:
        """Claim a trial that no living driver runs, and return its plan as it is now; None if another was first."""
        trial, owner = plan.trial, self._owners.get(plan.trial, "")
        if self.database.is_alive(owner):  # it was faster, and this driver has read so
            return None
        if not self.database.take(trial, owner):
            self._read()
            is_explained = trial in self.records or self._owners.get(trial, "") != owner
            self._count_rejection(trial, is_explained=is_explained)
            return None
        self._rejections = 0
        self._owners[trial] = self.database.owner
        if (row := self.database.find(trial)) is not None:  # others may have run it since this driver last looked
            stored = self._plan_of(row)
            plan = replace(plan, attempt=stored.attempt, history=stored.history)
        self.add_plan(plan)
        self.database.note(trial, _text(plan))
        return plan

    def _count_rejection(self, trial: str, *, is_explained: bool) -> None:
        """Wait after a change that the database rejected although nothing in it explains why.

        Raises:
            OSError: It has done so too often.
        """
        if is_explained:
            self._rejections = 0
            return
        if self._rejections >= MAX_REJECTIONS:
            raise OSError(
                f"`study_storage` must accept trials, but {self.database} rejected {trial} {MAX_REJECTIONS + 1} times, "
                "and nothing in it explains why (was it restored from a copy, or were rows removed?)"
            )
        time.sleep(PAUSES[self._rejections])
        self._rejections += 1

    def exclusive(self, what: str) -> AbstractContextManager[None]:
        """Return a context in which no other driver of the sweep does `what`."""
        return self.database.lock(what)

    def note(self, trial: str, history: Mapping[int, float]) -> None:
        """Write the objectives that a running trial has reported, to the folder and to the database."""
        super().note(trial, history)
        self.database.note(trial, _text(self.plans[trial]))

    def settle(
        self,
        trial: str,
        *,
        status: Status,
        reason: str,
        history: list[tuple[int, float]],
        seconds: float,
        began: float | None = None,
        host: str = "",
    ) -> RunRecord:
        """Finalize the record of an ended trial as `Ledger.settle`, and store it in the database.

        If another driver has taken the trial over meanwhile, its record counts.
        """
        record = super().settle(
            trial, status=status, reason=reason, history=history, seconds=seconds, began=began, host=host
        )
        self._store(trial)
        return self.records.get(trial, record)

    def end_early(self) -> None:
        """Add the records of trials that ended while the driver was being stopped, and rewrite the tables."""
        super().end_early()
        for trial in [trial for trial in self.records if self._owners.get(trial) == self.database.owner]:
            self._store(trial)

    def stop_group(self, group: str, reason: str) -> None:
        """End the search of a group before its budget is spent, for all drivers: the first decision counts."""
        super().stop_group(group, reason)
        mine = self.stopped[group]

        def decide(agreed: dict[str, Any]) -> dict[str, Any]:
            known = agreed.get("stopped", {})
            is_first = known.get(group, {}).get("num_trials", 0) < mine["num_trials"]
            return {**agreed, "stopped": {**known, group: mine}} if is_first else agreed

        self._adopt(self.database.agree(decide))

    def _adopt(self, agreed: Mapping[str, Any]) -> None:
        """Take over the endings of searches on which the drivers agreed."""
        stopped = {**self.stopped, **stopped_groups(self.spec.search, agreed)}
        if stopped != self.stopped:
            self.stopped = stopped
            self.folder.write("sweep.json", {**read_sweep_file(self.root / "sweep.json"), "stopped": stopped})

    def finish(self) -> None:
        """Mark the sweep as finished."""
        super().finish()
        number = self.spec.search.trials
        self.database.agree(lambda agreed: {**agreed, "finished": max(number, agreed.get("finished", 0))})

    def _store(self, trial: str) -> None:
        text = self._record_text(trial)
        self._texts[trial] = hash(text)
        if self.database.settle(trial, _text(self.plans[trial]), text):
            self._owners[trial] = ""
            return
        if self.database.find(trial) is None:
            raise OSError(
                f"`study_storage` must keep the trials of the sweep, but {self.database} has lost {trial}; its record "
                f"is in {self.root}, from where the next start adds it again"
            )
        self._forget(trial)
        self._owners.pop(trial, None)
        self._read(but=trial)

    def _send(self, plan: Plan, record: RunRecord | None, known: dict[str, SharedTrial]) -> None:
        """Add a trial of the folder to the database, if it lacks it or its record.

        Args:
            plan, record: The trial.
            known: Trials of the database, by name; those that another driver has added meanwhile are added.

        Raises:
            ValueError: The database has another trial of its name or its settings.
        """
        text = "" if record is None else self._record_text(plan.trial)
        if plan.trial not in known:
            stage = f"{plan.group} {plan.stage}"
            if self.database.add(plan.trial, stage, plan.config_digest, _text(plan), record=text, claim=False):
                return
            known.update({row.trial: row for row in self.database.changes()})
        row = known.get(plan.trial)
        if row is None:
            raise ValueError(
                f"`output_dir` must hold the sweep of `study_storage`, but {plan.trial} in {self.root} is not in "
                f"{self.database}, where another trial has its settings: choose another output_dir"
            )
        stored = self._plan_of(row)
        if stored.config_digest != plan.config_digest:
            raise ValueError(
                f"`output_dir` must hold the sweep of `study_storage`, but {plan.trial} in {self.root} has other "
                f"settings than in {self.database}: choose another output_dir"
            )
        if plan.attempt > stored.attempt:  # the database was restored from an older copy
            if not self.database.is_alive(row.owner):
                self.database.replace(row, _text(plan), text)
        elif plan.attempt < stored.attempt:
            if read_plan(self.root / "plans" / f"{plan.trial}.json").attempt < stored.attempt:
                self._texts[plan.trial] = hash(text)  # so that `_absorb` removes it
        elif text and not row.record and not self.database.is_alive(row.owner):
            self.database.replace(row, row.plan, text)

    def _absorb(self, row: SharedTrial) -> Plan | None:
        """Take over what the database has of a trial; return its plan if this driver did not know it."""
        self._owners[row.trial] = row.owner
        if row.owner == self.database.owner:
            return None
        path = self.record_path(row.trial)
        if row.record and row.trial in self.records and self._record_text(row.trial) == row.record:
            return None
        plan = self._plan_of(row)
        self._keep(plan)
        self._copy(f"plans/{row.trial}.json", row.plan)
        if row.record:
            self._copy(f"records/{row.trial}.json", row.record)
            self.records[row.trial] = read_record(path)
            self._texts[row.trial] = hash(row.record)
            self.tables.add(self.records[row.trial], row.trial, source=str(path))
        else:
            self._forget(row.trial)
        return plan

    def _plan_of(self, row: SharedTrial) -> Plan:
        content = json.loads(row.plan)
        content.pop(KEY, None)
        return parse_plan(content, self.root / "plans" / f"{row.trial}.json", is_sealed=True)

    def _copy(self, name: str, text: str) -> None:
        """Write a file of another driver, unless the folder has it."""
        path = self.root / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            self.folder.check_present()
            write_text_atomic(path, text)
            self.folder.send(name)

    def _record_text(self, trial: str) -> str:
        path = self.record_path(trial)
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    def _forget(self, trial: str) -> None:
        """Remove the record of a trial that does not count (any more); one that its worker just wrote is another."""
        self.records.pop(trial, None)
        self.tables.discard(trial)
        if (known := self._texts.pop(trial, None)) is not None and hash(self._record_text(trial)) == known:
            self.folder.remove(f"records/{trial}.json")


def open_ledger(spec: SweepSpec) -> Ledger:
    """Return the ledger of a sweep, not yet opened: a shared one if its studies are in a database."""
    return SharedLedger(spec) if spec.search.is_shared else Ledger(spec)


def _text(plan: Plan) -> str:
    return sealed_text(plan_values(plan))
