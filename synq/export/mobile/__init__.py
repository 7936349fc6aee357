"""Parts of the writers of files for LiteRT and ExecuTorch."""
