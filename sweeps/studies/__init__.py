"""Comparisons with a fixed plan: ablations, recipes, studies of the fidelity measure."""
