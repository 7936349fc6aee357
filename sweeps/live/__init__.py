"""The page of sweeps and runs in a browser while they run: read-only, by default on the loopback address."""
