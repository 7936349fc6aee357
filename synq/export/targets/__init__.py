"""The files of students for an engine: written from the integer program, verified and timed in the engine itself."""
