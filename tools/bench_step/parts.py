"""Where a step's CPU seconds go: every C++ entry and every PyTorch operator is timed while one step runs."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

from torch.utils._python_dispatch import TorchDispatchMode

from ernie5_kernels.native.library import native_library

PARTS = {
    "experts": ("ernie5_experts_forward", "ernie5_experts_backward"),
    "linear": ("ernie5_product", "ernie5_outer"),
    "attention": ("ernie5_attention_forward", "ernie5_attention_backward"),
    "text head and its loss": ("ernie5_cross_entropy",),
    "norms, rotation, residuals": ("ernie5_norm_forward", "ernie5_norm_backward", "ernie5_rotate", "aten.add"),
    "rows to experts and back": ("ernie5_gather", "ernie5_sum_places"),
    "optimizer": (
        "ernie5_adamw", "ernie5_sum_squares", "aten._fused_adamw_", "aten._foreach_norm", "aten._foreach_mul_",
        "aten.bmm", "aten.baddbmm", "aten.lerp", "aten.lerp_",
    ),
    "router and order": (
        "ernie5_route", "ernie5_route_backward", "ernie5_choose",
        "aten.topk", "aten.sort", "aten._softmax", "aten._softmax_backward_data", "aten.sigmoid", "aten.gather",
        "aten.sigmoid_backward", "aten.scatter_add_", "aten.scatter_", "aten.searchsorted", "aten.index_put_",
    ),
    "copies between dtypes": ("aten._to_copy", "aten.copy_"),
}
OTHER, REST = "other PyTorch operators", "Python and autograd"


class _TimedOperators(TorchDispatchMode):
    def __init__(self, seconds: dict[str, float]) -> None:
        super().__init__()
        self._seconds = seconds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204 (torch's signature)
        started = time.process_time()
        result = func(*args, **(kwargs or {}))
        self._seconds[f"aten.{func.overloadpacket.__name__}"] += time.process_time() - started
        return result


@contextlib.contextmanager
def _timed_entries(seconds: dict[str, float]) -> Iterator[None]:
    library = native_library()
    names = [name for group in PARTS.values() for name in group if name.startswith("ernie5_")]
    kept = {name: getattr(library, name) for name in names} if library is not None else {}

    def watch(name: str, entry: Callable) -> Callable:
        def run(*arguments: object) -> object:
            started = time.process_time()
            result = entry(*arguments)
            seconds[name] += time.process_time() - started
            return result

        return run

    for name, entry in kept.items():
        setattr(library, name, watch(name, entry))
    try:
        yield
    finally:
        for name, entry in kept.items():
            setattr(library, name, entry)


def by_operator(step: Callable[[], object]) -> dict[str, float]:
    """CPU seconds of one call of `step` by C++ entry or PyTorch operator."""
    seconds: dict[str, float] = defaultdict(float)
    with _timed_entries(seconds), _TimedOperators(seconds):
        step()
    return dict(seconds)


def by_part(step: Callable[[], object], *, whole: float) -> dict[str, float]:
    """CPU seconds by part, largest first; `whole` is an unwatched step's, and what is left of it is Python's."""
    seconds = by_operator(step)
    parts = {part: sum(seconds.pop(name, 0.0) for name in names) for part, names in PARTS.items()}
    parts[OTHER] = sum(seconds.values())
    parts[REST] = max(0.0, whole - sum(parts.values()))
    return dict(sorted(parts.items(), key=lambda item: -item[1]))
