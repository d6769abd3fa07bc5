"""The outside judge: transformers' own tests, on patched models. What passes stock must pass patched.

    python -m tests.outside.fetch          the sdist of the transformers that `dev` pins, into .ci (once)
    pytest tests/outside                   a handful of families, and some that change with every commit
    pytest tests/outside --outside all     all of them; or names of families, with commas between
    python -m tests.outside.judge llama    one family, test by test

The sdist has the top of transformers' tests folder: `ModelTesterMixin`, `TrainingTesterMixin`, and what they need is
here, so we give them tiny models (families.py) and run them. Its folders tests/generation and tests/models are in git
alone: with a checkout of the same version, `TORCH_PAGED_TRANSFORMERS=/path/to/transformers pytest tests/outside`
runs the tests of generation and of each family as transformers itself runs them.

Every test runs on stock models first, and once more with every model that it builds patched (patched.py). ledger.py
names what cannot pass, with the reason.
"""
