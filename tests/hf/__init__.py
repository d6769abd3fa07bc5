"""Tests of the HuggingFace layer; a package, as they share models.py and counting.py."""
