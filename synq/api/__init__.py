"""The Python API: what `import synq` offers, loaded on first use."""
