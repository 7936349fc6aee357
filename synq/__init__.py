"""SynQ: zero-shot quantization of image classifiers by synthesis-aware fine-tuning."""

__version__ = "0.1.0"
