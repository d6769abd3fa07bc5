"""A decode step over paged caches is exported, packaged by AOTInductor, and runs where transformers is not imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, export

from torch_paged.compile import inductor_settings

from .decoder import BLOCK_SIZE, Decoder, Step
from .lowered import Lowered

RUN = """
import sys
import torch, torch_paged

package, data = sys.argv[1:]
step = torch._inductor.aoti_load_package(package)
for call in torch.load(data):
    logits = step(*call["inputs"])
    torch.testing.assert_close(logits, call["logits"], atol=1e-5, rtol=1e-5)
    for cache, written in zip(call["inputs"][:2], call["written"]):
        torch.testing.assert_close(cache, written, atol=1e-5, rtol=1e-5, equal_nan=True)
assert "transformers" not in sys.modules
print("ran")
"""


class OneStep(nn.Module):
    """A decoder of one layer with nothing but tensors as arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Decoder("half split")

    def forward(self, key_cache: Tensor, value_cache: Tensor, tokens: Tensor, *step: Tensor) -> Tensor:
        where = Step([1])
        where.block_table, where.seq_lens, where.cu_seqlens_q, where.slot_mapping = step
        return self.decoder(tokens, [(key_cache, value_cache)], where)


def inputs(model: OneStep, batch: int, width: int) -> tuple[Tensor, ...]:
    step = Step([1 + i for i in range(batch)], width)
    [caches] = model.decoder.new_caches(batch * width)
    for row, length in enumerate(step.seq_lens.tolist()):
        for position in range(length - 1):
            for cache in caches:
                cache[row * width + position // BLOCK_SIZE, position % BLOCK_SIZE] = 0.5
    tokens = torch.arange(batch)[:, None]
    return *caches, tokens, step.block_table, step.seq_lens, step.cu_seqlens_q, step.slot_mapping


@torch.no_grad()
def test_runs_from_a_package(tmp_path: Path, lowered: Lowered) -> None:
    model = OneStep()
    batch, width, blocks = Dim("batch", min=2), Dim("width", min=2), Dim("blocks", min=2)
    rows = [{0: batch, 1: width}, {0: batch}, {0: batch + 1}, {0: batch}]
    exported = export(
        model, inputs(model, 2, 3), dynamic_shapes=({0: blocks}, {0: blocks}, {0: batch}, tuple(rows)), strict=False
    )
    assert "paged.reshape_and_cache" in exported.graph_module.code
    package = torch._inductor.aoti_compile_and_package(
        exported,
        package_path=str(tmp_path / "step.pt2"),
        inductor_configs=inductor_settings() | {"aot_inductor.compile_wrapper_opt_level": "O0"},
    )
    assert lowered.count("paged.rope_and_cache") == 1
    calls = []
    for size in ((2, 3), (5, 2), (3, 7)):
        given = inputs(model, *size)
        kept = [each.clone() for each in given]
        logits = model(*given)
        calls.append({"inputs": kept, "logits": logits, "written": list(given[:2])})
    torch.save(calls, tmp_path / "calls.pt")
    command = [sys.executable, "-c", RUN, package, str(tmp_path / "calls.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("ran\n"), done.stderr
