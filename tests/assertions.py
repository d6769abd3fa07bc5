"""What op tests assert: the error bound against float64, and how bad input is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from torch_paged import ops


def assert_as_exact_as_torch(result: Tensor, reference: Tensor, same_dtype: Tensor) -> None:
    """At most twice the largest error of PyTorch in the same dtype, plus 1e-5, or 1e-12 where all is float64."""
    assert result.shape == reference.shape
    slack = 1e-12 if result.dtype == torch.float64 else 1e-5
    assert largest_error(result, reference) <= 2 * largest_error(same_dtype, reference) + slack


def largest_error(result: Tensor, reference: Tensor) -> float:
    """Equal infinities are no error; NaN anywhere makes it NaN, which is below no bound."""
    difference = torch.where(result == reference, 0.0, result.double() - reference)
    return float(difference.abs().max()) if difference.numel() else 0.0


def assert_rejects(op: str, arguments: dict[str, Any], message: str) -> None:
    """`message` is `<argument>: <what it is>; must be <what it must be>`, or a beginning of it."""
    with pytest.raises(ValueError) as wrapped:
        getattr(ops, op)(**arguments)
    assert str(wrapped.value).startswith(message)
    assert "; must be " in str(wrapped.value)
    with pytest.raises(RuntimeError) as direct:
        getattr(torch.ops.paged, op)(**arguments)
    assert str(direct.value) == str(wrapped.value)
