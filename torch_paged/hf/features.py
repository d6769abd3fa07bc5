"""What the installed transformers offers, probed feature by feature: versions are never compared."""

from __future__ import annotations

import inspect

from transformers import GenerationMixin
from transformers.cache_utils import CacheLayerMixin, DynamicCache

PREFILL_PARAMETERS = ["self", "input_ids", "generation_config", "model_kwargs"]

DECODING_PARAMETERS = ["self", "input_ids", "logits_processor", "stopping_criteria", "generation_config"]
TOP_K_PARAMETERS = [
    "self", "accumulated_log_probs", "running_sequences", "running_beam_indices", "cur_len", "decoder_prompt_len",
    "do_sample", "beams_to_keep", "num_beams", "batch_size",
]  # fmt: skip
BEAM_PARAMETERS = [
    "is_early_stop_heuristic_unsatisfied", "is_sent_finished", "next_token_hits_stopping_criteria", "early_stopping"
]  # fmt: skip


def probe() -> dict[str, bool]:
    """Names of the hooks the patch uses, and whether this transformers has them."""
    return {
        "_prepare_cache_for_generation": hasattr(GenerationMixin, "_prepare_cache_for_generation"),
        "_prefill": _parameters("_prefill")[:4] == PREFILL_PARAMETERS,
        "_sample": _parameters("_sample")[:5] == DECODING_PARAMETERS,
        "_beam_search": _parameters("_beam_search")[:5] == DECODING_PARAMETERS
        and _parameters("_beam_search_has_unfinished_sequences") == BEAM_PARAMETERS,
        "_get_top_k_continuations": _parameters("_get_top_k_continuations")[: len(TOP_K_PARAMETERS)]
        == TOP_K_PARAMETERS,
        "DynamicCache(config=)": "config" in inspect.signature(DynamicCache.__init__).parameters,
        "CacheLayerMixin.get_max_length": hasattr(CacheLayerMixin, "get_max_length"),
    }


def _parameters(name: str) -> list[str]:
    method = getattr(GenerationMixin, name, None)
    return [] if method is None else list(inspect.signature(method).parameters)
