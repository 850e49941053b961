"""What a processor is taken to multiply by itself."""

from __future__ import annotations

import pytest
import torch
from ernie5_kernels import processor


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_f": False, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"neon": True, "bf16": True}, True),
        ({"neon": True, "bf16": False}, False),
        ({}, False),
    ],
)
def test_bf16_counts_where_there_are_instructions_for_it(
    capabilities: dict[str, bool], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    processor._cpu_multiplies_bf16.cache_clear()
    try:
        assert processor.multiplies_bf16(torch.device("cpu")) is expected
        assert processor.multiplies_bf16(torch.device("cuda")) is True
    finally:
        processor._cpu_multiplies_bf16.cache_clear()
