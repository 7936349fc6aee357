"""State of a sweep on disk, from which it resumes: its folder, the plans of trials, the ledger."""
