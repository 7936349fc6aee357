"""The process that runs a sweep: Ray Tune, Optuna, ASHA, progress."""
