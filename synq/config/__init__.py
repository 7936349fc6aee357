"""Settings of a run as frozen dataclasses: strict parsing, digests, the command line. Importing it loads no torch."""
