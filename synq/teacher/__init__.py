"""The pre-trained classifier: model sources, weight files, and the models that are part of the package."""
