#!/usr/bin/env python3
"""Tables of sweeps from their records, merged, filtered or compared: `synq/commands/leaderboard.py PATH... [--where weight_bits=4] [--compare]`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # as a file, launch/ comes first on the path, not the project
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from synq.sweeps.leaderboard.records import main

if __name__ == "__main__":
    sys.exit(main())
