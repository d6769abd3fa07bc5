"""What the emulator finds wrong with a kernel."""

from __future__ import annotations


class Finding(Exception):
    """An access or a flow that is wrong whatever numbers come out; the text names file, line, block and thread."""
