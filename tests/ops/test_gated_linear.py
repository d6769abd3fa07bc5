"""gated_linear against float64, and against its parts."""

import pytest
import torch
from torch.nn import functional

from tests.assertions import assert_as_exact_as_torch, assert_rejects
from torch_paged import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = {
    "silu": functional.silu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}
# Rows, inputs, outputs: few rows and many, and blocks of rows, inputs and outputs that are not full.
SIZES = [
    (1, 64, 32),
    (3, 7, 5),
    (11, 128, 70),
    (9, 2100, 130),
    (48, 600, 40),
    (131, 100, 163),
    (530, 70, 600),
    (0, 8, 8),
    (3, 8300, 40),
    (300, 2100, 600),
    (5, 0, 40),
    (5, 8, 0),
    (70, 0, 40),
]


def build(num_rows=3, in_features=7, out_features=5, *, dtype=torch.float32, bias=True, seed=0):
    """Rows and weights that are parts of wider tensors, NaN beside them."""
    generator = torch.Generator().manual_seed(seed)

    def random(rows, size, scale=1.0):
        wider = torch.full((rows, size + 8), torch.nan, dtype=dtype)
        wider[:, :size] = scale * torch.randn(rows, size, generator=generator)
        return wider[:, :size]

    scale = max(in_features, 1) ** -0.5
    return {
        "input": random(num_rows, in_features),
        "gate_weight": random(out_features, in_features, 2 * scale),
        "up_weight": random(out_features, in_features, scale),
        "gate_bias": random(1, out_features)[0] if bias else None,
        "up_bias": random(1, out_features)[0] if bias else None,
    }


def by_torch(given, activation):
    # PyTorch's own products on AMX read what lies beside rows of a wider tensor.
    given = {name: None if each is None else each.contiguous() for name, each in given.items()}
    gate = functional.linear(given["input"], given["gate_weight"], given["gate_bias"])
    return ACTIVATIONS[activation](gate) * functional.linear(given["input"], given["up_weight"], given["up_bias"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_matches_reference(sizes, activation, bias, dtype):
    given = build(*sizes, dtype=dtype, bias=bias)
    out = ops.gated_linear(**given, activation=activation)
    exact = by_torch({name: None if each is None else each.double() for name, each in given.items()}, activation)
    assert out.dtype == dtype and out.is_contiguous()
    assert_as_exact_as_torch(out, exact, by_torch(given, activation))


@pytest.mark.parametrize("num_rows", [1, 40])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_at_all_magnitudes(activation, num_rows):
    """Infinities and NaN too. PyTorch takes small numbers from 1 where the gate is far below 0: hence the 1e-15."""
    tiny = torch.tensor([0.0, 1e-30, 1e-7, 1e-3])
    x = torch.cat([tiny, torch.linspace(0.01, 120, 2000), torch.tensor([1e4, 1e20, 3e38, torch.inf])])
    x = torch.cat([-x.flip(0), x, torch.tensor([torch.nan])])
    given = dict(gate_weight=x[:, None].contiguous(), up_weight=torch.ones(len(x), 1))
    for row in ops.gated_linear(torch.ones(num_rows, 1), **given, activation=activation):
        exact = ACTIVATIONS[activation](x.double())
        assert torch.equal(row.isnan(), exact.isnan())
        assert torch.allclose(row.double(), exact, rtol=1e-5, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize(("num_rows", "parts"), [(23, [(0, 1), (5, 17)]), (571, [(0, 29), (200, 571)])])
def test_rows_are_independent_of_their_batch_deterministic(num_rows, parts):
    given = build(num_rows, 1100, 163, dtype=torch.bfloat16)
    whole = ops.gated_linear(**given)
    for first, last in parts:
        part = ops.gated_linear(**given | {"input": given["input"][first:last]})
        assert torch.equal(part, whole[first:last])


@pytest.mark.parametrize("sizes", [(4, 512, 3000), (100, 512, 1100)], ids=str)
def test_threads_share_the_work(sizes):
    given = build(*sizes)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            results.append(ops.gated_linear(**given))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_any_number_of_dimensions():
    given = build(6)
    expected = ops.gated_linear(**given)
    out = ops.gated_linear(**given | {"input": given["input"].reshape(2, 3, 7).contiguous()})
    assert torch.equal(out, expected.reshape(2, 3, 5))


def test_opcheck():
    for activation in ACTIVATIONS:
        torch.library.opcheck(torch.ops.paged.gated_linear.default, (*build().values(), activation))


BAD = {
    "activation": (lambda a: {"activation": "relu"}, "activation: relu; must be silu or gelu_tanh"),
    "input 0-D": (lambda a: {"input": torch.tensor(1.0)}, "input: shape []; must be [..., in_features]"),
    "input float64": (lambda a: {"input": a["input"].double()}, "input: float64; must be float32 or bfloat16"),
    "gate dtype": (lambda a: {"gate_weight": a["gate_weight"].half()}, "gate_weight: float16; must be float32"),
    "up dtype": (lambda a: {"up_weight": a["up_weight"].half()}, "up_weight: float16; must be float32"),
    "up on meta": (lambda a: {"up_weight": a["up_weight"].to("meta")}, "up_weight: on meta; must be on"),
    "up inputs": (lambda a: {"up_weight": torch.ones(5, 6)}, "up_weight: size 6 in dimension 1; must be 7"),
    "up outputs": (
        lambda a: {"up_weight": torch.ones(4, 7), "up_bias": None},
        "up_weight: size 4 in dimension 0; must be 5 (out_features of gate_weight)",
    ),
    "gate strides": (
        lambda a: {"gate_weight": torch.ones(7, 5).t()},
        "gate_weight: strides [1, 5]; must be contiguous",
    ),
    "gate bias": (lambda a: {"gate_bias": torch.ones(4)}, "gate_bias: size 4 in dimension 0; must be 5"),
    "up bias": (lambda a: {"up_bias": torch.ones(5).double()}, "up_bias: float64; must be float32, like input"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_rejects(change, message):
    given = build() | {"activation": "silu"}
    assert_rejects("gated_linear", given | change(given), message)
