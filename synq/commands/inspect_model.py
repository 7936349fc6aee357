#!/usr/bin/env python3
"""What SynQ will do with a classifier, layer by layer: `synq/commands/inspect_model.py [TEACHER] [--json] [--config FILE] [--KEY VALUE ...]`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # as a file, launch/ comes first on the path, not the project
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from synq.commands.arguments import exit_code
from synq.config.run import RunConfig, make_absolute
from synq.train import read_command_line

HELP = """\
usage: synq inspect [TEACHER] [--json] [--config FILE] [--KEY VALUE ...]

Shows what would be done with a classifier, and makes nothing: every operation of its forward pass with the width that weight (W) and output
(out) would get, 32 for float and for what only hands on its input, such as max pooling (BitOps count the width that is read); the batch norms that guide the synthesis; where class activation maps are taken, and how; parameters,
multiply-accumulates (MACs), bit operations (BitOps), sizes. A classifier that cannot be quantized is refused as a run would refuse it.

  TEACHER        as `--teacher.spec`: bundled:NAME, torchvision:NAME, timm:NAME, pytorchcv:NAME or FILE.py:FUNCTION (default: the bundled one);
                 the first word, before any key
  --json         one JSON object instead of tables
  --KEY VALUE    as for `synq train`; those of `teacher` and `quant` count, for example --teacher.weights random, --quant.weight_bits 3"""


def main(argv: Sequence[str] | None = None) -> int:
    """Print what `synq.diagnostics.inspection` finds and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if any(word in ("-h", "--help") for word in words):
        print(HELP)
        return 0
    as_json = "--json" in words
    words = [word for word in words if word != "--json"]

    def work() -> None:
        config, _ = read_command_line(words)
        _show(make_absolute(config), as_json)

    return exit_code(work)


def _show(config: RunConfig, as_json: bool) -> None:
    from synq.common.text_tables import to_text
    from synq.diagnostics.inspection import COLUMNS, HEADINGS, inspect, summary
    from synq.pipeline import build_student
    from synq.teacher.teacher import load_teacher

    teacher = load_teacher(config.teacher)
    found = inspect(teacher, build_student(teacher, config.quant), config.quant)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    rows = [
        {name: value or None for name, value in row.items()} for row in found["layers"]
    ]  # a table of zeros is hard to read
    print(to_text(rows, COLUMNS, HEADINGS))
    print(summary(found), end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
