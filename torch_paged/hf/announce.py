"""Announce a forward pass to its PagedCache: which new columns are tokens, and whether it can run natively."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from torch_paged.hf.cache import PagedCache
from torch_paged.hf.call import Call, current
from torch_paged.hf.support import Path, Support

if TYPE_CHECKING:
    from torch_paged.hf.handle import PagedHandle


@contextmanager
def announced(cache: PagedCache, inputs: dict[str, Any], *, native: bool, handle: PagedHandle) -> Iterator[None]:
    """Announce the forward pass over `inputs` to `cache`; take it back if the pass raises."""
    call = make_call(cache, inputs, native=native, handle=handle)
    if call is None:
        yield
        return
    outer, current.call = current.call, call
    try:
        cache.announce(call)
        yield
    except BaseException:
        cache.rollback(call)
        raise
    finally:
        current.call = outer


def make_call(cache: PagedCache, inputs: dict[str, Any], *, native: bool, handle: PagedHandle) -> Call | None:
    """The Call for these model inputs; None if they are of a kind that only the layers can tell.

    Raises:
        ValueError: the mask shows columns that were hidden, and therefore not stored, in an earlier call.
    """
    tokens = inputs.get("input_ids")
    tokens = inputs.get("inputs_embeds") if tokens is None else tokens
    mask = inputs.get("attention_mask")
    if not isinstance(tokens, Tensor) or tokens.ndim < 2:
        return None
    num_seqs, width = int(tokens.shape[0]), int(tokens.shape[1])
    if not native:
        return Call(num_seqs, width)
    columns = cache.state.columns
    relation = "same"
    call = Call(num_seqs, width)
    if mask is None or tuple(mask.shape) == (num_seqs, columns.count + width):
        relation = columns.compare(mask)
        if relation == "reveals":
            raise ValueError(
                f"attention_mask: {'None' if mask is None else 'shows columns that earlier calls hid'}; must keep "
                "hiding the padding of earlier calls, which a PagedCache does not store"
            )
        new = None if mask is None else mask[:, columns.count :].bool()
        if new is not None and not bool(new.all()):
            call = Call(num_seqs, width, new.cpu().numpy())
    else:
        relation = "other"
    reason = _not_native(cache, call, inputs, relation)
    if reason is None:
        call.native = True
    else:
        handle.voice.say(Support(Path.GATHER, reason), strict=handle.config.strict)
    return call


def _not_native(cache: PagedCache, call: Call, inputs: dict[str, Any], relation: str) -> str | None:
    """Why attention cannot read the blocks in place in this call, or None."""
    if inputs.get("output_attentions"):
        return "output_attentions needs the weights of the model's own attention"
    if relation == "other":
        return "attention_mask is not one row of columns per sequence"
    if relation == "hides":
        return "attention_mask hides tokens that are stored"
    if any(cache.is_sliding) and _has_holes(cache, call):
        return "attention_mask has holes under a sliding window, which counts them"
    return None


def _has_holes(cache: PagedCache, call: Call) -> bool:
    """Whether a hidden column stands after a stored one, so that distances in columns and in tokens differ."""
    if call.valid is None and cache.state.columns.all_stored:
        return False
    stored = cache.state.columns.stored(call.num_seqs).numpy()
    new = np.ones((call.num_seqs, call.width), dtype=bool) if call.valid is None else call.valid
    everything = np.concatenate([stored, new], 1)
    return bool((everything[:, :-1] & ~everything[:, 1:]).any())
