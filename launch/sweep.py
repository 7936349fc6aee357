#!/usr/bin/env python3
"""`synq sweep` as a file, for a checkout that is not installed: `ray job submit ... -- python launch/sweep.py SPEC`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python puts the folder of the script on the path, not the project
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from synq.commands.sweep import main
from synq.common.exit_codes import leave

if __name__ == "__main__":
    leave(main())
