"""Pages that show what came of runs and sweeps."""

PAGE = "report.html"
"""Name of a page in the folder of its run or sweep."""
