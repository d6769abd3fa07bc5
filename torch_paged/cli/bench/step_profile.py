"""Where the time of a decode step goes: matrix products and how fast they read weights, attention, the host."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

# Of the read bandwidth: what runs at that rate is taken to be bound by memory.
FAST = 0.8
_STEP = "decode step"
_GRAPH = "## Call CompiledFxGraph"
_PRODUCTS = (
    "aten::linear", "aten::addmm", "aten::mm", "mkldnn::_linear_pointwise", "paged::packed_linear", "paged::linear",
    "paged::gated_linear", "paged::qkv_linear",
)  # fmt: skip
# Arguments that are weights, one below the other, where there are several.
_WEIGHTS = {"paged::gated_linear": slice(1, 3), "paged::qkv_linear": slice(1, 4)}
_ATTENTION = ("aten::scaled_dot_product_attention", "paged::attention")
_WRITES = ("paged::reshape_and_cache", "paged::rope_and_cache")


@dataclass(frozen=True)
class Product:
    """The matrix products of a step over weights of one shape.

    Attributes:
        weight: its shape, as the op takes it.
        calls: of a step.
        seconds: of a call, the median.
        bytes_per_s: of weights.
    """

    weight: tuple[int, ...]
    calls: int
    seconds: float
    bytes_per_s: float


@dataclass(frozen=True)
class StepProfile:
    """Seconds of a step under the profiler, medians.

    Attributes:
        step: all of it.
        graph: in compiled code; None where nothing is compiled.
        products: matrix products.
        attention: over the cache.
        writes: of torch_paged's ops into the cache.
        read_bytes_per_s: what the machine read right before.
    """

    step: float
    graph: float | None
    products: list[Product]
    attention: float
    writes: float
    read_bytes_per_s: float

    @property
    def in_products(self) -> float:
        return sum(product.calls * product.seconds for product in self.products)

    @property
    def host(self) -> float | None:
        """Outside of compiled code: inputs, tables, guards, the next token."""
        return None if self.graph is None else self.step - self.graph

    @property
    def rest(self) -> float:
        """Other operations, in compiled code where there is some."""
        whole = self.step if self.graph is None else self.graph
        return whole - self.in_products - self.attention - self.writes

    @property
    def share_fast(self) -> float:
        """The part of the products' time in which weights are read at FAST of `read_bytes_per_s` or faster."""
        enough = FAST * self.read_bytes_per_s
        fast = sum(each.calls * each.seconds for each in self.products if each.bytes_per_s >= enough)
        return fast / self.in_products if self.products else 0.0

    def as_json(self) -> dict[str, Any]:
        return {
            "step_s": self.step,
            "products_s": self.in_products,
            "products_share_fast": self.share_fast,
            "attention_s": self.attention,
            "writes_s": self.writes,
            "rest_s": self.rest,
            "host_s": self.host,
            "products": [vars(product) for product in self.products],
            "read_bytes_per_s": self.read_bytes_per_s,
        }


def profiled(call: Callable[[], object], steps: int, itemsize: int, read_bytes_per_s: float) -> StepProfile:
    """Run `steps` steps under PyTorch's profiler.

    Args:
        call: a step, warmed up.
        itemsize: bytes of an element of the weights.
        read_bytes_per_s: what the machine reads now.
    """
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        for _ in range(steps):
            with record_function(_STEP):
                call()
    events = list(recorded.events())
    spans = [event for event in events if event.name == _STEP]
    products: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for event in _outermost(events, _PRODUCTS):
        products[_weight(event)].append(1e-6 * event.cpu_time_total)
    graphs = [event for event in events if event.name.startswith(_GRAPH)]
    return StepProfile(
        step=statistics.median(_per_step(spans, spans)),
        graph=statistics.median(_per_step(graphs, spans)) if graphs else None,
        products=[
            Product(weight, len(seconds) // steps, median, _numel(weight) * itemsize / median)
            for weight, seconds in products.items()
            for median in [statistics.median(seconds)]
        ],
        attention=statistics.median(_per_step(_outermost(events, _ATTENTION), spans)),
        writes=statistics.median(_per_step(_outermost(events, _WRITES), spans)),
        read_bytes_per_s=read_bytes_per_s,
    )


def _weight(event: Any) -> tuple[int, ...]:
    shapes = [tuple(shape) for shape in event.input_shapes]
    if event.name in _WEIGHTS:
        weights = shapes[_WEIGHTS[event.name]]
        return sum(weight[0] for weight in weights), weights[0][1]
    return max(shapes, key=_numel)


def _outermost(events: Sequence[Any], names: Sequence[str]) -> list[Any]:
    """Those of these names that are not inside of another one."""

    def inside(event: Any) -> bool:
        while (event := event.cpu_parent) is not None:
            if event.name in names:
                return True
        return False

    return [event for event in events if event.name in names and not inside(event)]


def _per_step(events: Sequence[Any], spans: Sequence[Any]) -> list[float]:
    """Seconds of the events in each of the spans."""
    return [
        1e-6 * sum(each.cpu_time_total for each in events if span.time_range.start <= each.time_range.start
                   and each.time_range.end <= span.time_range.end)
        for span in spans
    ]  # fmt: skip


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def tables(profiles: Sequence[tuple[int, str, StepProfile]]) -> list[Table]:
    """The parts of the steps, and their matrix products.

    Args:
        profiles: rows, the way and its profile.
    """
    parts = Table(title="Where a step goes under the profiler, milliseconds")
    for header in ("rows", "", "step", "products", f"at {FAST:.0%}\nof reading", "attention", "writes", "rest", "host"):
        parts.add_column(header, justify="right")
    products = Table(title="Matrix products")
    for header in ("rows", "", "weight", "a step", "microseconds", "GB/s", "of reading\nright before"):
        products.add_column(header, justify="right")
    for rows, name, each in profiles:
        spent = (each.attention, each.writes, each.rest)
        parts.add_row(
            str(rows), name, f"{1e3 * each.step:.2f}", f"{1e3 * each.in_products:.2f}",
            f"{each.share_fast:.0%}", *(f"{1e3 * seconds:.2f}" for seconds in spent),
            "–" if each.host is None else f"{1e3 * each.host:.2f}",
        )  # fmt: skip
        for product in sorted(each.products, key=lambda product: -product.calls * product.seconds):
            products.add_row(
                str(rows), name, " x ".join(map(str, product.weight)), str(product.calls),
                f"{1e6 * product.seconds:.0f}", f"{1e-9 * product.bytes_per_s:.1f}",
                f"{product.bytes_per_s / each.read_bytes_per_s:.0%} of {1e-9 * each.read_bytes_per_s:.1f}",
            )  # fmt: skip
    return [parts, products]
