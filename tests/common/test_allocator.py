"""The allocator: freed buffers are kept where nobody else tunes it."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
from synq.common.allocator import keep_buffers
kept = keep_buffers() if sys.argv[1] == "keep" else None
def fill():
    for _ in range(3):
        bytearray(48 * 2**20)
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _run(mode: str, **environment: str) -> tuple[str, int]:
    import os

    plain = {name: text for name, text in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC", "LD_PRELOAD"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True, env={**plain, **environment}
    )
    kept, faults = done.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_m_12_buffers_above_the_limit_of_the_c_library_are_kept() -> None:
    kept, faults = _run("keep")
    _, plain = _run("leave")
    assert kept == "True" and faults < plain / 10, (faults, plain)


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_m_12_an_allocator_that_the_user_tunes_stays_as_it_is(name: str) -> None:
    text = "glibc.malloc.arena_max=1" if name == "GLIBC_TUNABLES" else "2"
    assert _run("keep", **{name: text})[0] == "False"
