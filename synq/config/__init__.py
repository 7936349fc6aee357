"""Settings of a run as frozen dataclasses, their strict parsing, digests and command line. Importing it loads no torch."""
