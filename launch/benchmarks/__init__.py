"""The parts of `launch/bench.py`: one file a group of figures."""
