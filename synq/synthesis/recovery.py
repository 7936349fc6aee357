"""Recovery of sets: damaged ones are set aside, damaged parts are made again, parts are locked while they are made."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from filelock import Timeout

from synq.common.files import DamagedFileError
from synq.common.notices import print_notice
from synq.synthesis.dataset import SyntheticSet
from synq.synthesis.store import SetStore

R = TypeVar("R")


def intact_set(store: SetStore, key: str) -> SyntheticSet | None:
    """Load a set; None if there is none, or a damaged one, which is set aside.

    Args:
        store: The store.
        key: Key of the set.

    Raises:
        DamagedFileError: The set is damaged, and the store cannot be written.
    """
    try:
        return store.load(key)
    except DamagedFileError:
        store.set_aside(key)
        return store.load(key)


def without_damage(work: Callable[[], R], files: Sequence[Path]) -> R:
    """Return what `work` returns; a part that it finds damaged is removed, with a notice, and made again by it.

    Args:
        work: Makes the missing parts and reads them.
        files: The parts.

    Raises:
        DamagedFileError: Another file is damaged.
    """
    for _ in files:
        try:
            return work()
        except DamagedFileError as error:
            if error.path not in files:
                raise
            print_notice(f"warning: {error.path} differs from its digest; this part of the set is made again")
            error.path.unlink(missing_ok=True)
    return work()


@contextmanager
def try_lock(store: SetStore, key: str, part: str) -> Iterator[bool]:
    """Acquire the lock of one part without blocking; yield whether it was acquired.

    Args:
        store: The store.
        key: Key of the set.
        part: As for `SetStore.lock`.
    """
    lock = store.lock(key, part)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
