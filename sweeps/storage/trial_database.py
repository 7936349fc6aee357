"""Trials of a sweep in a database that several drivers share: who runs which, and what came out.

Every change of a sweep's trials first increments the sweep's revision, which locks its row until the transaction ends:
changes of a sweep follow one another, and `changes` returns those after the last revision that it has returned.

A trial has an owner, the driver that claimed it. A driver shows that it lives by a counter that a thread increments. No
clocks are compared: a driver is dead if its counter does not change for `stale_after` seconds of the observer's clock,
or at once if its process was on this machine and has ended. A driver that cannot increment its counter for that long
has lost its trials.

Imports neither Ray nor torch; SQLAlchemy, which comes with Optuna, only when called.
"""

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from .databases import PAUSES, attempt, database_error, database_text, engine_address, trial_tables
from .lease import pid_namespace, start_time

T = TypeVar("T")
EVERY, STALE_AFTER = 20.0, 90.0
"""Seconds from one increment of a driver's counter to the next, and without one after which it is dead."""
MAX_REJECTIONS = 5
"""Consecutive changes that a database may reject although nothing in it explains why."""


@dataclass(frozen=True, slots=True)
class SharedTrial:
    """A trial as the database has it."""

    trial: str
    owner: str
    """Driver that claimed it; "" for none."""
    plan: str
    """Its plan as JSON."""
    record: str
    """Its record as JSON; "" until it has ended."""


class TrialDatabase:
    """The trials of one sweep, shared by its drivers. Thread-safe."""

    def __init__(self, address: str, sweep: str, *, every: float = EVERY, stale_after: float = STALE_AFTER) -> None:
        """Open the database, make its tables where they are absent, and show that this driver lives.

        Args:
            address: Address of the database, as SQLAlchemy reads it.
            sweep: Name of the sweep.
            every, stale_after: As `EVERY` and `STALE_AFTER`; the same for all drivers.

        Raises:
            ValueError: The database cannot be opened.
        """
        from sqlalchemy import create_engine
        from sqlalchemy.engine import make_url

        self.address, self.sweep = address, sweep
        self.owner = uuid.uuid4().hex
        """Name of this driver among those of the sweep."""
        self._every, self._stale_after = every, stale_after
        self._seen = 0
        self._beats: dict[str, tuple[int, float]] = {}
        self._dead: set[str] = set()
        self._lost = self._problem = ""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        try:
            url = make_url(engine_address(address))
            if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
                raise ValueError("a database in memory, which ends with its process")
            timeout = {"connect_args": {"timeout": 60}} if url.get_backend_name() == "sqlite" else {}
            self._engine = create_engine(url, pool_pre_ping=True, hide_parameters=True, **timeout)
            self._tables = trial_tables()
            self._attempt(self._make, PAUSES[:2])
        except Exception as error:  # SQLAlchemy and the drivers of databases raise many types
            raise ValueError(
                f"`study_storage` must be a database that can be opened, but got {database_text(address)}: "
                f"{database_error(error.__cause__ or error, address)}"
            ) from None
        self._renewed = time.monotonic()
        self._thread = threading.Thread(target=self._beat, name="trial-database", daemon=True)
        self._thread.start()

    def __str__(self) -> str:
        return database_text(self.address)

    @property
    def lost(self) -> str:
        """Reason why this driver must stop, because others count it as dead; "" if they do not."""
        silent = time.monotonic() - self._renewed
        if not self._lost and silent > self._stale_after:
            why = self._problem or "it does not respond"
            self._lost = f"`study_storage` must stay reachable, but {self} was not for {silent:.0f} s: {why}"
        return self._lost

    def agree(self, decide: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        """Change what all drivers agree on (the content of sweep.json), while no other driver can; return it.

        Args:
            decide: Returns the new content, given the present one, {} if there is none.
        """

        def change() -> dict[str, Any]:
            sweeps = self._tables["sweeps"]
            with self._changing() as (connection, _):
                where = sweeps.c.name == self.sweep
                text = connection.execute(sweeps.select().where(where)).one().identity
                decided = decide(json.loads(text or "{}"))
                connection.execute(sweeps.update().where(where).values(identity=json.dumps(decided)))
            return decided

        return self._attempt(change)

    def agreed(self) -> dict[str, Any]:
        """Return what all drivers agree on (the content of sweep.json); {} before the first has opened the sweep."""
        sweeps = self._tables["sweeps"]

        def read() -> Any:
            with self._engine.connect() as connection:
                return connection.execute(sweeps.select().where(sweeps.c.name == self.sweep)).one().identity

        found: dict[str, Any] = json.loads(self._attempt(read) or "{}")
        return found

    def changes(self) -> list[SharedTrial]:
        """Return the trials that have changed since the last call, all at the first one, in the order of changes."""
        trials = self._tables["trials"]

        def read() -> list[Any]:
            query = trials.select().where((trials.c.sweep == self.sweep) & (trials.c.revision > self._seen))
            with self._engine.connect() as connection:
                return list(connection.execute(query.order_by(trials.c.revision)))

        rows = self._attempt(read)
        self._seen = max([self._seen, *(row.revision for row in rows)])
        return [SharedTrial(row.trial, row.owner, row.plan, row.record) for row in rows]

    def add(self, trial: str, group: str, digest: str, plan: str, *, record: str = "", claim: bool = True) -> bool:
        """Add a trial, and return whether it was added.

        Args:
            trial: Its name.
            group, digest: It is not added if another trial of this group and stage has this digest of its settings.
            plan: Its plan as JSON.
            record: Its record as JSON, where it has ended.
            claim: Whether this driver claims it.
        """
        owner = self.owner if claim else ""
        trials = self._tables["trials"]

        def insert() -> bool:
            same = (trials.c.trial == trial) | ((trials.c.group == group) & (trials.c.digest == digest))
            with self._changing() as (connection, revision):
                known = connection.execute(trials.select().where((trials.c.sweep == self.sweep) & same)).all()
                if known:  # also by this call, before its connection was lost
                    return bool(owner) and any(row.trial == trial and row.owner == owner for row in known)
                row = {"sweep": self.sweep, "trial": trial, "group": group, "digest": digest, "owner": owner}
                connection.execute(trials.insert().values(**row, plan=plan, record=record, revision=revision))
            return True

        return self._attempt(insert)

    def find(self, trial: str) -> SharedTrial | None:
        """Return a trial as it is now; None if the database has none of its name."""
        trials = self._tables["trials"]

        def read() -> Any:
            query = trials.select().where((trials.c.sweep == self.sweep) & (trials.c.trial == trial))
            with self._engine.connect() as connection:
                return connection.execute(query).one_or_none()

        row = self._attempt(read)
        return None if row is None else SharedTrial(row.trial, row.owner, row.plan, row.record)

    def take(self, trial: str, owner: str) -> bool:
        """Claim a trial without a record that has `owner`, a dead driver or "" for none; return whether it was so."""
        return self._update(trial, {"owner": self.owner}, owner=owner, record="")

    def note(self, trial: str, plan: str) -> bool:
        """Store the plan of a trial of this driver; return whether it is one, and has not ended."""
        return self._update(trial, {"plan": plan}, owner=self.owner, record="")

    def settle(self, trial: str, plan: str, record: str) -> bool:
        """Store the plan and record of an ended trial of this driver; return whether it is one."""
        return self._update(trial, {"plan": plan, "record": record, "owner": ""}, owner=self.owner, record="")

    def replace(self, seen: SharedTrial, plan: str, record: str) -> bool:
        """Store another plan and record of a trial that no driver runs; return whether it was still as it was seen.

        Args:
            seen: The trial as the caller has seen it.
            plan, record: The new ones.
        """
        values = {"plan": plan, "record": record, "owner": ""}
        return self._update(seen.trial, values, owner=seen.owner, plan=seen.plan, record=seen.record)

    def reopen(self, trial: str, plan: str, record: str) -> bool:
        """Remove the record of a trial, which is run again by a new plan; return whether it had that record."""
        return self._update(trial, {"plan": plan, "record": "", "owner": ""}, record=record)

    def is_alive(self, owner: str) -> bool:
        """Return whether a driver lives, as far as this one can determine; a dead one never lives again."""
        if owner == self.owner:
            return True
        if not owner or owner in self._dead:
            return False
        drivers = self._tables["drivers"]

        def read() -> Any:
            query = drivers.select().where((drivers.c.sweep == self.sweep) & (drivers.c.owner == owner))
            with self._engine.connect() as connection:
                return connection.execute(query).one_or_none()

        row = self._attempt(read)
        if row is not None and not _has_ended(json.loads(row.about)):
            beat, since = self._beats.setdefault(owner, (row.beat, time.monotonic()))
            if beat != row.beat:
                self._beats[owner] = (row.beat, time.monotonic())
            if beat != row.beat or time.monotonic() - since <= self._stale_after:
                return True
        self._dead.add(owner)
        return False

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Let one driver of the sweep at a time run the ``with`` block; the lock of a dead one is taken over."""
        locks = self._tables["locks"]
        where = (locks.c.sweep == self.sweep) & (locks.c.name == name)

        def holder() -> str:
            with self._changing() as (connection, _):
                row = connection.execute(locks.select().where(where)).one_or_none()
                if row is None:
                    connection.execute(locks.insert().values(sweep=self.sweep, name=name, owner=self.owner))
                    return self.owner
                return str(row.owner)

        def take_over(owner: str) -> None:
            with self._changing() as (connection, _):
                connection.execute(locks.delete().where(where & (locks.c.owner == owner)))

        tries = 0
        while (owner := self._attempt(holder)) != self.owner:
            if self.is_alive(owner):
                time.sleep(0.5)
            elif (tries := tries + 1) > MAX_REJECTIONS:
                raise OSError(f"`study_storage` must accept changes, but {self} keeps the lock {name} of a dead driver")
            else:
                self._attempt(partial(take_over, owner))
        try:
            yield
        finally:
            self._attempt(lambda: take_over(self.owner))

    def leave(self) -> None:
        """Give back the trials of this driver that have no record, and remove it from the drivers."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(self._every)
        trials, drivers = self._tables["trials"], self._tables["drivers"]

        def give_back() -> None:
            with self._changing() as (connection, revision):
                mine = (trials.c.sweep == self.sweep) & (trials.c.owner == self.owner) & (trials.c.record == "")
                connection.execute(trials.update().where(mine).values(owner="", revision=revision))
                connection.execute(drivers.delete().where(drivers.c.owner == self.owner))

        with suppress(OSError):  # others find out that this driver has gone
            self._attempt(give_back, pauses=())
        self._engine.dispose()

    def _update(self, trial: str, values: dict[str, str], **expected: str) -> bool:
        trials = self._tables["trials"]

        def update() -> bool:
            with self._changing() as (connection, revision):
                where = (trials.c.sweep == self.sweep) & (trials.c.trial == trial)
                row = connection.execute(trials.select().where(where)).one_or_none()
                if row is None:
                    return False
                if any(getattr(row, name) != value for name, value in expected.items()):
                    return all(getattr(row, name) == value for name, value in values.items())  # done, by a lost call
                connection.execute(trials.update().where(where).values(**values, revision=revision))
            return True

        return self._attempt(update)

    @contextmanager
    def _changing(self) -> Iterator[tuple[Any, int]]:
        """Open a transaction in which no other driver changes the sweep; yield its connection and the new revision."""
        sweeps = self._tables["sweeps"]
        where = sweeps.c.name == self.sweep
        with self._engine.begin() as connection:
            connection.execute(sweeps.update().where(where).values(revision=sweeps.c.revision + 1))
            yield connection, int(connection.execute(sweeps.select().where(where)).one().revision)

    def _make(self) -> None:
        """Make the tables and the rows of this sweep and driver, which other drivers may do at the same time."""
        from sqlalchemy.exc import DBAPIError

        with suppress(DBAPIError):  # another driver has made them after they were looked for
            self._tables["sweeps"].metadata.create_all(self._engine)
        sweeps, drivers = self._tables["sweeps"], self._tables["drivers"]
        with suppress(DBAPIError), self._engine.begin() as connection:
            if connection.execute(sweeps.select().where(sweeps.c.name == self.sweep)).one_or_none() is None:
                connection.execute(sweeps.insert().values(name=self.sweep, revision=0, identity=""))
        about = {
            "host": platform.node(),
            "pid": os.getpid(),
            "place": pid_namespace(),
            "birth": start_time(os.getpid()),
        }
        with self._engine.begin() as connection:
            connection.execute(drivers.delete().where(drivers.c.owner == self.owner))
            row = {"sweep": self.sweep, "owner": self.owner, "beat": 0, "about": json.dumps(about)}
            connection.execute(drivers.insert().values(**row))

    def _beat(self) -> None:
        drivers = self._tables["drivers"]
        increment = drivers.update().where(drivers.c.owner == self.owner).values(beat=drivers.c.beat + 1)
        while not self._stop.wait(self._every):
            started = time.monotonic()
            try:
                with self._engine.begin() as connection:
                    connection.execute(increment)
            except Exception as error:  # a driver of a database may raise anything
                self._problem = database_error(error, self.address)
                continue
            if self.lost:  # another driver may have taken the trials meanwhile
                return
            self._renewed = started

    def _attempt(self, function: Callable[[], T], pauses: Sequence[float] = PAUSES) -> T:
        return attempt(function, self.address, pauses)


def _has_ended(about: dict[str, Any]) -> bool:
    """Return whether a driver's process was on this machine and has ended."""
    place = pid_namespace()
    return bool(place) and about["place"] == place and start_time(about["pid"]) not in ("unknown", about["birth"])
