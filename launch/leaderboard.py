#!/usr/bin/env python3
"""Rebuild trials.csv and leaderboard.csv from records: `launch/leaderboard.py PATH...`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # as a file, launch/ comes first on the path, not the project
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from sweeps.leaderboard import main

if __name__ == "__main__":
    sys.exit(main())
