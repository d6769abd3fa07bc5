"""The op library as a whole: how it loads, how its errors arrive, how it compiles."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.paged_batch import paged_batch
from torch_paged import ops
from torch_paged.ops import _library

PACKAGE = Path(_library.__file__).parent.parent
TENSOR_OPS = [
    "attention",
    "attention_with_lse",
    "copy_blocks",
    "gated_linear",
    "gather_cache",
    "linear",
    "merge_attention_states",
    "packed_linear",
    "qkv_linear",
    "reshape_and_cache",
    "rms_norm",
    "rope_and_cache",
    "swap_blocks",
]


@pytest.mark.parametrize("name", TENSOR_OPS)
def test_every_op_keeps_strides_and_is_known_to_the_compiler(name):
    overload = getattr(torch.ops.paged, name).default
    assert {torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag} <= set(overload.tags)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"paged::{name}", "CPU")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"paged::{name}", "Meta")


def test_other_errors_pass_unchanged():
    for error in (RuntimeError("CUDA error: out of memory"), KeyError("query: 1; must be 2"), NotImplementedError("x")):
        with pytest.raises(type(error)) as caught, _library.value_errors():
            raise error
        assert caught.value is error


def test_a_check_of_several_lines_is_none_of_ours():
    with pytest.raises(RuntimeError, match="elsewhere"), _library.value_errors():
        raise RuntimeError("query: 1; must be 2\nfrom elsewhere")


def test_import_needs_no_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import torch_paged, torch_paged.ops; print(torch_paged.ops.cpu_instruction_set())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_missing_library_is_one_clear_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(_library, "__file__", str(tmp_path / "torch_paged/ops/_library.py"))
    with pytest.raises(ImportError, match=r"no compiled kernels \(_C.so\); build them with `pip install -e .`"):
        _library.load_kernels()


def test_library_that_does_not_load_is_one_clear_sentence(tmp_path, monkeypatch):
    (tmp_path / "torch_paged/ops").mkdir(parents=True)
    (tmp_path / "torch_paged/_C.so").write_bytes(b"no library")
    monkeypatch.setattr(_library, "__file__", str(tmp_path / "torch_paged/ops/_library.py"))
    with pytest.raises(ImportError, match="_C.so does not load into torch .*; torch 2.11 or newer is needed"):
        _library.load_kernels()


def test_wrappers_trace_into_one_graph():
    batch = paged_batch([(1, 9), (3, 5)])
    slots = torch.tensor([-1, -1, -1, -1])
    key = torch.zeros(4, 2, 16)

    def step(query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q):
        ops.reshape_and_cache(key, key, key_cache, value_cache, slots)
        return ops.attention(query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q, 3)

    tensors = [tensor for name, tensor in batch.arguments.items() if name != "max_query_len"]
    traced = torch.compile(step, backend="aot_eager", fullgraph=True)(*tensors)
    assert torch.equal(traced, step(*tensors))


# Two sizes that happen to be equal must not become one symbol.
@torch.fx.experimental._config.patch(use_duck_shape=False)
def test_fake_shapes_follow_unknown_sizes():
    """One graph serves batches of other sizes: the fakes take their shapes from symbols."""
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    def step(query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q, max_seq_len):
        out, lse = torch.ops.paged.attention_with_lse(
            query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q, query.shape[0]
        )
        key, value = torch.ops.paged.gather_cache(key_cache, value_cache, block_table, seq_lens, max_seq_len)
        return out.shape, lse.shape, key.shape, value.shape, out.sum()

    compiled = torch.compile(step, backend=keep, dynamic=True, fullgraph=True)
    for rows in ([(1, 9), (3, 5)], [(2, 40), (5, 17), (1, 1)], [(1, 30)] * 4):
        batch = paged_batch(rows, v_head_dim=8)
        tensors = [tensor for name, tensor in batch.arguments.items() if name != "max_query_len"]
        longest = max(length for _, length in rows)
        num_tokens = sum(count for count, _ in rows)
        out, lse, key, value, _ = compiled(*tensors, longest)
        assert out == (num_tokens, 4, 8) and lse == (4, num_tokens)
        assert key == (len(rows), longest, 2, 16) and value == (len(rows), longest, 2, 8)
    assert len(graphs) == 1
