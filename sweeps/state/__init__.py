"""What a sweep writes to resume: its folder, plans of trials, the ledger."""
