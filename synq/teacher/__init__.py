"""Load the pre-trained classifier: sources, weight files, and the classifiers that ship with the package."""
