"""CodeGen: plain causal attention in a method of its own, the same as GPT-J's."""

from torch_paged.hf.family import Family
from torch_paged.patches import gptj

FAMILY = Family(attention="CodeGenAttention", native_class=gptj.FAMILY.native_class)
