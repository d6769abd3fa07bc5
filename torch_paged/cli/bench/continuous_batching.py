"""transformers' continuous batching, the machinery of `generate_batch`, as one of the ways of `bench generate`."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, set_seed

from torch_paged.cli.bench.generate_cases import GenerateCase
from torch_paged.cli.bench.generate_ways import NotPossible, Run

PAGE_SIZE = 256  # transformers' own choice
MAX_BATCH_TOKENS = 8192  # likewise; fewer where the prompts have fewer, as its masks and inputs are allocated for them
SPARE_BLOCKS = 2
TIMEOUT_S = 1.0
NO_END = -1


def continuous_batching(model: PreTrainedModel, case: GenerateCase, seed: int) -> Run:
    """What `model.generate_batch` does, with a wish for every prompt and a cache no larger than they need.

    Its own cache would take 60 % of the memory and be filled with zeros first.

    Raises:
        NotPossible: this version of transformers does not run the case on this machine.
    """
    if case.beams > 1:
        raise NotPossible("generate_batch has no beams")
    if case.turns:
        raise NotPossible("it forgets all prefixes between two calls")
    try:
        from transformers.generation.configuration_utils import ContinuousBatchingConfig
    except ImportError:
        raise NotPossible("this transformers has no continuous batching") from None
    blocks = sum(-(-(len(prompt) + wish) // PAGE_SIZE) for prompt, wish in zip(case.prompts, case.wishes, strict=True))
    config = ContinuousBatchingConfig(
        page_size=PAGE_SIZE,
        num_blocks=blocks * case.returned + SPARE_BLOCKS,
        max_batch_tokens=min(MAX_BATCH_TOKENS, max(PAGE_SIZE, sum(map(len, case.prompts)))),
        seed=seed,
    )
    options = GenerationConfig(
        max_new_tokens=max(case.wishes),
        do_sample=case.samples,
        num_return_sequences=case.returned,
        eos_token_id=NO_END,
        pad_token_id=model.generation_config.pad_token_id,
    )
    set_seed(seed)
    held: list[int] = []
    with _quiet(), _running(model, options, config, held) as manager:
        start = time.perf_counter()
        requests = []
        for prompt, wish in zip(case.prompts, case.wishes, strict=True):
            requests.append(
                manager.add_request(prompt, max_new_tokens=wish, record_timestamps=True, eos_token_id=NO_END)
            )
        results = _results(manager, len(requests) * case.returned)
        seconds = time.perf_counter() - start
    names = [name for request in requests for name in _names(request, case.returned)]
    missing = [name for name in names if name not in results]
    if missing:
        raise NotPossible(f"{len(missing)} of {len(names)} requests did not finish")
    outputs = [results[name] for name in names]
    failed = next((output.error for output in outputs if output.error), None)
    if failed:
        raise NotPossible(" ".join(str(failed).split()))
    tokens = [output.generated_tokens for output in outputs]
    return Run(tokens, _marks(outputs, start), seconds, max(held, default=None))


@contextmanager
def _running(model: PreTrainedModel, options: Any, config: Any, held: list[int]) -> Iterator[Any]:
    """A running manager; `held` gets the bytes in use after each forward pass."""
    try:
        context = model.continuous_batching_context_manager(
            generation_config=options, continuous_batching_config=config, warmup=False
        )
        with context as manager:

            def after_forward(*_: Any) -> None:
                nbytes = _used_bytes(manager)
                if nbytes is not None:
                    held.append(nbytes)

            hook = model.register_forward_hook(after_forward)
            try:
                yield manager
            finally:
                hook.remove()
    except (AttributeError, RuntimeError, ValueError, TypeError, MemoryError, NotImplementedError) as error:
        raise NotPossible(" ".join(str(error).split()) or type(error).__name__) from error


def _used_bytes(manager: Any) -> int | None:
    """Bytes of the pages that requests hold; None where a version of transformers keeps them elsewhere."""
    try:
        cache = manager.batch_processor.cache
        sectors = cache.pool.num_sectors - cache.pool.num_free_sectors
        free = (
            cache.pool.count_free_blocks(allocator.index) * allocator.bytes_per_block
            for allocator in cache.cache_allocators.values()
        )
        return int(sectors * cache.bytes_per_sector - sum(free))
    except AttributeError:
        return None


def _results(manager: Any, count: int) -> dict[str, Any]:
    """The finished requests; fewer than `count` where the thread that runs them died."""
    results: dict[str, Any] = {}
    while len(results) < count:
        output = manager.get_result(timeout=TIMEOUT_S)
        if output is not None and output.is_finished():
            results[output.request_id] = output
        elif output is None and not manager.is_running():
            break
    return results


def _names(request: str, returned: int) -> list[str]:
    return [request, *(f"{request}__child#{number}" for number in range(returned - 1))]


def _marks(outputs: list[Any], start: float) -> list[float]:
    """When the last request had its first token, and the steps after that of the request that ended last."""
    stamps = [[stamp - start for stamp in output.timestamps or []] for output in outputs]
    # Forks of a sampled prompt have no stamp of the token that they were forked with.
    stamps = [each for each in stamps if each]
    prefilled = max((each[0] for each in stamps), default=0.0)
    longest = max(stamps, key=lambda each: each[-1], default=[])
    return [prefilled, *(stamp for stamp in longest if stamp > prefilled)]


@contextmanager
def _quiet() -> Iterator[None]:
    """It warns of every choice that was made for it."""
    loggers = [logging.getLogger(name) for name in ("ContinuousBatchingLogger", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
