"""One module per model family that needs more than the attention interface, found by the family's model type."""
