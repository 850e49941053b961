"""What does not fit is a ValueError that names tensor and rule, before C++ or a kernel reads what is not there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ernie5.errors import KernelError
from ernie5_kernels.attention import attention, plan_attention, plan_piecewise
from ernie5_kernels.bit_cross_entropy import bit_cross_entropy
from ernie5_kernels.experts import experts
from ernie5_kernels.grouped_gemm import grouped_gemm
from ernie5_kernels.linear import linear
from ernie5_kernels.linear_cross_entropy import linear_cross_entropy, vocabulary_partials
from ernie5_kernels.moe_permute import permute_cast, plan_permutation, unpermute
from ernie5_kernels.native.library import native_library
from ernie5_kernels.quant_cast import quant_cast
from ernie5_kernels.rms_norm import rms_norm
from ernie5_kernels.rope3d import rope3d, rotation_of
from ernie5_kernels.route import route
from ernie5_kernels.sum_squares import sum_squares
from ernie5_kernels.swiglu import swiglu
from ernie5_kernels.testing import poisoned_memory
from ernie5_kernels.token_rows import RowPlan, gather_rows, spread_rows, sum_places

ONE = torch.ones
WHOLE = ONE(2, 4, dtype=torch.int64)
BY_TORCH = ("torch",) if native_library() is None else ("torch", "native")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def far(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without memory, which C++ would take for a null pointer."""
    return torch.empty(shape, dtype=dtype, device="meta")


def attend(
    query: torch.Tensor | None = None, key: torch.Tensor | None = None, intervals: torch.Tensor | None = None,
    plan_rows: int = 2, **options: float | str,
) -> torch.Tensor:
    query, key = ONE(2, 5, 4, 8) if query is None else query, ONE(2, 5, 2, 8) if key is None else key
    plan = plan_attention(intervals, batch_rows=plan_rows, query_tokens=5, key_tokens=5)
    return attention(query, key=key, value=key, plan=plan, **options)


def mix(
    rows: torch.Tensor | None = None, row_weights: torch.Tensor | None = None, gate_up: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    return experts(
        ONE(6, 8) if rows is None else rows, row_weights=ONE(6) if row_weights is None else row_weights,
        gate_up=ONE(3, 12, 8) if gate_up is None else gate_up, down=ONE(3, 8, 6),
        offsets=torch.tensor([2, 2, 5]) if offsets is None else offsets,
    )


def head(*targets: float, weight: torch.Tensor | None = None, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    ids = torch.tensor(targets or (0, 1, 6), dtype=dtype)
    return linear_cross_entropy(ONE(3, 8), weight=ONE(7, 8) if weight is None else weight, targets=ids)


def turned(rotation: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
    return rope3d(ONE(2, 3, 4, 8) if x is None else x, rotation=rotation)


ROTATION = rotation_of(normal(2, 3, 4))
SLOTS = plan_permutation(torch.tensor([[0, 1], [1, 0]]), num_experts=2, backend="reference")

REFUSED: tuple[tuple[str, Callable[[], object]], ...] = (
    ("query .*must be \\[rows, queries, heads, width\\]", lambda: attend(ONE(2, 5, 8))),
    ("key .*must be \\[4, 5, key heads, 8\\]", lambda: attend(ONE(4, 5, 4, 8), plan_rows=4)),
    ("key .*must be \\[2, 5, key heads, 16\\]", lambda: attend(ONE(2, 5, 4, 16))),
    ("key .*key heads dividing 4", lambda: attend(key=ONE(2, 5, 0, 8))),
    ("query .*width of at least 1", lambda: attend(ONE(2, 5, 4, 0), key=ONE(2, 5, 2, 0))),
    ("query .*floating", lambda: attend(ONE(2, 5, 4, 8).int(), key=ONE(2, 5, 2, 8).int())),
    ("plan.intervals .*must be \\[2, 5, 4\\]", lambda: attend(intervals=ONE(1, 5, 4).int())),
    ("plan.intervals .*must be \\[2, 5, 4\\]", lambda: attend(intervals=ONE(2, 3, 4).int())),
    ("plan.intervals .*integers", lambda: attend(intervals=ONE(2, 5, 4))),
    ("plan.intervals .*must be on cpu", lambda: attend(intervals=far(2, 5, 4, dtype=torch.int32))),
    ("query .*plan for 1 rows", lambda: attend(plan_rows=1, backend="torch")),
    ("the plan is of plan_piecewise",
     lambda: attention(ONE(1, 4, 1, 8), key=ONE(1, 4, 1, 8), value=ONE(1, 4, 1, 8),
                       plan=plan_piecewise(ONE(1, 4, 4).int(), pieces=((0, 2), (6, 2))))),
    ("rows .*must be \\[rows, width\\]", lambda: mix(ONE(8))),
    ("gate_up .*must be \\[experts", lambda: mix(gate_up=ONE(12, 8))),
    ("gate_up .*must have dtype", lambda: mix(gate_up=ONE(3, 12, 8).bfloat16())),
    ("row_weights .*must be \\[6\\]", lambda: mix(row_weights=ONE(6, 1))),
    ("row_weights .*must be on cpu", lambda: mix(row_weights=far(6))),
    ("offsets .*holds 2 after 4", lambda: mix(offsets=torch.tensor([4, 2, 5]))),
    ("offsets .*at most the 6 rows", lambda: mix(offsets=torch.tensor([2, 4, 2**40]))),
    ("offsets .*holds -3 after 0", lambda: mix(offsets=torch.tensor([-3, 2, 5]))),
    ("offsets .*int32 or int64", lambda: mix(offsets=torch.tensor([2.0, 2.0, 5.0]))),
    ("offsets .*must be on cpu", lambda: mix(offsets=far(3, dtype=torch.int64))),
    ("offsets .*holds -3 after 0",
     lambda: grouped_gemm(ONE(6, 8), weight=ONE(3, 4, 8), offsets=torch.tensor([-3, 2, 5]))),
    ("weight .*at least one group", lambda: grouped_gemm(ONE(6, 8), weight=ONE(0, 4, 8), offsets=WHOLE[0, :0])),
    ("targets .*holds 0 to 7 and may hold 0 to 6", lambda: head(0, 1, 7)),
    ("targets .*holds -100 to 1", lambda: head(0, 1, -100)),
    ("targets .*int64", lambda: head(0, 1, 6, dtype=torch.int32)),
    ("targets .*int64", lambda: head(0, 1, 6, dtype=torch.float32)),
    ("targets .*must be on cpu",
     lambda: linear_cross_entropy(ONE(3, 8), weight=ONE(7, 8), targets=far(3, dtype=torch.int64))),
    ("weight .*at least one id", lambda: head(weight=ONE(0, 8))),
    ("weight .*must have dtype", lambda: head(weight=ONE(7, 8).bfloat16())),
    ("targets .*one per row",
     lambda: vocabulary_partials(ONE(3, 8), weight=ONE(7, 8), targets=WHOLE[0, :2], first_id=0)),
    ("weight .*width of hidden",
     lambda: vocabulary_partials(ONE(2, 8), weight=ONE(7, 9), targets=WHOLE[0, :2], first_id=0)),
    ("weight .*one per column", lambda: rms_norm(ONE(3, 8), weight=ONE(1, 8), eps=1e-5)),
    ("weight .*must be on cpu", lambda: rms_norm(ONE(3, 8), weight=far(8), eps=1e-5)),
    ("x .*width of at least 1", lambda: rms_norm(ONE(3, 0), weight=ONE(0), eps=1e-5)),
    ("x .*floating", lambda: rms_norm(WHOLE, weight=ONE(4), eps=1e-5)),
    ("x .*\\[rows, tokens, heads, width\\]", lambda: turned(ROTATION, ONE(2, 3, 8))),
    ("x .*\\[rows, tokens, heads, width\\]", lambda: turned(ROTATION, ONE(2, 3, 2, 2, 8))),
    ("rotation .*complex", lambda: turned(ONE(2, 3, 4))),
    ("rotation .*must be on cpu", lambda: turned(far(2, 3, 4, dtype=torch.complex64))),
    ("gate_up .*even", lambda: swiglu(ONE(3, 7))),
    ("gate_up .*even", lambda: swiglu(ONE(()))),
    ("row_weights .*must be on cpu", lambda: swiglu(ONE(3, 8), row_weights=far(3))),
    ("weight .*must be on cpu", lambda: linear(ONE(3, 8), weight=far(5, 8))),
    ("weight .*must have dtype", lambda: linear(ONE(3, 8), weight=ONE(5, 8).bfloat16())),
    ("x .*\\[tokens, width\\]", lambda: gather_rows(ONE(5, 2, 8), sources=WHOLE[0])),
    ("sources .*\\[rows\\]", lambda: gather_rows(ONE(5, 8), sources=WHOLE)),
    ("sources .*may hold 0 to 4", lambda: gather_rows(ONE(5, 8), sources=torch.tensor([0, 5]))),
    ("sources .*holds -1 to 0", lambda: gather_rows(ONE(5, 8), sources=torch.tensor([0, -1]))),
    ("sources .*must be on cpu", lambda: gather_rows(ONE(5, 8), sources=far(2, dtype=torch.int64))),
    ("sources .*int64", lambda: gather_rows(ONE(5, 8), sources=WHOLE[0].int())),
    ("x .*wants a gradient", lambda: gather_rows(ONE(5, 8, requires_grad=True), sources=WHOLE[0])),
    ("rows .*\\[rows, width\\]", lambda: sum_places(ONE(6, 2, 8), places=WHOLE)),
    ("places .*\\[tokens, k\\]", lambda: sum_places(ONE(6, 8), places=WHOLE[0])),
    ("places .*may hold 0 to 5", lambda: sum_places(ONE(6, 8), places=WHOLE * 2**40)),
    ("places .*must be on cpu", lambda: sum_places(ONE(6, 8), places=far(2, 4, dtype=torch.int64))),
    ("rows .*wants a gradient", lambda: sum_places(ONE(6, 8, requires_grad=True), places=WHOLE)),
    ("logits .*\\[cells, bits\\]", lambda: bit_cross_entropy(ONE(3, 2, 5), bits=ONE(3, 2, 5), weights=ONE(3))),
    ("bits .*must be on cpu", lambda: bit_cross_entropy(ONE(3, 5), bits=far(3, 5), weights=ONE(3))),
    ("choices .*may hold 0 to 3", lambda: plan_permutation(torch.tensor([[0, 4]]), num_experts=4)),
    ("choices .*holds -1 to 0", lambda: plan_permutation(torch.tensor([[0, -1]]), num_experts=4)),
    ("num_experts is 0", lambda: plan_permutation(WHOLE, num_experts=0)),
    ("x .*width of at least 1", lambda: permute_cast(ONE(2, 0), permutation=SLOTS)),
    ("weights .*floating", lambda: unpermute(ONE(4, 8), permutation=SLOTS, weights=WHOLE[:, :2])),
    ("x .*floating", lambda: quant_cast(WHOLE, block_rows=1)),
    ("tensor .*must be on cpu", lambda: sum_squares([ONE(3), far(3)])),
    ("tensor .*floating", lambda: sum_squares([WHOLE])),
)


@pytest.mark.parametrize(("rule", "call"), REFUSED, ids=[str(n) for n in range(len(REFUSED))])
def test_what_does_not_fit_is_refused_by_name(rule: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=rule):
        call()


ROWS, OFFSETS, PLACES = torch.tensor([0, 1, 6, 3]), torch.tensor([2, 2, 3]), torch.tensor([[0, 1], [1, 0]])
CAUSAL = torch.stack((torch.arange(5), torch.zeros(5), torch.zeros(5), torch.full((5,), 5)), -1).int().repeat(2, 1, 1)
PLAN = plan_attention(CAUSAL, batch_rows=2, query_tokens=5, key_tokens=5)
ANGLES = rotation_of(normal(2, 5, 4))
CALLS: dict[str, tuple[Callable[..., torch.Tensor], tuple[tuple[int, ...], ...]]] = {
    "attention": (lambda b, q, k, v: attention(q, key=k, value=v, plan=PLAN, backend=b),
                  ((2, 5, 4, 8), (2, 5, 2, 8), (2, 5, 2, 8))),
    "experts": (lambda b, r, w, u, d: experts(r, row_weights=w, gate_up=u, down=d, offsets=OFFSETS, backend=b),
                ((4, 8), (4,), (3, 12, 8), (3, 8, 6))),
    "head": (lambda b, h, w: linear_cross_entropy(h, weight=w, targets=ROWS, backend=b), ((4, 8), (7, 8))),
    "rms_norm": (lambda b, x, w: rms_norm(x, weight=w, eps=1e-5, backend=b), ((3, 4, 8), (8,))),
    "rope3d": (lambda b, x: rope3d(x, rotation=ANGLES, backend=b), ((2, 5, 4, 8),)),
    "swiglu": (lambda b, x, w: swiglu(x, row_weights=w, backend=b), ((3, 4, 8), (3, 4))),
    "linear": (lambda b, x, w: linear(x, weight=w, backend=b), ((3, 4, 8), (5, 8))),
}
NO_SECOND = [
    (op, backend) for op in CALLS for backend in BY_TORCH if backend == "native" or op not in ("linear", "rope3d")
]


@pytest.mark.parametrize(("op", "backend"), NO_SECOND)
def test_a_second_derivative_is_refused_rather_than_wrong(op: str, backend: str) -> None:
    function, shapes = CALLS[op]
    leaves = [normal(*shape, seed=n).requires_grad_() for n, shape in enumerate(shapes)]
    with pytest.raises(KernelError, match="has no second derivative"):
        torch.autograd.grad(function(backend, *leaves).square().sum(), leaves, create_graph=True)


PLANS = {
    "a wrong place": ("places .*row 1 is of token 1 by them and of token 0 by", ([0, 0, 1, 1], [[0, 2], [1, 3]])),
    "a row twice": ("places .*row 1 is nobody's by them and of token 0", ([0, 0, 1, 1], [[0, 0], [2, 3]])),
    "a row beyond": (r"places .*it holds 0 to 4 and may hold 0 to 3", ([0, 0, 1, 1], [[0, 1], [2, 4]])),
    "a row too few": ("places .*must hold each of the 4 rows once", ([0, 0, 1, 1], [[0], [2]])),
    "no such token": (r"sources .*it holds -1 to 0 and may hold 0 to 0", ([0, -1], [[0, 0]])),
    "starts that fall": ("starts .*must rise from 0 to the 3 rows", ([0, 0, 2], [0, 1, 2], [0, 2, 1, 3])),
    "starts that begin late": ("starts .*must rise from 0 to the 3 rows", ([0, 0, 1], [0, 1, 2], [1, 2, 3])),
    "starts that end early": ("starts .*must rise from 0 to the 3 rows", ([0, 0, 1], [0, 1, 2], [0, 2, 2])),
    "starts of others": ("row 1 is of token 1 by them and of token 0 by sources", ([0, 0, 1], [0, 1, 2], [0, 1, 3])),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_whose_sides_disagree_is_refused_where_it_is_made(name: str) -> None:
    rule, lists = PLANS[name]
    with pytest.raises(ValueError, match=rule):
        RowPlan(*map(torch.tensor, lists))


def test_a_plan_made_by_hand_that_agrees_is_taken() -> None:
    for lists in (([1, 0, 1, 0], [[3, 1], [0, 2]]), ([2, 0, 2], [1, 0, 2], [0, 1, 1, 3])):
        plan = RowPlan(*map(torch.tensor, lists))
        x = torch.arange(float(plan.tokens)).unsqueeze(1)
        assert spread_rows(x, plan=plan).flatten().tolist() == lists[0]
    empty = torch.zeros(0, dtype=torch.int64)
    assert RowPlan(empty, empty, torch.zeros(4, dtype=torch.int64)).tokens == 3
    assert RowPlan(empty, empty.view(0, 2)).tokens == 0


def views(shape: tuple[int, ...], *, seed: int) -> dict[str, torch.Tensor]:
    """The same kind of numbers in memory that no kernel could read straight."""
    return {
        "turned": normal(*shape[::-1], seed=seed).permute(list(reversed(range(len(shape))))),
        "every second": normal(*shape[:-1], 2 * shape[-1], seed=seed)[..., 1::2],
        "one row for all": normal(1, *shape[1:], seed=seed).expand(shape),
        "one column for all": normal(*shape[:-1], 1, seed=seed).expand(shape),
        "negative": torch._neg_view(normal(*shape, seed=seed)),
    }


@pytest.mark.parametrize("backend", BY_TORCH)
@pytest.mark.parametrize("op", CALLS)
def test_views_give_what_their_copies_give(op: str, backend: str) -> None:
    function, shapes = CALLS[op]
    kinds = [views(shape, seed=n) for n, shape in enumerate(shapes)]
    for kind in kinds[0]:
        name = "auto" if kind == "negative" and backend == "native" else backend  # C++ leaves these to PyTorch
        results = []
        for make in (lambda x: x, lambda x: x.resolve_neg().contiguous()):
            leaves = [make(one[kind]).detach().requires_grad_() for one in kinds]
            out = function(name, *leaves)
            upstream = make(normal(*reversed(out.shape), seed=9).permute(list(reversed(range(out.ndim)))))
            results.append([out, *torch.autograd.grad(out, leaves, upstream)])
        for one, other in zip(*results, strict=True):  # auto may choose PyTorch for the view and C++ for its copy
            torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5, msg=f"{op}, {kind}")


@pytest.mark.parametrize("backend", BY_TORCH)
@pytest.mark.parametrize("op", CALLS)
def test_an_upstream_gradient_in_a_negative_view_keeps_its_sign(op: str, backend: str) -> None:
    """What torch.complex hands back below a conjugate is one; its memory holds the opposite numbers."""
    function, shapes = CALLS[op]
    leaves = [normal(*shape, seed=n).requires_grad_() for n, shape in enumerate(shapes)]
    out = function(backend, *leaves)
    upstream = torch._neg_view(normal(*out.shape, seed=9))
    for one, other in zip(*(
        torch.autograd.grad(out, leaves, grad, retain_graph=True) for grad in (upstream, upstream.resolve_neg())
    ), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", BY_TORCH)
def test_a_rotation_and_a_bias_in_a_negative_view_keep_their_sign(backend: str) -> None:
    rotation, bias = torch._neg_view(ANGLES.clone()), torch._neg_view(normal(6))
    one, other = (rope3d(normal(2, 5, 4, 8), rotation=r, backend=backend) for r in (rotation, rotation.resolve_neg()))
    assert torch.equal(one, other)
    one, other = (
        route(normal(9, 8), weight=normal(6, 8, seed=1), bias=b, top_k=2, backend=backend).choices
        for b in (bias, bias.resolve_neg())
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("backend", BY_TORCH)
def test_row_weights_in_a_negative_view_keep_their_sign(backend: str) -> None:
    weights = torch._neg_view(normal(4))
    for op in ("swiglu", "experts"):
        function, shapes = CALLS[op]
        x, *rest = (normal(*shape, seed=n) for n, shape in enumerate(((4, 8),) if op == "swiglu" else shapes))
        one, other = (function(backend, x, w, *rest[1:]) for w in (weights, weights.resolve_neg()))
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", BY_TORCH)
@pytest.mark.parametrize("scale", (0.0, -0.5))
def test_attention_takes_any_scale(scale: float, backend: str) -> None:
    function = lambda b, *x: attention(x[0], key=x[1], value=x[2], plan=PLAN, scale=scale, backend=b)  # noqa: E731
    leaves = [normal(*shape, seed=n).requires_grad_() for n, shape in enumerate(CALLS["attention"][1])]
    for one, other in zip(*(
        (out := function(b, *leaves), *torch.autograd.grad(out.square().sum(), leaves)) for b in (backend, "reference")
    ), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BY_TORCH)
def test_a_conjugated_rotation_turns_back(backend: str) -> None:
    x = normal(2, 5, 4, 8)
    back = rope3d(rope3d(x, rotation=ANGLES, backend=backend), rotation=ANGLES.conj(), backend=backend)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BY_TORCH)
def test_a_linear_map_of_no_inputs_gives_zeros_and_empty_gradients(backend: str) -> None:
    x, weight = torch.ones(3, 0, requires_grad=True), torch.ones(5, 0, requires_grad=True)
    out = linear(x, weight=weight, backend=backend)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(3, 5)) and x.grad.shape == (3, 0) and weight.grad.shape == (5, 0)


@pytest.mark.parametrize("backend", BY_TORCH)
def test_weights_of_rows_without_columns_get_a_zero_gradient(backend: str) -> None:
    """C++ was told of no rows, and the gradient stayed what memory held."""
    weights = torch.ones(3, requires_grad=True)
    with poisoned_memory():
        out = swiglu(torch.ones(3, 0), row_weights=weights, backend=backend)
        (grad,) = torch.autograd.grad(out, weights, torch.ones(3, 0))
    assert torch.equal(grad, torch.zeros(3))


@pytest.mark.parametrize("op", ("rms_norm", "swiglu", "linear"))
def test_operators_compile_whole_with_their_gradients(op: str) -> None:
    function, shapes = CALLS[op]
    leaves = [normal(*shape, seed=n).requires_grad_() for n, shape in enumerate(shapes)]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for one, other in zip(*(
        (out := f("auto", *leaves), *torch.autograd.grad(out.square().sum(), leaves)) for f in (compiled, function)
    ), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_attention_refuses_a_scale_that_is_no_number(scale: float) -> None:
    """C++ made zeros of it, as of rows that see nothing."""
    with pytest.raises(ValueError, match=f"scale is {scale}; it must be a finite number"):
        attend(scale=scale)


@pytest.mark.parametrize("backend", BY_TORCH)
def test_rows_beyond_int32_stay_beyond_all_rows(backend: str) -> None:
    """The largest int64, meant as for ever, became row -1, from which nothing is visible."""
    ever, before = torch.iinfo(torch.int64).max, torch.iinfo(torch.int64).min
    intervals = torch.tensor([[[before, ever, ever, ever]] * 5] * 2)
    query, key = normal(2, 5, 4, 8), normal(2, 5, 2, 8, seed=1)
    out = attend(query, key, intervals, backend=backend)
    torch.testing.assert_close(out, attend(query, key, intervals, backend="reference"), rtol=0, atol=2e-6)


@pytest.mark.skipif(native_library() is None, reason="no C++ compiler on this machine")
def test_what_native_alone_cannot_take_is_named() -> None:
    """It said that tensors must all be in fp32 or all in bf16, which they were."""
    with pytest.raises(ValueError, match="attention: query .*native takes heads of an even width"):
        attend(ONE(2, 5, 4, 7), key=ONE(2, 5, 2, 7), backend="native")
    with pytest.raises(ValueError, match="rope3d: rotation .*native takes complex64"):
        rope3d(normal(2, 5, 4, 8), rotation=ANGLES.to(torch.complex128), backend="native")
    with pytest.raises(ValueError, match="route: bias .*native takes float32"):
        route(normal(9, 8), weight=normal(6, 8), bias=normal(6).double(), top_k=2, backend="native")


def test_more_queries_than_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="5 queries cannot be the last of 4 positions"):
        plan_attention(None, batch_rows=1, query_tokens=5, key_tokens=4)


@pytest.mark.parametrize("rows", [0, -3])
def test_chunks_of_no_rows_are_refused(rows: int) -> None:
    """The path of PyTorch took -3 for nothing to do: a loss of zero."""
    with pytest.raises(ValueError, match=f"chunk_rows is {rows}; it must be at least 1"):
        linear_cross_entropy(ONE(2, 4), weight=ONE(3, 4), targets=torch.tensor([0, 1]), chunk_rows=rows)
