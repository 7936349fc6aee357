"""Runs of many random networks, and the shortening of those that fail.

python tests/fuzz/networks_run.py --count 1000 --seed 0 --shard 0/2 --log faults.txt     # from the project's folder
"""

import argparse
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":  # as a script: the packages of the checkout
    sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from fuzz.networks import Network, draft
from fuzz.networks_checks import check_network
from fuzz.networks_rejections import DifferenceError

NUMBERS = 12
"""Largest number of pieces."""


@dataclass
class Report:
    """Result of a run.

    Attributes:
        checked, accepted, exports: Numbers of networks, and of files.
        reordered: Number of accepted networks whose traced copy adds in another order than the module.
        rejections: Reasons of rejections, shortened, and how often.
        faults: Text of each fault: seed, error, short source.
        seconds: Time.
    """

    checked: int = 0
    accepted: int = 0
    exports: int = 0
    reordered: int = 0
    rejections: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.checked} networks, {self.accepted} accepted ({self.reordered} with sums in another order), "
            f"{self.checked - self.accepted - len(self.faults)} rejected, {self.exports} files, "
            f"{len(self.faults)} faults, {self.seconds:.0f} s"
        )


def fault_of(network: Network, *, exports: bool) -> str | None:
    """Return the kind of a network's fault, None if there is none."""
    return _fault(network, exports)[0]


def _fault(network: Network, exports: bool) -> tuple[str | None, str, Report]:
    report = Report(checked=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = check_network(network, exports=exports)
    except DifferenceError as error:
        kind = str(error).split(": ")
        return f"DifferenceError {kind[0][:40] if len(kind) < 3 else kind[1][:40]}", str(error), report
    except Exception as error:  # a traceback of any other type is a fault
        return (
            type(error).__name__,
            "".join([f"{type(error).__name__}: {error}\n", *traceback.format_tb(error.__traceback__)[-4:]]),
            report,
        )
    report.exports = outcome.exports
    report.accepted = not outcome.rejected
    report.reordered = not outcome.is_identical
    if outcome.rejected:
        report.rejections[outcome.rejected[:150]] += 1
    return None, "", report


def shortened(seed: int, kind: str, *, exports: bool) -> Network:
    """Return a network of a failing seed with as few pieces as fail in the same way."""
    skip: set[int] = set()
    for number in (*reversed(range(1, NUMBERS)), -1, 0):
        try:
            network = draft(seed, {*skip, number})
        except AssertionError:
            continue
        if fault_of(network, exports=exports) == kind:
            skip.add(number)
    return draft(seed, skip)


def run(seeds: Iterable[int], *, exports: bool = False, log: Path | None = None, shorten: bool = True) -> Report:
    """Check the networks of seeds.

    Args:
        seeds: Their seeds.
        exports: Whether to export them too.
        log: File to which faults are appended as they are found.
        shorten: Whether to look for a shorter network of each fault.
    """
    total, begun = Report(), time.perf_counter()
    for seed in seeds:
        network = draft(seed)
        kind, text, report = _fault(network, exports)
        total.checked += 1
        total.accepted += report.accepted
        total.exports += report.exports
        total.reordered += report.reordered
        total.rejections += report.rejections
        if kind is not None:
            short = shortened(seed, kind, exports=exports) if shorten else network
            total.faults.append(f"seed {seed} {short.size} {short.pieces}\n{text}\n{_body(short)}")
            if log is not None:
                with log.open("a") as file:
                    file.write(total.faults[-1] + "\n" + "-" * 100 + "\n")
    total.seconds = time.perf_counter() - begun
    return total


def _body(network: Network) -> str:
    """Return the classes of a source, without what all files share."""
    return network.source.partition("from torch import nn\n")[2].partition("\n\n\ndef make")[0].strip()


def main() -> None:
    """Check networks from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--exports", action="store_true")
    parser.add_argument("--log", type=Path)
    parser.add_argument("--long", action="store_true", help="do not look for shorter networks")
    parser.add_argument("--show", action="store_true", help="print the source of the first seed")
    options = parser.parse_args()
    number, shards = (int(part) for part in options.shard.split("/"))
    if options.show:
        print(draft(options.seed).source)
    report = run(
        range(options.seed + number, options.seed + options.count, shards),
        exports=options.exports,
        log=options.log,
        shorten=not options.long,
    )
    for reason, times in report.rejections.most_common(40):
        print(f"{times:6}  {reason}")
    print("\n\n".join(report.faults))
    print(report)
    sys.exit(bool(report.faults))


if __name__ == "__main__":
    main()
