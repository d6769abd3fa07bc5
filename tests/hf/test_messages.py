"""What the user is told: once per model and reason, with the fallback and its cost; nothing where all is native."""

from __future__ import annotations

import ast
import contextlib
import gc
import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import torch_paged
from torch_paged.hf import support
from torch_paged.hf.support import Support
from torch_paged.hf.voice import Voice, _voices

from .counting import messages
from .models import FAMILIES, NATIVE, batch, generate, tiny, tiny_t5

GATHERED = "diffllama"
# A call that gathers on a native model, and what is said of it.
CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "weights": ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    "right padding": ({"attention_mask": torch.tensor([[1] * 6 + [0] * 3] * 2)}, "hides the last column"),
}


@pytest.mark.parametrize("name", NATIVE)
def test_nothing_is_said_where_attention_reads_blocks(
    name: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    model, inputs = tiny(name), batch([20, 5])
    capfd.readouterr()
    with caplog.at_level(logging.DEBUG, "torch_paged"), torch_paged.paged(model):
        generate(model, inputs, num_beams=2, max_new_tokens=3)
    assert messages(caplog) == [] and tuple(capfd.readouterr()) == ("", "")
    assert not [warning for warning in recwarn if "torch_paged" in warning.filename]


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_gathers_is_told_once(call: str, caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = tiny("llama", attn_implementation="eager"), batch([9, 9])
    kwargs, reason = CALLS[call]
    with torch_paged.paged(model):
        generate(model, inputs)
        for _ in range(2):
            generate(model, inputs | kwargs)
        generate(model, inputs)
    (message,) = messages(caplog)
    for part in ("LlamaForCausalLM: ", reason, "gathered", "copied in every layer and step"):
        assert part in message


def test_each_reason_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = tiny("llama", attn_implementation="eager"), batch([9, 9])
    with torch_paged.paged(model):
        for kwargs, _ in [*CALLS.values()] * 2:
            generate(model, inputs | kwargs)
    assert len(messages(caplog)) == len(CALLS)


@pytest.mark.parametrize("call", CALLS)
def test_strict_raises_what_would_be_told(call: str) -> None:
    model, inputs = tiny("llama", attn_implementation="eager"), batch([9, 9])
    kwargs, reason = CALLS[call]
    expected = generate(model, inputs)
    with torch_paged.paged(model, strict=True) as handle:
        with pytest.raises(ValueError, match=rf"^LlamaForCausalLM: .*{reason}.*strict=False runs it so"):
            generate(model, inputs | kwargs)
        assert handle.stats().blocks_used == 0
        assert torch.equal(generate(model, inputs), expected)


def test_strict_calls_raise_too() -> None:
    model = tiny("llama")
    with torch_paged.paged(model, strict=True), torch.no_grad():
        cache = torch_paged.PagedCache(model.config)
        with pytest.raises(ValueError, match="not one row of columns"):
            model(torch.tensor([[5, 6]]), attention_mask=torch.ones(1, 1, 2, 2), past_key_values=cache)
        assert cache.get_seq_length() == 0


def test_patching_again_does_not_repeat_what_was_told(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = tiny(GATHERED), batch([9])
    for block_size in (4, 8, 8):
        with torch_paged.paged(model, block_size=block_size):
            generate(model, inputs)
    assert len(messages(caplog)) == 1


def test_every_model_is_told_of_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    first, second, inputs = tiny(GATHERED), tiny(GATHERED), batch([9])
    with torch_paged.paged(first), torch_paged.paged(second):
        for model in (first, second, first, second):
            generate(model, inputs)
    assert len(messages(caplog)) == 2
    # What was told goes with the model: the next one at its place in memory is told of.
    place = id(first)
    assert place in _voices
    del first, model
    gc.collect()
    assert place not in _voices


def test_caches_of_ones_own_are_told_of_once_for_a_model(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = tiny("llama"), batch([9])
    for _ in range(3):
        generate(model, inputs, past_key_values=torch_paged.PagedCache(model.config))
    (message,) = messages(caplog)
    for part in ("PagedCache(LlamaConfig): a cache is used past the call of a patched model", "gathered"):
        assert part in message
    cache = torch_paged.PagedCache(model.config, strict=True)
    with pytest.raises(ValueError, match="past the call of a patched model"):
        generate(model, inputs, past_key_values=cache)
    assert cache.stats().blocks_used == 0


def test_threads_tell_a_reason_once(caplog: pytest.LogCaptureFixture) -> None:
    """Two threads that look at the same moment whether it was told: each waits in there for the other."""
    both = threading.Barrier(2)

    class Said(set[str]):
        def __contains__(self, reason: object) -> bool:
            answer = super().__contains__(reason)
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(timeout=0.3)
            return answer

    voice = Voice("Model")
    voice._said = Said()
    say = threading.Thread(target=voice.say, args=(Support(support.Path.GATHER, "why"), False))
    say.start()
    voice.say(Support(support.Path.GATHER, "why"), False)
    say.join()
    assert len(messages(caplog)) == 1


def test_four_threads_that_generate_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = tiny(GATHERED), batch([9])
    with torch_paged.paged(model):
        threads = [threading.Thread(target=generate, args=(model, inputs)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(messages(caplog)) == 1


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_full_pool_says_what_to_change_and_the_change_helps(name: str, kwargs: dict[str, Any]) -> None:
    model, inputs = tiny(name), batch([30, 8])
    kwargs = dict(max_new_tokens=20, eos_token_id=None) | kwargs
    with torch_paged.paged(model, block_size=4) as handle:
        expected = generate(model, inputs, **kwargs)
        most = handle.stats().peak_bytes
    with torch_paged.paged(model, block_size=4, max_memory=most // 2, on_pressure="error") as handle:
        with pytest.raises(torch_paged.PoolExhausted) as raised:
            generate(model, inputs, **kwargs)
        error = raised.value
        assert error.needed > error.free >= 0
        for part in (f"{error.needed} needed", f"{error.free} free", "raise max_memory", "fewer or shorter sequences"):
            assert part in str(error)
        assert handle.stats().blocks_used == 0
        # Shorter: the same handle goes on.
        generate(model, batch([4]), max_new_tokens=2)
    with torch_paged.paged(model, block_size=4, max_memory=2 * most):
        assert torch.equal(generate(model, inputs, **kwargs), expected)


@pytest.mark.parametrize(
    "name, text",
    [
        ("llama", "PagedHandle(LlamaForCausalLM, native)"),
        ("diffllama", "PagedHandle(DiffLlamaForCausalLM, gather: it computes with K or V between cache and attention)"),
        ("mamba", "PagedHandle(MambaForCausalLM, stock: it keeps another state than keys and values)"),
    ],
)
def test_a_handle_shows_how_its_model_runs(name: str, text: str) -> None:
    model = tiny(name)
    handle = torch_paged.patch(model)
    assert repr(handle) == text
    handle.unpatch()
    assert repr(handle) == f"PagedHandle({type(model).__name__}, not patched)"


def test_strict_does_not_promise_blocks_to_a_model_that_has_none() -> None:
    model = tiny("mamba")
    with pytest.raises(ValueError, match=r"MambaForCausalLM: .*the model keeps the stock cache: nothing is paged"):
        torch_paged.patch(model, strict=True)


def test_another_number_of_rows_is_the_only_thing_told(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = tiny("llama"), batch([9, 5])
    with torch_paged.paged(model):
        cache = generate(model, inputs, max_new_tokens=2, return_dict_in_generate=True).past_key_values
        with pytest.raises(ValueError, match="batch size: 1; must be 2, the rows this PagedCache holds"):
            generate(model, batch([14]), past_key_values=cache)
        cache.reset()
    assert messages(caplog) == []


def test_a_pipeline_is_told_to_pass_its_model() -> None:
    class Pipeline:
        model = tiny("llama")

    with pytest.raises(TypeError, match=r"model: Pipeline; must be a transformers model .*: pass its \.model"):
        torch_paged.patch(Pipeline())


def test_a_cache_needs_a_config() -> None:
    with pytest.raises(TypeError, match=r"config: LlamaForCausalLM; must be a transformers config"):
        torch_paged.PagedCache(tiny("llama"))


def test_encoder_decoders_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = tiny_t5(), batch([9, 5])
    with torch_paged.paged(model):
        generate(model, inputs)
        generate(model, inputs, num_beams=2)
    assert len(messages(caplog)) == 1


def test_the_library_prints_nothing() -> None:
    """But for the command line."""
    package = Path(torch_paged.__file__).parent
    files = [path for path in package.rglob("*.py") if "cli" not in path.relative_to(package).parts]
    prints = [
        f"{path}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Name) and node.id == "print"
    ]
    assert len(files) > 30 and prints == []


def test_an_application_that_configures_no_logging_sees_no_line() -> None:
    """The NullHandler: what to show is the application's choice."""
    code = (
        "import logging, torch_paged\n"
        "assert [type(handler) for handler in logging.getLogger('torch_paged').handlers] == [logging.NullHandler]\n"
        "from torch_paged.hf.support import Path, Support\n"
        "from torch_paged.hf.voice import Voice\n"
        "Voice('Model').say(Support(Path.GATHER, 'why'), strict=False)\n"
        "logging.basicConfig(format='%(name)s %(levelname)s %(message)s')\n"
        "Voice('Model').say(Support(Path.STOCK, 'why'), strict=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if "Model" in line]
    assert lines == ["torch_paged WARNING Model: why; the model keeps the stock cache: nothing is paged"]
    assert done.stdout == ""
