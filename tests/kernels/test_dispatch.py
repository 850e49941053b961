"""Back ends that are not there are refused with what is missing and the way out."""

from __future__ import annotations

import pytest
import torch

from ernie5.errors import KernelError
from ernie5.model.config import ModelConfig, MoEConfig
from ernie5.model.interfaces import ArrangedRows
from ernie5.model.moe.layer import MoELayer
from ernie5.model.moe.router import Router
from ernie5_kernels import dispatch
from ernie5_kernels.attention import attention, plan_attention
from ernie5_kernels.dispatch import BACKENDS, choose_backend
from ernie5_kernels.experts import experts
from ernie5_kernels.grouped_gemm import grouped_gemm
from ernie5_kernels.token_rows import plan_rows


def test_packages_of_others_say_what_they_need() -> None:
    rows, weight, offsets = torch.ones(2, 4), torch.ones(1, 3, 4), torch.tensor([2])
    with pytest.raises(KernelError, match=r"megablocks needs an NVIDIA GPU .* package grouped_gemm \(pip install"):
        grouped_gemm(rows, weight=weight, offsets=offsets, backend="megablocks")
    rule = r"deepgemm needs an NVIDIA GPU .* and the package deep_gemm \(git clone --recursive .*install.sh.*nvcc"
    with pytest.raises(KernelError, match=rule):
        grouped_gemm(rows, weight=weight, offsets=offsets, backend="deepgemm", fp8=True)
    with pytest.raises(KernelError, match="no deepgemm implementation. It offers triton, torch"):
        grouped_gemm(rows, weight=weight, offsets=offsets, backend="deepgemm")
    one = torch.ones(1, 2, 1, 4)
    plan = plan_attention(None, batch_rows=1, query_tokens=2, key_tokens=2)
    with pytest.raises(KernelError, match=r"flash_attn needs an NVIDIA GPU .* \(pip install flash-attn"):
        attention(one, key=one, value=one, plan=plan, backend="flash_attn")
    with pytest.raises(KernelError, match="no flash_attn implementation. It offers"):
        grouped_gemm(rows, weight=weight, offsets=offsets, backend="flash_attn")


def test_auto_never_takes_them() -> None:
    for name in ("megablocks", "deepgemm", "flash_attn"):
        chosen = choose_backend("auto", op="any", offered=(name, "torch"), device=torch.device("cpu"))
        assert chosen == "torch" and name in BACKENDS


def test_triton_is_refused_where_its_launch_would_go_to_another_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes to the current one and its stream, which waits for nothing that another GPU computes."""
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    call = {"op": "any", "offered": ("triton", "torch")}
    for name in ("auto", "triton"):
        assert choose_backend(name, device=torch.device("cuda:0"), **call) == "triton"
        with pytest.raises(KernelError, match=r"current device, cuda:0, .* on cuda:1.*set_device\(1\)"):
            choose_backend(name, device=torch.device("cuda:1"), **call)
    assert choose_backend("torch", device=torch.device("cuda:1"), **call) == "torch"


def test_fp8_says_that_triton_is_missing() -> None:
    rows, gate_up, down = torch.ones(2, 4), torch.ones(1, 6, 4), torch.ones(1, 4, 3)
    with pytest.raises(KernelError, match="triton cannot run on cpu"):
        experts(rows, row_weights=torch.ones(2), gate_up=gate_up, down=down, offsets=torch.tensor([2]), fp8=True)


@pytest.mark.parametrize("name", ["triton", "triton_fp8", "deepgemm_fp8", "megablocks"])
def test_a_layer_that_cannot_have_its_back_end_stops(name: str) -> None:
    layer = MoELayer(ModelConfig(layers=1, modalities=("text",), width=8, expert_backend=name,
                                 moe=MoEConfig(num_experts=4, top_k=2, expert_width=8)))
    with pytest.raises(KernelError, match=name.removesuffix("_fp8")):
        plan = plan_rows(torch.tensor([0, 1]), tokens=2)
        layer.experts(torch.ones(2, 8), arranged=ArrangedRows(torch.ones(2), torch.tensor([1, 2, 2, 2]), plan))


def test_triton_routes_among_no_groups() -> None:
    moe = MoEConfig(num_experts=4, top_k=2, expert_width=8, num_groups=2, top_groups=1)
    with pytest.raises(KernelError, match="routes among all experts, not among those of"):
        Router(moe, width=8, backend="triton")
    Router(moe, width=8, backend="auto")
