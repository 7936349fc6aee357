"""The parts of `synq/commands/bench.py`: one file a group of figures."""
