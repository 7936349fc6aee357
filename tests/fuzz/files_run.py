"""A long run over random files: `python -m fuzz.files_run --count 5000 --seed 1` from the folder tests.

Prints a line per fault (kind, seed, what happened) and a summary; ends with 1 if there is a fault. A file is made again
from its kind and seed alone, so nothing is stored.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from fuzz.files_inputs import INPUTS


def check(kind: str, seed: int, folder: Path) -> str:
    """Make and read the file of a kind and seed in an emptied folder; return what came of it.

    Raises:
        Exception: A fault: any exception but a rejection in one line.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return INPUTS[kind](random.Random(f"{kind} {seed}"), folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0, help="number of the first file")
    parser.add_argument("--kinds", nargs="+", choices=list(INPUTS), default=list(INPUTS))
    args = parser.parse_args(argv)
    results: Counter[str] = Counter()
    started, faults = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(args.seed, args.seed + args.count):
            kind = args.kinds[number % len(args.kinds)]
            try:
                said = check(kind, number, Path(temporary) / "files")
                results[f"{kind} {'read' if said == 'read' else 'rejected'}"] += 1
            except Exception as error:
                faults += 1
                last = traceback.extract_tb(error.__traceback__)[-1]
                text = " ".join(str(error).split())[:300]
                print(f"FAULT {kind} {number}: {type(error).__name__}: {text} [{last.name}:{last.lineno}]", flush=True)
            if (number - args.seed) % 500 == 499:
                print(f"{number + 1 - args.seed} files, {faults} faults", flush=True)
    print(f"{args.count} files from seed {args.seed}, {faults} faults, {time.perf_counter() - started:.0f} s")
    print(", ".join(f"{name} {number}" for name, number in sorted(results.items())))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
