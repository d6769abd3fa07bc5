"""The command line: `python -m torch_paged demo | bench | env`."""
