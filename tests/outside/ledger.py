"""The tests of transformers that cannot pass on a patched model, each with the reason."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import NamedTuple


class Excuse(NamedTuple):
    """A test that passes stock and fails patched, and why that is right.

    Attributes:
        test: its name; `*` stands for anything, as parametrised tests end in their parameters.
        families: the families it is excused for; () is all of them.
    """

    test: str
    reason: str
    families: tuple[str, ...] = ()

    def covers(self, test: str, family: str) -> bool:
        return fnmatchcase(test.split(".")[-1], self.test) and (not self.families or family in self.families)


LEDGER: list[Excuse] = []

# Files at the top of transformers' tests that say nothing about a model that generates, or cannot run here.
_NO_MODEL = "makes no model that generates"
_MANY_PROCESSES = "starts processes of its own, over a module that the sdist lacks; the patch would not be in them"
NOT_COLLECTED: dict[str, str] = {
    "test_backbone_common.py": _NO_MODEL,
    "test_configuration_common.py": _NO_MODEL,
    "test_decision_head_common.py": _NO_MODEL,
    "test_expert_parallel_mixin.py": _MANY_PROCESSES,
    "test_feature_extraction_common.py": _NO_MODEL,
    "test_fsdp_mixin.py": _MANY_PROCESSES,
    "test_image_processing_common.py": _NO_MODEL,
    "test_image_transforms.py": _NO_MODEL,
    "test_memory_cleanup_mixin.py": "a mixin without tests",
    "test_monkey_patching.py": _NO_MODEL,
    "test_pipeline_mixin.py": "loads its models from the Hub",
    "test_processing_common.py": _NO_MODEL,
    "test_sentencepiece_backend_mixin.py": _NO_MODEL,
    "test_sequence_feature_extraction_common.py": _NO_MODEL,
    "test_tensor_parallel_mixin.py": _MANY_PROCESSES,
    "test_tokenization_common.py": _NO_MODEL,
    "test_tokenization_mistral_common.py": _NO_MODEL,
    "test_tokenizers_backend_mixin.py": _NO_MODEL,
    "test_video_processing_common.py": _NO_MODEL,
}
