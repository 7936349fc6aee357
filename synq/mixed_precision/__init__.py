"""Choose a bit-width for each tensor within a budget: sensitivity scan and integer linear program."""
