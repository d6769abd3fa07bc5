"""generate_many: any number of requests through one model, tokens of many of them in each forward pass."""

from torch_paged.hf.many.generate_many import GenerateMany, generate_many
from torch_paged.hf.many.request import GenerationRequest, GenerationResult, NewTokens
from torch_paged.hf.many.stats import ManyStats, Percentiles

__all__ = [
    "GenerateMany",
    "GenerationRequest",
    "GenerationResult",
    "ManyStats",
    "NewTokens",
    "Percentiles",
    "generate_many",
]
