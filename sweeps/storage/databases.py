"""Addresses and errors of databases, for messages without a password, and the tables of shared sweeps.

Imports SQLAlchemy, which comes with Optuna, only when called.
"""

import importlib.util
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 16.0)
"""Seconds before each retry while a server cannot be reached: most of a minute, as its restart may take."""


def database_text(address: str) -> str:
    """Return the address of a database for messages: without its password and its options."""
    plain = re.sub(r"(://[^:/@]*):[^@]*@", r"\1:...@", address)
    return plain.partition("?")[0]


def engine_address(address: str) -> str:
    """Return an address with a driver of PostgreSQL that is installed, where it names none."""
    scheme, _, rest = address.partition("://")
    if scheme not in ("postgresql", "postgres"):
        return address
    found = next((name for name in ("psycopg", "psycopg2") if importlib.util.find_spec(name)), "psycopg")
    return f"postgresql+{found}://{rest}"


def database_error(error: BaseException, address: str) -> str:
    """Return the message of an error of a database: one line, without password."""
    if isinstance(error, ImportError) and "psycopg" in str(error):
        return 'its Python driver is not installed: pip install -e ".[postgresql]"'
    cause = getattr(error, "orig", None) or error
    line = " ".join(str(cause).strip().partition("\n")[0].split())
    for secret in re.findall(r"://[^:/@]*:([^@]*)@", address) + re.findall(r"[?&]password=([^&]*)", address):
        line = line.replace(secret, "...") if secret else line
    return line[:400] or type(cause).__name__


def attempt(function: Callable[[], T], address: str, pauses: Sequence[float] = PAUSES) -> T:
    """Call a function of a database, again after each of some pauses while its server cannot be reached.

    Args:
        function: The function.
        address: Address of the database, for the message.
        pauses: Seconds before each retry.

    Raises:
        OSError: The last error of the connection, or another one of the database.
    """
    from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError

    for pause in (*pauses, 0.0):
        try:
            return function()
        except Exception as error:
            cause = error if isinstance(error, SQLAlchemyError) else error.__cause__  # Optuna's have a cause
            if not isinstance(cause, SQLAlchemyError):
                raise
            if not pause or not isinstance(cause, OperationalError | InterfaceError):
                why = f"{database_text(address)} is not: {database_error(cause, address)}"
                raise OSError(f"`study_storage` must stay reachable, but {why}") from error
        time.sleep(pause)
    raise AssertionError("unreachable")


def trial_tables() -> dict[str, Any]:
    """Return the tables by name; those of all sweeps are the same."""
    from sqlalchemy import Column, Integer, MetaData, String, Table, Text
    from sqlalchemy.dialects.mysql import LONGTEXT

    text, metadata = Text().with_variant(LONGTEXT(), "mysql", "mariadb"), MetaData()

    def key(name: str, length: int = 200, *, primary: bool = True) -> Any:
        return Column(name, String(length), primary_key=primary, nullable=False)

    def whole(name: str) -> Any:
        return Column(name, Integer, nullable=False)

    sweep = [whole("revision"), Column("identity", text, nullable=False)]
    trial = [key("group", primary=False), key("digest", 64, primary=False), key("owner", 32, primary=False)]
    trial += [*(Column(name, text, nullable=False) for name in ("plan", "record")), whole("revision")]
    driver = [key("sweep"), key("owner", 32), whole("beat"), Column("about", text, nullable=False)]
    return {
        "sweeps": Table("synq_sweeps", metadata, key("name"), *sweep),
        "trials": Table("synq_trials", metadata, key("sweep"), key("trial"), *trial),
        "drivers": Table("synq_drivers", metadata, *driver),
        "locks": Table("synq_locks", metadata, key("sweep"), key("name"), key("owner", 32, primary=False)),
    }
