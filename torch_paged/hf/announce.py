"""Announce a forward pass to its PagedCache: which new columns are tokens, and whether it can run natively."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from torch_paged.hf.cache import PagedCache
from torch_paged.hf.call import Call, current
from torch_paged.hf.support import Path, Support


@contextmanager
def announced(cache: PagedCache | None, call: Call | None) -> Iterator[None]:
    """Announce the forward pass `call` to its cache, if there is one; take it back if the pass raises.

    Raises:
        NeedsOwnAttention: from the pass, which was announced as native and cannot be.
    """
    # A pass without a cache of ours inside another pass, from a hook say, must not inherit that one's call.
    outer = current.call, current.fast_layers, current.asked
    current.call, current.asked = call, None
    current.fast_layers = (
        cache is not None and call is not None and call.native and not call.deterministic and cache.config.fast_layers
    )
    whole = False
    if cache is not None:
        cache.state.pools.line.pass_begins()
    try:
        if cache is not None and call is not None:
            cache.announce(call)
        yield
        whole = True
        if cache is not None and call is not None:
            cache.state.pools.count(math.prod(call.input_shape))
    except BaseException:
        if cache is not None and call is not None:
            cache.rollback(call)
        raise
    finally:
        current.call, current.fast_layers, current.asked = outer
        if cache is not None:
            cache.state.forget_handles()
            cache.state.pools.line.pass_ends(whole=whole)


@contextmanager
def under_way(cache: PagedCache) -> Iterator[None]:
    """Let calls of other threads see a pass that is not announced, as those of encoder-decoders."""
    line, whole = cache.state.pools.line, False
    line.pass_begins()
    try:
        yield
        whole = True
    finally:
        line.pass_ends(whole=whole)


def make_call(
    cache: PagedCache,
    inputs: dict[str, Any],
    *,
    native: bool,
    refusal: str | None = None,
    say: Callable[[Support], None],
) -> Call | None:
    """The Call for these model inputs; None if they are of a kind that only the layers can tell.

    Args:
        inputs: the model's arguments by name.
        native: the model's attention can read blocks in place.
        refusal: why it cannot in this call, if so.
        say: told why this call does not, where it does not.

    Raises:
        ValueError: the mask shows columns that were hidden, and therefore not stored, in an earlier call; or the cache
            holds another number of rows.
    """
    tokens = inputs.get("input_ids")
    tokens = inputs.get("inputs_embeds") if tokens is None else tokens
    attention_mask = inputs.get("attention_mask")
    if not isinstance(tokens, Tensor) or tokens.ndim < 2:
        return None
    num_seqs, width = int(tokens.shape[0]), int(tokens.shape[1])
    cache.state.check_rows(num_seqs)
    if not native:
        return Call(num_seqs, width)
    cache.state.let_finished_leave()
    columns = cache.state.columns
    relation, valid = "same", None
    if cache.state.seen_mask.shows_ones(attention_mask, columns.count + width):
        pass
    elif attention_mask is None or _shape(attention_mask) == (num_seqs, columns.count + width):
        mask = None if attention_mask is None else attention_mask.bool().cpu().numpy()
        relation = columns.compare(None if mask is None else mask[:, : columns.count])
        if relation == "reveals":
            raise ValueError(
                f"attention_mask: {'None' if mask is None else 'shows columns that earlier calls hid'}; must be that "
                "of all columns, and go on hiding the padding of earlier calls, which a PagedCache does not store"
            )
        if mask is not None:
            valid = mask[:, columns.count :].copy()
        if relation == "same" and isinstance(attention_mask, Tensor):
            cache.state.seen_mask.see(attention_mask)
    else:
        relation = "other"
    if columns.gone is not None:
        valid = (np.True_ if valid is None else valid) & np.repeat(~columns.gone[:, None], width, axis=1)
    call = Call(num_seqs, width, None if valid is None or valid.all() else valid)
    reason = refusal or cache.state.refusal or _not_native(cache, call, inputs, relation)
    if reason is None:
        call.native = True
    else:
        say(Support(Path.GATHER, reason))
        if call.valid is not None and (cache.state.keeps_pads or _hides_last_of_a_row(cache, call)):
            # What stock computes there, and reads on from, depends on the hidden columns too: they are stored, and
            # later masks go on hiding them.
            call = Call(num_seqs, width)
            cache.state.refusal = reason
    return call


def _shape(mask: Any) -> tuple[int, ...] | None:
    """A caller may also give a dict of masks, one for each kind of layer."""
    return tuple(mask.shape) if isinstance(mask, Tensor) else None


def _not_native(cache: PagedCache, call: Call, inputs: dict[str, Any], relation: str) -> str | None:
    """Why attention cannot read the blocks in place in this call, or None."""
    if inputs.get("output_attentions"):
        return "output_attentions needs the weights of the model's own attention"
    if relation == "other":
        return "attention_mask is not one row of columns per sequence"
    if relation == "hides":
        return "attention_mask hides tokens that are stored"
    if call.valid is not None and _hides_last_of_a_row(cache, call):
        return "attention_mask hides the last column of a row, where generate reads its logits"
    if any(cache.is_sliding) and cache.state.columns.holes_with(call):
        return "attention_mask has holes under a sliding window, which counts them"
    return None


def _hides_last_of_a_row(cache: PagedCache, call: Call) -> bool:
    """Right padding: stock lets a hidden column look at the row's tokens, and generate goes on from what it sees."""
    assert call.valid is not None
    seq_lens = cache.state.seq_lens
    holds = call.num_tokens > 0
    if len(seq_lens):
        holds |= seq_lens > 0
    return bool((holds & ~call.valid[:, -1]).any())
