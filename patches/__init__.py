"""One module per model family that needs more than the attention interface, named by the family's model type.

Each defines `FAMILY`, a `torch_paged.hf.family.Family`. Its attention class runs the model's own code in every call
but native ones, where it stores K and V through the cache and attends through `attend`.
"""
