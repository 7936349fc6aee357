"""What runs on a worker: one trial, in one process or several."""
