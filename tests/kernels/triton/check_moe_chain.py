"""The whole expert layer out of Triton operators: one graph under torch.compile, no value read by the host."""

from __future__ import annotations

import pytest
import torch

from ernie5_kernels import checks
from ernie5_kernels.grouped_gemm import grouped_gemm
from ernie5_kernels.moe_permute import permute, plan_permutation, unpermute
from ernie5_kernels.router_topk import router_topk
from ernie5_kernels.swiglu import swiglu
from ernie5_kernels.testing import assert_close, kernel_device, random_tensor

EXPERTS, TOP_K, WIDTH, INNER = 5, 2, 8, 4
HOST_READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy")


def expert_layer(
    x: torch.Tensor, router: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, backend: str = "triton"
) -> torch.Tensor:
    """Route, order, two grouped products around SwiGLU, weighted sum."""
    bias = torch.zeros(EXPERTS, device=x.device)
    choice = router_topk(x @ router.T, bias=bias, top_k=TOP_K, backend=backend)
    plan = plan_permutation(choice.choices, num_experts=EXPERTS, backend=backend)
    rows = permute(x, permutation=plan, backend=backend)
    hidden = swiglu(grouped_gemm(rows, weight=gate_up, offsets=plan.offsets, backend=backend), backend=backend)
    out = grouped_gemm(hidden, weight=down, offsets=plan.offsets, backend=backend)
    return unpermute(out, permutation=plan, weights=choice.weights, backend=backend)


def inputs() -> tuple[torch.Tensor, ...]:
    shapes = ((9, WIDTH), (EXPERTS, WIDTH), (EXPERTS, 2 * INNER, WIDTH), (EXPERTS, WIDTH, INNER))
    return tuple(random_tensor(*shape, seed=n).requires_grad_() for n, shape in enumerate(shapes))


def test_the_layer_compiles_into_one_graph_and_matches_the_reference_in_every_gradient() -> None:
    ours, truth = inputs(), inputs()
    compiled = torch.compile(expert_layer, fullgraph=True, backend="aot_eager")
    out, expected = compiled(*ours), expert_layer(*truth, backend="reference")
    assert_close(out, expected=expected, tolerance=1e-5, reason="fp32 sums in another order")
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), x) for y, x in ((out, ours), (expected, truth))),
                          strict=True):
        assert_close(one, expected=other, tolerance=1e-4, reason="fp32 sums in another order, squared")


@pytest.mark.skipif(kernel_device().type != "cpu", reason="a GPU says it itself, see below")
def test_no_operator_of_the_layer_reads_a_value_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter works below these methods, so that only Python around the kernels is caught."""
    def read(*_: object) -> None:
        raise AssertionError("a value was read by the host")

    ours = inputs()
    monkeypatch.setattr(checks, "lies_open", lambda tensor: False)  # the tensors stand for those of a GPU
    for name in HOST_READS:
        monkeypatch.setattr(torch.Tensor, name, read)
    expert_layer(*ours).sum().backward()
    with pytest.raises(AssertionError, match="read by the host"):
        expert_layer(*ours, backend="reference")


@pytest.mark.skipif(kernel_device().type != "cuda", reason="asks CUDA")
def test_no_operator_of_the_layer_waits_for_the_gpu() -> None:
    ours = inputs()
    expert_layer(*ours).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        expert_layer(*ours).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(kernel_device().type != "cuda", reason="captures a CUDA graph")
def test_a_cuda_graph_holds_the_layer_forward_and_backward_and_follows_new_tokens() -> None:
    ours = inputs()

    def step() -> tuple[torch.Tensor, ...]:
        out = expert_layer(*ours)
        return out.detach(), *torch.autograd.grad(out.square().sum(), ours)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step()
    ours[0].data.copy_(random_tensor(9, WIDTH, seed=77))
    graph.replay()
    for one, other in zip(held, step(), strict=True):
        assert_close(one, expected=other, tolerance=1e-6, reason="the same kernels in the same order")
