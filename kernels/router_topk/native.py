"""The k greatest of every row by the C++ library: PyTorch's sorts pairs of value and index."""

from __future__ import annotations

import torch

from ..native.library import native_library, pointer, runs_native, sizes, threads


def chooses_native(preference: torch.Tensor) -> bool:
    """Whether the library can choose from this tensor."""
    return runs_native(preference) and preference.dtype == torch.float32


def choose_native(preference: torch.Tensor, *, top_k: int) -> torch.Tensor:
    """Places [N, K] int64 of the greatest of preference [N, E] fp32, greatest first; NaN counts as infinite."""
    values = preference.detach().contiguous()
    choices = values.new_empty(values.shape[0], top_k, dtype=torch.int64)
    native_library().ernie5_choose(pointer(values), pointer(choices), *sizes(*values.shape, top_k), threads())
    return choices
