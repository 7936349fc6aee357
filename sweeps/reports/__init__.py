"""HTML reports and terminal summaries of runs and sweeps."""

PAGE = "report.html"
"""Default file name of a report in the folder of its run or sweep."""
