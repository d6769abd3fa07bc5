"""PagedHandle: what `patch` returns, the owner of a patched model's pools."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import CompileConfig, PreTrainedModel
from transformers.cache_utils import EncoderDecoderCache

from torch_paged.hf import fast_layers, implementation
from torch_paged.hf.cache import PagedCache
from torch_paged.hf.compiled import Compiled, user_compiled
from torch_paged.hf.config import PagedConfig
from torch_paged.hf.disguise import undisguise
from torch_paged.hf.family import family
from torch_paged.hf.line import Line
from torch_paged.hf.paged_model import is_plain_dynamic, paged_class
from torch_paged.hf.pools import Pools
from torch_paged.hf.prefix_call import sequence_rows
from torch_paged.hf.prefixes import Prefixes, RowPrefixes
from torch_paged.hf.support import Path, Support, model_support
from torch_paged.hf.voice import Voice
from torch_paged.memory import PoolStats

# Held around every change of what is patched.
patching = threading.RLock()


class PagedHandle:
    """Owns the pools of one patched model. Lives as long as the patch; caches that were returned keep their blocks."""

    def __init__(self, model: PreTrainedModel, config: PagedConfig) -> None:
        self.config = config
        self._voice = Voice.of(model, type(model).__name__)
        self._pools = Pools(config)
        self._prefixes = Prefixes(self._pools)
        self._model = weakref.ref(model)
        self._caches: weakref.WeakSet[PagedCache] = weakref.WeakSet()
        self._support: dict[str, Support] = {}
        # With the configuration, or the user's own compiled callable, that each belongs to.
        self._compiled: list[tuple[Any, Compiled]] = []
        # Whether the model is patched by this handle.
        self.patched = False
        self._uninstall: weakref.finalize[..., PreTrainedModel] | None = None

    def __repr__(self) -> str:
        model = self._model()
        if model is None or not self.patched:
            return f"PagedHandle({self._voice.name}, not patched)"
        support = self.support(model)
        return f"PagedHandle({self._voice.name}, {support.path.name.lower()}{support.reason and f': {support.reason}'})"

    def stats(self) -> PoolStats:
        """Blocks, bytes and waste of the pools right now, their peak since `reset_peak`, and the use of prefixes."""
        prefixes = self._prefixes
        return replace(self._pools.stats(), prefix_hits=prefixes.hits, prefix_tokens_saved=prefixes.tokens_saved)

    def reset_peak(self) -> None:
        """Start the peaks of `stats` anew."""
        self._pools.reset_peak()

    def flush(self) -> None:
        """Forget all remembered prefixes.

        Changes of weights, adapters and hooks that PyTorch or PEFT sees do so by themselves, and so does `train()`.
        What writes weights behind their back (`parameter.data.copy_()`), or changes what hooks and modules do
        otherwise, is to be told here.
        """
        self._prefixes.flush()
        self._pools.trim()

    def unpatch(self) -> None:
        """Make the model the stock model again; a second call does nothing."""
        with patching:
            model = self._model()
            if model is None or not self.patched:
                return
            if self._uninstall is not None:
                self._uninstall()
                family(model.config.model_type).uninstall(model)
                fast_layers.uninstall(model)
            undisguise(model)
            self.patched = False
            self.flush()

    def install(self) -> None:
        """Patch the model.

        Raises:
            ValueError: `strict`, and the model does not run natively. The model is unchanged.
        """
        model = self._model()
        assert model is not None
        support = self.support(model)
        if support.path is not Path.NATIVE and self.config.strict:
            self.say(support)
        model.__class__ = paged_class(type(model), self)
        self.patched = True
        if support.path is Path.NATIVE:
            # Also where the model goes without being unpatched: others may share its configs.
            self._uninstall = weakref.finalize(model, implementation.uninstall, implementation.install(model))
            self._uninstall.atexit = False
            family(model.config.model_type).install(model)
            fast_layers.install(model)

    @property
    def settings(self) -> tuple[PagedConfig, Pools, Prefixes]:
        """The knobs, the pools that go with them and what is remembered there; set to go back to earlier ones."""
        return self.config, self._pools, self._prefixes

    @settings.setter
    def settings(self, settings: tuple[PagedConfig, Pools, Prefixes]) -> None:
        self.config, self._pools, self._prefixes = settings

    def reconfigure(self, config: PagedConfig) -> None:
        """Other knobs, and new pools for them; another salt alone goes with the same pools.

        Raises:
            ValueError: `strict`, and the model does not run natively.
            RuntimeError: a cache of this model still holds blocks.
        """
        if replace(config, salt=self.config.salt) == self.config:
            self.config = config
            return
        model = self._model()
        if model is not None and (support := self.support(model)).path is not Path.NATIVE and config.strict:
            self._voice.say(support, strict=True)
        live = sum(cache.state.num_seqs is not None for cache in self._caches)
        if live:
            raise RuntimeError(
                f"{self._voice.name} is patched with {self.config} and {live} of its caches hold blocks: "
                "delete the past_key_values that generate returned, or unpatch, before choosing other knobs"
            )
        pools = Pools(config)
        self.settings = config, pools, Prefixes(pools)

    def support(self, model: PreTrainedModel) -> Support:
        """How the model runs where it is now: a model may be moved to another device while it is patched."""
        device_type = model.device.type
        if device_type not in self._support:
            self._support[device_type] = model_support(model)
        return self._support[device_type]

    def replace(self, model: PreTrainedModel, cache: Any) -> Any:
        """The paged cache for the empty one that `generate` made; the same cache where it cannot be paged."""
        support = self.support(model)
        if isinstance(cache, EncoderDecoderCache) and support.path is not Path.STOCK:
            cache.self_attention_cache = self.replace(model, cache.self_attention_cache)
            return cache
        if support.path is not Path.STOCK and not is_plain_dynamic(cache):
            kind = "makes its own cache" if cache is None else f"has a {type(cache).__name__}"
            support = Support(Path.STOCK, f"it {kind}, not a growing cache of keys and values")
        elif support.path is not Path.STOCK and (kinds := PagedCache.unpaged_kinds(cache)):
            support = Support(Path.STOCK, f"its cache layers are of kinds that stay as they are: {', '.join(kinds)}")
        if support.path is not Path.NATIVE:
            self.say(support)
        if support.path is Path.STOCK:
            return cache
        # Calls of encoder-decoders reach their cache inside another one, so nobody announces them.
        paged = PagedCache.for_generate(cache, self._pools, None if model.config.is_encoder_decoder else self._voice)
        self._caches.add(paged)
        if self.config.prefix_caching and support.path is Path.NATIVE and not model.training:
            paged.state.prefixes = RowPrefixes(self._prefixes, self.config.salt)
        if _running.generation is not None:
            _running.generation.add(paged)
        return paged

    def row_prefixes(self, salt: str | None) -> RowPrefixes | None:
        """What rows of a cache in these pools may begin with, of this salt or the config's; None if none is kept."""
        if not self.config.prefix_caching:
            return None
        return RowPrefixes(self._prefixes, self.config.salt if salt is None else salt)

    def trim(self) -> None:
        """Give the memory of free blocks back to the system."""
        self._pools.trim()

    def say(self, support: Support) -> None:
        """Tell the user once why something does not run natively; raise ValueError if `strict`."""
        self._voice.say(support, strict=self.config.strict)

    def compiled(
        self, model: PreTrainedModel, compile_config: CompileConfig | None = None, around: Any = None
    ) -> Compiled | None:
        """How forward passes of the model are compiled now; None: they are not.

        Args:
            compile_config: of this call of `generate`; None: what the user has compiled counts, then our own config.
            around: of `compiling_around` in this call.
        """
        by_user = None if compile_config else user_compiled(model)
        key = compile_config or by_user or around or self.config.compile
        if not key:
            return None
        with patching:
            for known, compiled in self._compiled:
                if known is key or known == key:
                    return compiled
            if by_user:
                compiled = Compiled.of_user(self._tell_uncompiled)
            elif around and not compile_config:
                compiled = Compiled.under(around, self._tell_uncompiled)
            else:
                options = compile_config.to_dict() if compile_config else self.config.compile_options
                compiled = Compiled.by(options, self._tell_uncompiled)
            self._compiled.append((key, compiled))
            return compiled

    def _tell_uncompiled(self, reason: str) -> None:
        self.tell(f"its forward pass over blocks cannot be compiled ({reason})", "it runs uncompiled")

    def tell(self, reason: str, consequence: str) -> None:
        """Tell the user once why something runs natively, and yet not as it could."""
        self._voice.tell(reason, consequence)

    @contextmanager
    def generation(self, assistant: Any = None) -> Iterator[Generation]:
        """Around one `generate`: caches made for it are released if it raises, and free pages go back at its end.

        Args:
            assistant: the model that drafts for this `generate`, if any. Its own calls of `generate` return their
                caches to this one, which therefore answers for them.
        """
        outer = _running.generation
        generation = _running.generation = Generation(assistant)
        try:
            yield generation
        except BaseException:
            # The traceback keeps the frames, and with them the caches, alive.
            generation.release()
            raise
        else:
            if outer is not None and outer.assisted_by(self._model()):
                outer.created += generation.created
        finally:
            _running.generation = outer
            generation.end()
            self._pools.trim()


class Generation:
    """One `generate` that runs in this thread, and the caches made for it."""

    def __init__(self, assistant: Any) -> None:
        self.assistant = assistant
        self.created: list[weakref.ref[PagedCache]] = []
        # Kept until their rows are remembered.
        self.remembering: list[PagedCache] = []
        self._lines: list[Line] = []

    def add(self, cache: PagedCache) -> None:
        line = cache.state.pools.line
        line.enter()
        self._lines.append(line)
        self.created.append(weakref.ref(cache))
        if cache.state.prefixes is not None:
            self.remembering.append(cache)

    def remember(self, model: PreTrainedModel, result: Any) -> None:
        """Remember the rows of its caches as prefixes.

        Args:
            result: what `generate` returned.
        """
        sequences = getattr(result, "sequences", result)
        for cache in self.remembering:
            rows = sequence_rows(cache.state, sequences) if isinstance(sequences, Tensor) else None
            if rows is not None and cache.state.prefixes is not None:
                cache.state.prefixes.remember(model, cache.state, rows)

    def release(self) -> None:
        """Give back the blocks of its caches, which nobody is given.

        They do not die with the call where something keeps one of its frames: errors that Dynamo caught and keeps in
        cycles, or a debugger.
        """
        for reference in self.created:
            if (cache := reference()) is not None:
                cache.reset()

    def end(self) -> None:
        """It waits for no blocks any more, and holds none that would come free."""
        self.remembering.clear()
        for line in self._lines:
            line.leave()

    def assisted_by(self, model: PreTrainedModel | None) -> bool:
        """Whether `model` drafts for it, in a wrapper or not."""
        return isinstance(self.assistant, nn.Module) and any(model is module for module in self.assistant.modules())


class _Running(threading.local):
    generation: Generation | None = None


_running = _Running()
