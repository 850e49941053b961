"""Experts' first product with its activation in the epilogue: every tiling, rows gathered or copied, NaN beyond."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ernie5.errors import KernelError
from ernie5_kernels import checks
from ernie5_kernels.experts import experts
from ernie5_kernels.grouped_gemm.reference import grouped_gemm_reference
from ernie5_kernels.grouped_gemm.tiles import GemmTiles
from ernie5_kernels.grouped_swiglu import grouped_swiglu
from ernie5_kernels.grouped_swiglu.kernel import grouped_swiglu_triton, multiply_gated
from ernie5_kernels.grouped_swiglu.reference import grouped_swiglu_reference
from ernie5_kernels.testing import assert_backends_agree, assert_close, kernel_device, poisoned_memory, random_tensor
from ernie5_kernels.token_rows import RowPlan, plan_rows

COUNTS = ([3, 0, 5, 1], [0, 0, 9, 0], [0, 0, 0, 0], [63, 1, 0, 29])
TILES = {
    "rows second": GemmTiles(16, 32, 16, warps=4, stages=2),
    "rows second, by TMA": GemmTiles(32, 32, 16, warps=4, stages=2, uses_tma=True),
    "rows first": GemmTiles(64, 32, 32, warps=4, stages=2),
    "rows first, by TMA": GemmTiles(64, 64, 16, warps=4, stages=2, uses_tma=True),
}
ORDER = "fp32, another order of sums"


def ends_of(counts: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(counts, dtype=dtype).cumsum(0, dtype=dtype).to(kernel_device())


def even_plan(tokens: int, top_k: int) -> RowPlan:
    """Rows of all tokens, shuffled, and where each token's are."""
    order = torch.randperm(tokens * top_k, generator=torch.Generator().manual_seed(5))
    places = torch.empty_like(order)
    places[order] = torch.arange(tokens * top_k)
    return RowPlan((order // top_k).to(kernel_device()), places.view(tokens, top_k).to(kernel_device()))


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("extra", [0, 4])
def test_activated_rows_and_gradients_match_the_reference(counts: list[int], extra: int) -> None:
    offsets, rows = ends_of(counts, torch.int32 if extra else torch.int64), sum(counts) + extra
    inputs = (random_tensor(rows, 7), random_tensor(len(counts), 10, 7, seed=1), random_tensor(rows, seed=2))
    assert_backends_agree(
        lambda r, w, p, b: grouped_swiglu(r, gate_up=w, row_weights=p, offsets=offsets, backend=b), inputs=inputs,
        tolerance=1e-5, reason=ORDER,
    )


@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_plan_match_the_reference_gathered_and_copied(gathers: bool, dtype: torch.dtype) -> None:
    """The last rows of the plan belong to no group."""
    plan, offsets = even_plan(13, 3), ends_of([20, 0, 15])
    inputs = (random_tensor(13, 24, dtype=dtype), random_tensor(3, 18, 24, seed=1, dtype=dtype),
              random_tensor(39, seed=2))
    narrow = dtype == torch.bfloat16
    assert_backends_agree(
        lambda x, w, p, b: grouped_swiglu(
            x, gate_up=w, row_weights=p, offsets=offsets, plan=plan, backend=b,
            gathers=gathers if b == "triton" else None,
        ),
        inputs=inputs, tolerance=2e-2 if narrow else 1e-5,
        reason="8 bits in operands, products and results" if narrow else ORDER,
    )


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
@pytest.mark.parametrize("gathers", [False, True])
def test_every_way_of_tiling_matches_and_never_uses_rows_past_the_end(tiles: GemmTiles, gathers: bool) -> None:
    offsets, plan = ends_of([0, 70, 1, 0, 20]), even_plan(47, 2)
    tokens, weight, scales = random_tensor(47, 40), random_tensor(5, 2 * 36, 40, seed=1), random_tensor(94, seed=2)
    rows = tokens[plan.sources]
    product = grouped_gemm_reference(rows, weight=weight, offsets=offsets)
    expected = grouped_swiglu_reference(rows, gate_up=weight, row_weights=scales, offsets=offsets)
    rows[91:], scales[91:] = float("nan"), float("nan")
    with poisoned_memory():
        out, first = multiply_gated(
            tokens if gathers else rows, gate_up=weight, row_weights=scales, offsets=offsets, tiles=tiles,
            sources=plan.sources if gathers else None,
        )
        alone, nothing = multiply_gated(
            rows, gate_up=weight, row_weights=scales, offsets=offsets, tiles=tiles, keeps=False
        )
    assert_close(first, expected=product, tolerance=1e-5, reason=ORDER)
    assert_close(out, expected=expected, tolerance=1e-5, reason=ORDER)
    assert torch.equal(alone, out) and nothing.numel() == 0
    assert torch.equal(out[91:], torch.zeros_like(out[91:])) and torch.equal(first[91:], torch.zeros_like(first[91:]))


def test_the_activation_is_of_the_product_before_it_is_rounded() -> None:
    shapes = ((33, 64), (1, 16, 64), (33,))
    x, weight, scales = (random_tensor(*shape, seed=n, dtype=torch.bfloat16) for n, shape in enumerate(shapes))
    out, first = multiply_gated(x, gate_up=weight, row_weights=scales, offsets=ends_of([33]))
    wide = (x.float(), weight.float(), scales.float())
    exact = grouped_swiglu_reference(wide[0], gate_up=wide[1], row_weights=wide[2], offsets=ends_of([33]))
    gate, up = first.float().chunk(2, -1)
    twice = gate * torch.sigmoid(gate) * up * wide[2][:, None]
    error, worse = ((one.bfloat16().float() - exact).norm() / exact.norm() for one in (out, twice))
    assert error < 2.0**-9, "one rounding to 8 bits is off by 2^-9 at most"
    assert error < 0.8 * worse


@pytest.mark.parametrize("ragged", [False, True])
def test_experts_over_tokens_match_the_reference_in_every_gradient(ragged: bool) -> None:
    plan, offsets = even_plan(11, 2), ends_of([9, 0, 13])
    if ragged:
        plan = plan_rows(plan.sources, tokens=11)
    inputs = (random_tensor(11, 9), random_tensor(22, seed=1), random_tensor(3, 14, 9, seed=2),
              random_tensor(3, 9, 7, seed=3))
    assert_backends_agree(
        lambda x, p, u, d, b: experts(x, row_weights=p, gate_up=u, down=d, offsets=offsets, plan=plan, backend=b),
        inputs=inputs, tolerance=1e-5, reason=ORDER,
    )


def fused_layer(
    x: torch.Tensor, scales: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, backend: str = "triton"
) -> torch.Tensor:
    places = torch.arange(10, device=x.device).view(5, 2)
    offsets = torch.arange(5, 11, 5, device=x.device)
    plan = RowPlan(places.flatten() // 2, places)
    return experts(x, row_weights=scales, gate_up=gate_up, down=down, offsets=offsets, plan=plan, backend=backend)


def leaves() -> list[torch.Tensor]:
    shapes = ((5, 8), (10,), (2, 12, 8), (2, 8, 6))
    return [random_tensor(*shape, seed=n).requires_grad_() for n, shape in enumerate(shapes)]


def test_experts_compile_into_one_graph() -> None:
    ours, truth = leaves(), leaves()
    out = torch.compile(fused_layer, fullgraph=True, backend="aot_eager")(*ours)
    expected = fused_layer(*truth, backend="reference")
    assert_close(out, expected=expected, tolerance=1e-5, reason=ORDER)
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), x) for y, x in ((out, ours), (expected, truth))),
                          strict=True):
        assert_close(one, expected=other, tolerance=1e-4, reason=f"{ORDER}, squared")


@pytest.mark.skipif(kernel_device().type != "cpu", reason="a GPU says it itself, see below")
def test_experts_read_no_value_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("a value was read by the host")

    ours = leaves()
    monkeypatch.setattr(checks, "lies_open", lambda tensor: False)  # the tensors stand for those of a GPU
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, read)
    fused_layer(*ours).sum().backward()
    with pytest.raises(AssertionError, match="read by the host"):
        fused_layer(*ours, backend="reference")


@pytest.mark.skipif(kernel_device().type != "cuda", reason="asks CUDA")
def test_experts_do_not_wait_for_the_gpu() -> None:
    ours = leaves()
    fused_layer(*ours).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused_layer(*ours).sum().backward()
        with pytest.raises(RuntimeError, match="synchroniz"):
            ours[0].sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in ours)


def test_nothing_is_kept_where_no_gradient_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    inputs = (random_tensor(4, 8), random_tensor(2, 6, 8).requires_grad_(), random_tensor(4))

    def watched(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        kept.append(arguments[-1])
        return grouped_swiglu_triton(*arguments)

    monkeypatch.setattr("ernie5_kernels.grouped_swiglu.kernel.grouped_swiglu_triton", watched)
    call = {"gate_up": inputs[1], "row_weights": inputs[2], "offsets": ends_of([2, 2]), "backend": "triton"}
    one = grouped_swiglu(inputs[0], **call)
    with torch.no_grad():
        other = grouped_swiglu(inputs[0], **call)
    assert kept == [True, False] and torch.equal(one, other)


class MadeZeros(TorchDispatchMode):
    """Shapes of the tensors of zeros that are made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self, function: object, _: object, arguments: tuple = (), named: dict | None = None
    ) -> object:
        out = function(*arguments, **(named or {}))
        if "zero" in str(function):
            self.shapes.append(tuple(out.shape))
        return out


def test_no_zeros_are_made_for_a_gradient_of_the_product_that_is_kept() -> None:
    """They would be as large as the product itself: nearly a gigabyte per layer of the flagship."""
    leaves = [random_tensor(*shape).requires_grad_() for shape in ((4, 8), (2, 6, 8), (4,))]
    out = grouped_swiglu(
        leaves[0], gate_up=leaves[1], row_weights=leaves[2], offsets=ends_of([2, 2]), backend="triton"
    )
    with MadeZeros() as made:
        out.sum().backward()
    assert (4, 6) not in made.shapes and all(leaf.grad.abs().sum() > 0 for leaf in leaves)
    with MadeZeros() as made:
        torch.zeros(4, 6)
    assert made.shapes == [(4, 6)]


def test_the_gradient_of_what_was_not_kept_is_refused() -> None:
    """It would be read from memory that there is not."""
    x, weight, scales = random_tensor(4, 8).requires_grad_(), random_tensor(2, 6, 8), random_tensor(4)
    out, _ = grouped_swiglu_triton(x, weight, scales, ends_of([2, 2]), None, None, False)
    with pytest.raises(KernelError, match="grouped_swiglu: backward of a product that was not kept"):
        out.sum().backward()


def test_wrong_tensors_and_gathering_without_a_plan_are_refused() -> None:
    rows, weight, scales, offsets = random_tensor(4, 8), random_tensor(2, 6, 8), random_tensor(4), ends_of([2, 2])
    call = {"row_weights": scales, "offsets": offsets, "backend": "triton"}
    with pytest.raises(ValueError, match=r"grouped_swiglu: gate_up has shape \(2, 8, 8\).*contiguous"):
        grouped_swiglu(rows, gate_up=random_tensor(2, 8, 8).transpose(1, 2), **call)
    with pytest.raises(ValueError, match=r"grouped_swiglu: gate_up .*gate and up"):
        grouped_swiglu(rows, gate_up=random_tensor(2, 5, 8), **call)
    with pytest.raises(ValueError, match="gathers=True needs backend triton and a plan"):
        grouped_swiglu(rows, gate_up=weight, gathers=True, **call)
    with pytest.raises(ValueError, match="gathers=True needs backend triton and a plan"):
        plan = plan_rows(torch.arange(4, device=rows.device), tokens=4)
        grouped_swiglu(rows, gate_up=weight, plan=plan, gathers=True, **call)


@pytest.mark.skipif(kernel_device().type != "cpu", reason="a GPU is not asked for values")
def test_places_beyond_the_rows_are_refused_before_a_kernel_reads_them() -> None:
    plan = RowPlan(torch.tensor([0, 1]), torch.tensor([[0], [9]]), checks=False)
    with pytest.raises(ValueError, match="places .*may hold 0 to 1"):
        grouped_swiglu(random_tensor(2, 8), gate_up=random_tensor(1, 6, 8), row_weights=random_tensor(2),
                       offsets=ends_of([2]), plan=plan, gathers=True, backend="triton")


@pytest.mark.parametrize("gathers", [False, True])
def test_the_operator_passes_opcheck(gathers: bool) -> None:
    plan = even_plan(3, 2)
    index = (plan.sources, plan.places) if gathers else (None, None)
    torch.library.opcheck(grouped_swiglu_triton, (
        random_tensor(3 if gathers else 6, 8).requires_grad_(), random_tensor(2, 4, 8).requires_grad_(),
        random_tensor(6).requires_grad_(), ends_of([2, 3]), *index, True,
    ))
