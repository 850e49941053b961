"""Operators inside other machinery: torch.func, FakeTensors, default dtypes and devices, threads, freed memory.

C++ follows addresses: what has none (or another dtype than it was told) ended the process or gave other numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ernie5.errors import KernelError
from ernie5_kernels.attention import attention, plan_attention
from ernie5_kernels.experts import experts
from ernie5_kernels.grouped_gemm import grouped_gemm
from ernie5_kernels.linear import linear
from ernie5_kernels.linear_cross_entropy import linear_cross_entropy
from ernie5_kernels.native.library import native_library
from ernie5_kernels.rms_norm import rms_norm
from ernie5_kernels.rope3d import rope3d, rotation_of
from ernie5_kernels.route import route
from ernie5_kernels.route.logits import router_logits
from ernie5_kernels.router_topk import router_topk
from ernie5_kernels.sum_squares import sum_squares
from ernie5_kernels.swiglu import swiglu
from ernie5_kernels.testing import assert_close, outputs_and_gradients
from ernie5_kernels.token_rows import collect_rows, plan_rows, spread_rows

TOKENS, WIDTH, HIDDEN, EXPERTS = 6, 8, 4, 3
SOURCES = torch.tensor([5, 0, 3, 3, 1, 0, 2, 5])
OFFSETS = torch.tensor([3, 3, 8])
ENDS = torch.tensor([[2, 2, 5, 5, 5]])
INTERVALS = torch.stack([torch.arange(5).view(1, 5), 0 * ENDS, 0 * ENDS, ENDS], -1).int()
PLAN = plan_rows(SOURCES, tokens=TOKENS)
SEEN = plan_attention(INTERVALS, batch_rows=1, query_tokens=5, key_tokens=5)
ROTATION = rotation_of(torch.arange(10.0).view(1, 5, 2))
BIAS = torch.zeros(EXPERTS)
TARGETS = torch.tensor([0, 6, 2, 2, 1, 3])

OPERATORS: dict[str, tuple[Callable[..., torch.Tensor], tuple[tuple[int, ...], ...]]] = {
    "attention": (lambda q, k, v: attention(q, key=k, value=v, plan=SEEN), ((1, 5, 2, 4), (1, 5, 1, 4), (1, 5, 1, 4))),
    "experts": (
        lambda x, w, up, down: experts(x, row_weights=w, gate_up=up, down=down, offsets=OFFSETS),
        ((8, WIDTH), (8,), (EXPERTS, 2 * HIDDEN, WIDTH), (EXPERTS, WIDTH, HIDDEN)),
    ),
    "experts of tokens": (
        lambda x, w, up, down: experts(x, row_weights=w, gate_up=up, down=down, offsets=OFFSETS, plan=PLAN),
        ((TOKENS, WIDTH), (8,), (EXPERTS, 2 * HIDDEN, WIDTH), (EXPERTS, WIDTH, HIDDEN)),
    ),
    "linear": (lambda x, w: linear(x, weight=w), ((TOKENS, WIDTH), (7, WIDTH))),
    "linear_cross_entropy": (
        lambda x, w: linear_cross_entropy(x, weight=w, targets=TARGETS), ((TOKENS, WIDTH), (7, WIDTH))
    ),
    "rms_norm": (lambda x, w: rms_norm(x, weight=w, eps=1e-5), ((TOKENS, WIDTH), (WIDTH,))),
    "rope3d": (lambda x: rope3d(x, rotation=ROTATION), ((1, 5, 2, 4),)),
    "route": (lambda x, w: route(x, weight=w, bias=BIAS, top_k=2).weights, ((TOKENS, WIDTH), (EXPERTS, WIDTH))),
    "router_topk": (lambda x: router_topk(x, bias=BIAS, top_k=2).weights, ((TOKENS, EXPERTS),)),
    "swiglu": (lambda x, w: swiglu(x, row_weights=w), ((TOKENS, 2 * HIDDEN), (TOKENS,))),
    "spread_rows": (lambda x: spread_rows(x, plan=PLAN), ((TOKENS, WIDTH),)),
    "collect_rows": (lambda x: collect_rows(x, plan=PLAN), ((8, WIDTH),)),
}
EACH = pytest.mark.parametrize("name", OPERATORS)


def _inputs(name: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") for shape in OPERATORS[name][1]]


def _expected(name: str) -> list[torch.Tensor]:
    return outputs_and_gradients(OPERATORS[name][0], inputs=_inputs(name))


@pytest.fixture(params=(torch.float64, torch.bfloat16), ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[None]:
    """Another default dtype of the program, put back afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("default_dtype")
@EACH
def test_the_default_dtype_changes_nothing(name: str) -> None:
    """`route` took its weights' memory in the default dtype: wrong numbers by fp64, memory of others by bf16."""
    call = OPERATORS[name][0]
    out = call(*_inputs(name))
    torch.set_default_dtype(torch.float32)
    assert out.dtype == torch.float32 and torch.equal(out, call(*_inputs(name)))


@EACH
def test_the_default_device_changes_nothing(name: str) -> None:
    with torch.device("meta"):
        out = OPERATORS[name][0](*_inputs(name))
    assert torch.equal(out, OPERATORS[name][0](*_inputs(name)))


def test_the_default_device_changes_nothing_for_bf16_groups_and_squares() -> None:
    x, weight = _inputs("linear")
    call = {"weight": weight.bfloat16().repeat(EXPERTS, 1, 1), "offsets": OFFSETS, "backend": "torch"}
    rows = x.bfloat16().repeat(2, 1)[:8]
    with torch.device("meta"):
        out, squares = grouped_gemm(rows, **call), sum_squares([x])
    assert torch.equal(out, grouped_gemm(rows, **call)) and torch.equal(squares, sum_squares([x]))


@EACH
def test_torch_func_gets_gradients(name: str) -> None:
    call, inputs = OPERATORS[name][0], _inputs(name)
    out, back = torch.func.vjp(call, *inputs)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    plain = call(*leaves)
    upstream = torch.linspace(-1, 1, plain.numel()).view(plain.shape)
    expected = torch.autograd.grad(plain, leaves, upstream)
    for mine, truth in zip((out, *back(upstream)), (plain.detach(), *expected), strict=True):
        assert_close(mine, expected=truth, tolerance=2e-5, reason="both sum in fp32, in another order")


@EACH
def test_vmap_maps(name: str) -> None:
    call, (first, *others) = OPERATORS[name][0], _inputs(name)
    mapped = torch.vmap(lambda x: call(x, *others))(torch.stack([first, -first]))
    for mine, x in zip(mapped, (first, -first), strict=True):
        assert_close(mine, expected=call(x, *others), tolerance=2e-5, reason="both sum in fp32, in another order")


@pytest.mark.skipif(native_library() is None, reason="no C++ compiler on this machine")
def test_a_back_end_by_name_is_refused_in_torch_func() -> None:
    x, weight = _inputs("rms_norm")
    with pytest.raises(KernelError, match="native .* torch.func cannot transform; use auto or reference"):
        torch.func.grad(lambda x: rms_norm(x, weight=weight, eps=1e-5, backend="native").sum())(x)


@pytest.mark.parametrize("name", ["linear", "rms_norm", "rope3d", "route", "router_topk", "swiglu"])
def test_fake_tensors_have_shapes_alone(name: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out = OPERATORS[name][0](*map(mode.from_tensor, _inputs(name)))
    assert out.shape == OPERATORS[name][0](*_inputs(name)).shape


def test_a_plan_is_made_without_a_value_on_the_host() -> None:
    """FakeTensors have none; of a GPU's it would mean to wait."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        plan = plan_rows(mode.from_tensor(SOURCES), tokens=TOKENS)
    assert [tuple(part.shape) for part in plan.tensors] == [tuple(part.shape) for part in PLAN.tensors]
    assert PLAN.starts.tolist() == [0, 2, 3, 4, 6, 6, 8] and PLAN.places.tolist() == [1, 5, 4, 6, 2, 3, 0, 7]


@pytest.mark.skipif(native_library() is None, reason="no C++ compiler on this machine")
def test_a_tensor_whose_storage_was_freed_is_refused() -> None:
    x, weight = _inputs("rms_norm")
    weight.untyped_storage().resize_(0)
    with pytest.raises(KernelError, match="shape \\(8,\\) that has no memory"):
        rms_norm(x, weight=weight, eps=1e-5)


def test_python_threads_do_not_share_scratch_memory() -> None:
    truth = {name: _expected(name) for name in OPERATORS}
    wrong: list[str] = []

    def work(turn: int) -> None:
        names = [*OPERATORS][turn:] + [*OPERATORS][:turn]
        for name in names * 5:
            if not all(map(torch.equal, _expected(name), truth[name])):
                wrong.append(name)

    workers = [threading.Thread(target=work, args=(turn,)) for turn in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


PRODUCTS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "linear": lambda x, w: linear(x, weight=w[0]),
    "grouped_gemm": lambda x, w: grouped_gemm(x, weight=w, offsets=torch.tensor([2, TOKENS]), backend="torch"),
    "router_logits": lambda x, w: router_logits(x.bfloat16(), weight=w[0].bfloat16()),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_keeps_no_rows_for_a_weight_that_is_frozen(name: str) -> None:
    """And no weight for rows that ask for nothing: what a layer keeps lives until its backward pass."""
    shapes = {"rows": (TOKENS, WIDTH), "weight": (2, 7, WIDTH)}
    for asking in (("rows",), ("weight",), ("rows", "weight")):
        made = {side: torch.ones(shape, requires_grad=side in asking) for side, shape in shapes.items()}
        kept: list[tuple[int, ...]] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, kept=kept: (kept.append(tuple(x.shape)), x)[1], lambda x: x
        ):
            out = PRODUCTS[name](made["rows"], made["weight"])
        assert (shapes["rows"] in kept) == ("weight" in asking)
        assert any(shape[-2:] == (7, WIDTH) for shape in kept) == ("rows" in asking)
        for side, grad in zip(asking, torch.autograd.grad(out.sum(), [made[side] for side in asking]), strict=True):
            assert grad.shape == shapes[side] and grad.any()
