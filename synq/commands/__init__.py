"""The subcommands of `synq`, one file each; the only modules of the package that import sweeps/, and only when they run."""
