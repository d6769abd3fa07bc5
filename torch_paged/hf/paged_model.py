"""The class a patched model gets: its own class, with the seams of `generate` and of a call overridden."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import CompileConfig, GenerationMixin
from transformers.cache_utils import DynamicCache

from torch_paged.hf import features
from torch_paged.hf.announce import announced, make_call, under_way
from torch_paged.hf.around import compiling_around, runs_in_python, satisfy_fullgraph
from torch_paged.hf.cache import PagedCache
from torch_paged.hf.call import Call, NeedsOwnAttention, current
from torch_paged.hf.chosen_beams import continuations
from torch_paged.hf.compiled import is_plain
from torch_paged.hf.decode_step import run_decode_step
from torch_paged.hf.disguise import disguise
from torch_paged.hf.fresh_cache import paged_part
from torch_paged.hf.last_mlp import runs_for_last_columns
from torch_paged.hf.leaving import beams_leaving, leaving, order_read_late, tell_of_beams, whether_on
from torch_paged.hf.packed import Forward
from torch_paged.hf.packing import call_problem, pack_problem, with_positions
from torch_paged.hf.prefill import keep_pads_of_empty_rows, prefill_once
from torch_paged.hf.prefix_call import prompt_rows, run_behind_prefixes
from torch_paged.hf.pressure import beam_search, sample, wait_for_others
from torch_paged.hf.random_state import RandomState
from torch_paged.hf.row_hooks import ROW_HOOKS, has_row_hooks
from torch_paged.hf.support import Path, implementation_reason, training_reason
from torch_paged.hf.unpadded import run_unpadded, saves_work
from torch_paged.memory import PoolExhausted

if TYPE_CHECKING:
    from torch_paged.hf.handle import PagedHandle


def paged_class(base: type[Any], handle: PagedHandle) -> type[Any]:
    """A subclass of `base` with the same name, whose instances are served by `handle`.

    A class of its own for each patched model: nothing is stored on the model, nothing global changes, and decoding
    methods that `generate` looks up on `type(self)` are found. They call `base` by name, as `super()` would fail on a
    model whose class has been put back in mid-call.
    """
    parameters = list(inspect.signature(base.forward).parameters)
    generate_parameters = list(inspect.signature(base.generate).parameters)

    class Paged(base):  # type: ignore[misc]
        @functools.wraps(base.generate)
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            named = dict(zip(generate_parameters[1:], args, strict=False)) | kwargs
            # With assistant_early_exit a model drafts for itself.
            assistant = self if named.get("assistant_early_exit") else named.get("assistant_model")
            with handle.generation(assistant) as generation:
                result = base.generate(self, *args, **kwargs)
                generation.remember(self, result)
                # Who gets a dict gets the cache; a loop or a hook of the caller's own may keep it.
                if isinstance(result, Tensor) and not named.get("custom_generate") and not has_row_hooks(self):
                    generation.release()
                return result

        def _prepare_cache_for_generation(
            self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
        ) -> Any:
            users, named = model_kwargs.get("past_key_values"), generation_config.cache_implementation
            result = base._prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs)
            cache = model_kwargs.get("past_key_values")
            # "hybrid", which old checkpoints name, is stock's growing cache by now: paged as if it were not there.
            wants_stock = named == "dynamic" or generation_config.cache_implementation not in (None, "dynamic")
            if users is None and not wants_stock and generation_config.use_cache is not False:
                model_kwargs["past_key_values"] = handle.replace(self, cache)
            return result

        def train(self, mode: bool = True) -> Any:
            if mode and handle.patched:
                # Weights are about to change, perhaps unseen, and a backward pass needs the memory.
                handle.flush()
            return base.train(self, mode)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            # generate keeps this method while it runs, also when the model is unpatched meanwhile.
            if not handle.patched:
                return base.__call__(self, *args, **kwargs)
            named = dict(zip(parameters[1:], args, strict=False)) | kwargs
            if current.call is None and not isinstance(named.get("past_key_values"), PagedCache):
                if (inside := paged_part(named.get("past_key_values"))) is None:
                    # Nothing but the stock model, with nothing of ours for Dynamo to trace.
                    return base.__call__(self, *args, **kwargs)
                with under_way(inside):
                    return base.__call__(self, *args, **kwargs)
            return _announced_call(base, handle, self, named, args, kwargs, around=compiling_around())

        runs_in_python(__call__)

        def get_compiled_call(self, compile_config: Any) -> Callable[..., Any]:
            stock: Callable[..., Any] = base.get_compiled_call(self, compile_config)
            wanted = compile_config or self._default_compile_config()

            def call(*args: Any, **kwargs: Any) -> Any:
                named = dict(zip(parameters[1:], args, strict=False)) | kwargs
                if not handle.patched or not isinstance(named.get("past_key_values"), PagedCache):
                    return stock(*args, **kwargs)
                return _announced_call(base, handle, self, named, args, kwargs, wanted)

            return call

        def _valid_auto_compile_criteria(self, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
            cache = model_kwargs.get("past_key_values")
            if isinstance(cache, PagedCache):
                if generation_config.compile_config is None:
                    return False
                model_kwargs = model_kwargs | {"past_key_values": _COMPILABLE}
            valid: bool = base._valid_auto_compile_criteria(self, model_kwargs, generation_config)
            return valid

    hooks = features.probe()
    if hooks["_prefill"]:

        def _prefill(
            self: Any, input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
        ) -> Any:
            stock: Callable[..., Any] = functools.partial(base._prefill, self)
            keep_pads_of_empty_rows(model_kwargs)
            if has_row_hooks(self):
                return stock(input_ids, generation_config, model_kwargs, *args, **kwargs)
            return prefill_once(stock, input_ids, generation_config, model_kwargs, *args, **kwargs)

        Paged._prefill = _prefill

    if hooks["_sample"]:

        def _sample(
            self: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
            *args: Any, **kwargs: Any,
        ) -> Any:  # fmt: skip
            def stock(
                input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **kwargs: Any
            ) -> Any:
                cache = rows_may_leave(Forward(base, self), generation_config, args, kwargs)
                with leaving(self, cache, stopping_criteria) as criteria:
                    return base._sample(self, input_ids, logits_processor, criteria, generation_config, *args, **kwargs)

            decode = stock
            if not args and base._sample is GenerationMixin._sample:
                decode = functools.partial(sample, stock, handle, Forward(base, self))
            return decode(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)

        Paged._sample = _sample

    if hooks["_beam_search"]:

        def _beam_search(
            self: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any,
            *args: Any, **kwargs: Any,
        ) -> Any:  # fmt: skip
            def stock(input_ids: Any, logits_processor: Any, stopping_criteria: Any, **kwargs: Any) -> Any:
                cache = rows_may_leave(Forward(base, self), generation_config, args, kwargs)
                late = order_read_late(paged_part(kwargs.get("past_key_values")))
                with late, beams_leaving(cache, [*logits_processor, *stopping_criteria]):
                    return base._beam_search(
                        self, input_ids, logits_processor, stopping_criteria, generation_config, *args, **kwargs
                    )

            decode = stock
            if not args and base._beam_search is GenerationMixin._beam_search:
                decode = functools.partial(beam_search, stock, handle, self, generation_config)
            return decode(input_ids, logits_processor, stopping_criteria, **kwargs)

        def unfinished(
            is_early_stop_heuristic_unsatisfied: Any, is_sent_finished: Any, next_token_hits_stopping_criteria: Any,
            early_stopping: Any,
        ) -> Any:  # fmt: skip
            tell_of_beams(is_early_stop_heuristic_unsatisfied, is_sent_finished, early_stopping)
            going_on = base._beam_search_has_unfinished_sequences(
                is_early_stop_heuristic_unsatisfied, is_sent_finished, next_token_hits_stopping_criteria, early_stopping
            )
            return whether_on(going_on)

        Paged._beam_search = _beam_search
        Paged._beam_search_has_unfinished_sequences = staticmethod(unfinished)

    if hooks["_get_top_k_continuations"]:

        def _get_top_k_continuations(self: Any, *args: Any, **kwargs: Any) -> Any:
            return continuations(functools.partial(base._get_top_k_continuations, self), args, kwargs)

        Paged._get_top_k_continuations = _get_top_k_continuations

    if base._update_model_kwargs_for_generation is GenerationMixin._update_model_kwargs_for_generation:

        def _update_model_kwargs_for_generation(
            self: Any, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
        ) -> Any:
            before = model_kwargs.get("attention_mask")
            grown = base._update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs)
            if isinstance(cache := grown.get("past_key_values"), PagedCache):
                cache.state.seen_mask.grow(before, grown.get("attention_mask"))
            return grown

        Paged._update_model_kwargs_for_generation = _update_model_kwargs_for_generation

    Paged._torch_paged_compiled = staticmethod(handle.compiled)
    # Copies and pickles are of the stock class: the patch belongs to this instance alone.
    disguise(Paged, base)
    return Paged


class _Compilable:
    """What stock asks whether a model may be compiled over it."""

    is_compileable = True


_COMPILABLE = _Compilable()


# Not compiled, also in a compiled model.
@torch.compiler.disable(reason="tables are edited in Python")  # type: ignore[untyped-decorator, no-untyped-call]
def _announced_call(
    base: type[Any],
    handle: PagedHandle,
    model: Any,
    named: dict[str, Any],
    args: Any,
    kwargs: dict[str, Any],
    compile_config: CompileConfig | None = None,
    around: Any = None,
) -> Any:
    """`_paged_call`, again where blocks run out and calls of other threads free some."""
    call = functools.partial(_paged_call, base, handle, model, named, args, kwargs, compile_config, around)
    cache = named.get("past_key_values")
    if not isinstance(cache, PagedCache) or not cache.made_by_generate:
        return call()
    if cache.state.num_seqs is None:
        cache.state.pools.line.wait_behind()
    random_state = RandomState() if model.training else None
    pads_kept = cache.state.refusal if cache.state.keeps_pads else None
    while True:
        try:
            return call()
        except PoolExhausted:
            if not wait_for_others(cache, named, native=handle.support(model).path is Path.NATIVE):
                raise
            if pads_kept is not None:
                cache.state.keep_pads(pads_kept)
        if random_state is not None:
            random_state.restore()


def _paged_call(
    base: type[Any],
    handle: PagedHandle,
    model: Any,
    named: dict[str, Any],
    args: Any,
    kwargs: dict[str, Any],
    compile_config: CompileConfig | None,
    around: Any,
) -> Any:
    """A call whose PagedCache, if it has one, knows what it stores and whether attention reads the blocks.

    Args:
        base: the stock class of `model`.
        named: `args` and `kwargs` by name.
        compile_config: of this call of `generate`.
        around: of `compiling_around`.
    """
    run = Forward(base, model, handle.compiled(model, compile_config, around))
    if around is not None:
        satisfy_fullgraph(around)
    cache = named.get("past_key_values")
    if not isinstance(cache, PagedCache):
        with announced(None, None):
            return run(*args, **kwargs)
    native = handle.support(model).path is Path.NATIVE
    refusal = training_reason(model) or implementation_reason(model)
    random_state = RandomState() if model.training else None
    try:
        call = make_call(cache, named, native=native, refusal=refusal, say=handle.say)
        compiles = call is not None and run.compiled is not None and call.native and run.compiled.takes(call)
        if compiles and call is not None:
            named = with_positions(run, cache, call, named)
        packs = (
            call is not None
            and call.native
            and call.num_tokens.any()
            and (saves_work(cache, call) or cache.state.prefixes is not None or compiles)
        )
        problem = (_pack_problem(handle, run, cache) or call_problem(run, named)) if packs else None
        if run.compiled is not None and call is not None and (why := _why_uncompiled(call, compiles, named, problem)):
            run.compiled.tell(why)
        if call is not None and packs and problem is None:
            if (rows := prompt_rows(cache.state, call, named)) is not None:
                return run_behind_prefixes(run, cache, call, named, rows)
            if compiles and call.width == 1 and cache.state.columns.count and is_plain(named):
                return run_decode_step(run, cache, call, named)
            return run_unpadded(run, cache, call, named)
        with announced(cache, call), runs_for_last_columns(base, model, cache, call, named):
            return run(*args, **kwargs)
    except NeedsOwnAttention as needs:
        cache.refuse(str(needs))
    if random_state is not None:
        random_state.restore()
    with announced(cache, make_call(cache, named, native=native, say=handle.say)):
        return run(*args, **kwargs)


def _pack_problem(handle: PagedHandle, forward: Forward, cache: PagedCache) -> str | None:
    if not cache.config.pack_rows:
        return "pack_rows is off"
    problem = pack_problem(forward, cache)
    if problem == ROW_HOOKS:
        handle.tell(problem, "rows stay where stock has them: padding and finished rows are computed, nothing shared")
    return problem


def _why_uncompiled(call: Call, compiles: bool, inputs: dict[str, Any], problem: str | None) -> str | None:
    """Why a call is not compiled where calls are to be and a user would wonder; None: it is, or nobody would.

    Args:
        compiles: it would be, but for what it asks for.
        problem: why it cannot be packed.
    """
    if not call.native:
        return "attention does not read the blocks"
    if torch.is_grad_enabled():
        return "gradients are on"
    if compiles and not is_plain(inputs):
        return "embeddings are given, or hidden states asked for"
    return problem if compiles else None


def rows_may_leave(
    forward: Forward, generation_config: Any, args: tuple[Any, ...], model_kwargs: Any
) -> PagedCache | None:
    """The cache whose finished rows nobody can ask for any more; None where somebody can.

    A caller who gets a dict gets the cache, and with it what stock computes for rows that are finished; so does one who
    passed a cache. Devices that run in step must not leave one another.
    """
    cache = model_kwargs.get("past_key_values")
    in_step = bool(args and args[0]) or model_kwargs.get("synced_gpus")
    if in_step or generation_config.return_dict_in_generate or not isinstance(cache, PagedCache):
        return None
    knobs = cache.config
    if not (cache.made_by_generate and knobs.drop_finished_rows and knobs.pack_rows):
        return None
    if pack_problem(forward, cache) is not None:
        return None
    return cache


def is_plain_dynamic(cache: Any) -> bool:
    """Whether `generate` made the growing cache that paging replaces."""
    return type(cache) is DynamicCache and not cache.offloading
