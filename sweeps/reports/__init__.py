"""Pages that show what came of runs and sweeps."""
