"""The benchmarks of `synq bench`: one file a group of measurements."""
