"""What the installed transformers offers, probed feature by feature: versions are never compared."""

from __future__ import annotations

import inspect

from transformers import GenerationMixin
from transformers.cache_utils import CacheLayerMixin, DynamicCache

PREFILL_PARAMETERS = ["self", "input_ids", "generation_config", "model_kwargs"]


def probe() -> dict[str, bool]:
    """Names of the hooks the patch uses, and whether this transformers has them."""
    prefill = getattr(GenerationMixin, "_prefill", None)
    return {
        "_prepare_cache_for_generation": hasattr(GenerationMixin, "_prepare_cache_for_generation"),
        "_prefill": prefill is not None and list(inspect.signature(prefill).parameters)[:4] == PREFILL_PARAMETERS,
        "DynamicCache(config=)": "config" in inspect.signature(DynamicCache.__init__).parameters,
        "CacheLayerMixin.get_max_length": hasattr(CacheLayerMixin, "get_max_length"),
    }
