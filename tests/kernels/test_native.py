"""The C++ kernels against the references in fp64: odd sizes, empty groups, poisoned memory, any number of threads."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ernie5.errors import KernelError
from ernie5_kernels.attention import attention, plan_attention
from ernie5_kernels.experts import experts
from ernie5_kernels.linear import linear
from ernie5_kernels.linear_cross_entropy import linear_cross_entropy
from ernie5_kernels.native import library
from ernie5_kernels.native.library import native_library
from ernie5_kernels.rms_norm import rms_norm
from ernie5_kernels.rope3d import rope3d, rotation_of
from ernie5_kernels.route import route
from ernie5_kernels.router_topk import router_topk
from ernie5_kernels.router_topk.native import choose_native
from ernie5_kernels.swiglu import swiglu
from ernie5_kernels.testing import ODD_SIZES, assert_close, outputs_and_gradients, poisoned_memory
from ernie5_kernels.token_rows import RowPlan, gather_rows, plan_rows, sum_places

pytestmark = pytest.mark.skipif(native_library() is None, reason="no C++ compiler on this machine")
FP32, BF16 = (torch.float32, 4e-6, "sums of fp32"), (torch.bfloat16, 2e-2, "bf16 keeps 8 bits, products add 2^-8 each")
TYPES = pytest.mark.parametrize(("dtype", "tolerance", "reason"), (FP32, BF16), ids=("fp32", "bf16"))
PRODUCTS = pytest.mark.parametrize(
    ("library_mode", "dtype", "tolerance", "reason"),
    ((None, *FP32), (None, *BF16), ("tiles-emulated", *BF16)),
    ids=("fp32", "bf16", "bf16-tiles"),
    indirect=["library_mode"],
)


@pytest.fixture(autouse=True)
def library_mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The library that a test's parameter names by ERNIE5_NATIVE's value, else the one of the environment."""
    mode = getattr(request, "param", None)
    if mode is None:
        yield
        return
    monkeypatch.setenv("ERNIE5_NATIVE", mode)
    native_library.cache_clear()
    yield
    native_library.cache_clear()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tests run beside each other; what depends on threads sets its own number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_matches_reference(function: Callable, *inputs: torch.Tensor, tolerance: float, reason: str) -> None:
    """Outputs and gradients of function(*inputs, backend): native, and reference in fp64 on the same numbers."""
    with poisoned_memory():
        actual = outputs_and_gradients(lambda *x: function(*x, "native"), inputs=inputs)
    wide = tuple(x.double() for x in inputs)
    upstream = torch.randn(
        actual[0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).to(actual[0].dtype).double()
    leaves = [x.requires_grad_() for x in wide]
    output = function(*leaves, "reference")
    expected = [output.detach(), *torch.autograd.grad(output, leaves, upstream)]
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, expected=other, tolerance=tolerance, reason=reason)


def documents(batch: int, tokens: int) -> torch.Tensor:
    """Causal documents of uneven length, each with a bidirectional block and a hidden stretch; row 0 sees nothing."""
    intervals = torch.zeros(batch, tokens, 4, dtype=torch.int32)
    generator = torch.Generator().manual_seed(tokens)
    for row in range(batch):
        start = 0
        while start < tokens:
            end = min(tokens, start + int(torch.randint(1, 120, (1,), generator=generator)))
            intervals[row, start:end, 0] = torch.arange(start, end)
            intervals[row, start:end, 3] = end
            if end - start > 40:
                intervals[row, start + 5 : start + 25, 0] = start + 5
                intervals[row, start + 10 : start + 12, 1:3] = torch.tensor([start + 30, start + 35])
            start = end
    intervals[0, :, 0].clamp_(min=1)
    return intervals


@PRODUCTS
@pytest.mark.parametrize(
    ("tokens", "queries", "heads", "groups", "width"),
    ((300, 300, 2, 1, 64), (129, 129, 4, 2, 10), (63, 63, 4, 4, 32), (2, 1, 2, 2, 6), (200, 133, 2, 1, 16)),
)
def test_attention_matches_the_reference(
    tokens: int, queries: int, heads: int, groups: int, width: int, dtype: torch.dtype, tolerance: float, reason: str
) -> None:
    intervals = documents(2, tokens)
    for seen in (intervals, None):
        plan = plan_attention(seen, batch_rows=2, query_tokens=queries, key_tokens=tokens)
        assert_matches_reference(
            lambda q, k, v, b, plan=plan: attention(q, key=k, value=v, plan=plan, backend=b),
            normal(2, queries, heads, width, dtype=dtype),
            normal(2, tokens, groups, width, seed=1, dtype=dtype),
            normal(2, tokens, groups, width, seed=2, dtype=dtype),
            tolerance=tolerance,
            reason=reason,
        )


def test_attention_passes_on_a_nan() -> None:
    plan = plan_attention(documents(1, 20), batch_rows=1, query_tokens=20, key_tokens=20)
    key = normal(1, 20, 1, 8)
    out = attention(torch.full((1, 20, 2, 8), torch.nan), key=key, value=key, plan=plan, backend="native")
    assert out[:, 1:].isnan().all()
    assert (out[:, 0] == 0).all(), "the row that sees nothing reads nothing"


@PRODUCTS
@pytest.mark.parametrize("rows", (0, *ODD_SIZES, 1030))
def test_linear_matches_the_reference(rows: int, dtype: torch.dtype, tolerance: float, reason: str) -> None:
    for inner, outer in ((7, 33), (64, 96)):
        assert_matches_reference(
            lambda x, w, b: linear(x, weight=w, backend=b),
            normal(rows, inner, dtype=dtype), normal(outer, inner, seed=1, dtype=dtype),
            tolerance=tolerance, reason=reason,
        )


@PRODUCTS
@pytest.mark.parametrize(
    "counts",
    ((0, 5, 0, 130, 1, 0), (0, 0, 0), (700,), (1, 96, 97, 192, 193), tuple(range(1, 26))),
    ids=("uneven", "none", "one", "few", "every height of a tile"),
)
def test_experts_match_the_reference(
    counts: tuple[int, ...], dtype: torch.dtype, tolerance: float, reason: str
) -> None:
    offsets, rows = torch.tensor(counts).cumsum(0), sum(counts) + 3
    for width, hidden in ((10, 7), (64, 40), (33, 32)):
        assert_matches_reference(
            lambda x, p, u, d, b: experts(x, row_weights=p, gate_up=u, down=d, offsets=offsets, backend=b),
            normal(rows, width, dtype=dtype),
            normal(rows, seed=1).abs(),
            normal(len(counts), 2 * hidden, width, seed=2, dtype=dtype) / width**0.5,
            normal(len(counts), width, hidden, seed=3, dtype=dtype) / hidden**0.5,
            tolerance=tolerance,
            reason=reason,
        )


@PRODUCTS
def test_a_row_has_the_bits_that_it_has_among_many(dtype: torch.dtype, tolerance: float, reason: str) -> None:
    """Experts of few rows read their weights in place and forget them; what they give each row is what many get."""
    del tolerance, reason  # none: the bits are equal
    x, p, upstream = normal(200, 64, dtype=dtype), normal(200, seed=1), normal(200, 64, seed=4, dtype=dtype)
    weights = {
        "gate_up": normal(1, 80, 64, seed=2, dtype=dtype) / 8, "down": normal(1, 64, 40, seed=3, dtype=dtype) / 6,
        "backend": "native",
    }

    def rows_of(count: int) -> list[torch.Tensor]:
        own, scale = x[:count].clone().requires_grad_(), p[:count].clone().requires_grad_()
        out = experts(own, row_weights=scale, offsets=torch.tensor([count]), **weights)
        return [out.detach(), *torch.autograd.grad(out, (own, scale), upstream[:count])]

    many = rows_of(200)
    for count in (*range(1, 15), 25, 96, 97, 192):
        assert all(torch.equal(few, all_rows[:count]) for few, all_rows in zip(rows_of(count), many, strict=True))


@PRODUCTS
@pytest.mark.parametrize("tokens", (0, 1, 37, 601))
@pytest.mark.parametrize("is_even", (True, False), ids=("K rows each", "any number"))
def test_experts_of_tokens_match_the_reference(
    tokens: int, is_even: bool, dtype: torch.dtype, tolerance: float, reason: str
) -> None:
    number, top_k = 5, 3
    generator = torch.Generator().manual_seed(tokens)
    owners = torch.arange(tokens).repeat_interleave(top_k)[torch.randperm(tokens * top_k, generator=generator)]
    if is_even:
        plan = RowPlan(owners, torch.argsort(owners, stable=True).view(tokens, top_k))
    else:
        owners = owners[torch.rand(owners.shape, generator=generator) > 0.6]
        plan = plan_rows(owners, tokens=tokens)
    ends = torch.randint(0, owners.numel() + 1, (number,), generator=generator).sort().values
    for width, hidden in ((10, 7), (64, 32)):
        assert_matches_reference(
            lambda x, p, u, d, b: experts(
                x, row_weights=p, gate_up=u, down=d, offsets=ends, plan=plan, backend=b
            ),
            normal(tokens, width, dtype=dtype),
            normal(owners.numel(), seed=1).abs(),
            normal(number, 2 * hidden, width, seed=2, dtype=dtype) / width**0.5,
            normal(number, width, hidden, seed=3, dtype=dtype) / hidden**0.5,
            tolerance=tolerance,
            reason=reason,
        )


@pytest.mark.parametrize("backend", ("native", "torch"))
def test_a_plan_lives_on_in_saved_tensors_alone(backend: str) -> None:
    """Recomputation and offloading replace those; what a function keeps otherwise stays in memory."""
    plan = plan_rows(torch.tensor([1, 0, 1]), tokens=2)
    alive = [weakref.ref(tensor) for tensor in plan.tensors]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.shape, torch.zeros):
        out = experts(
            normal(2, 8).requires_grad_(), row_weights=torch.ones(3), gate_up=normal(1, 6, 8), down=normal(1, 8, 3),
            offsets=torch.tensor([3]), plan=plan, backend=backend,
        )
    del plan
    assert out.requires_grad and [tensor() for tensor in alive] == [None] * 3


@PRODUCTS
@pytest.mark.parametrize(("rows", "width", "classes"), ((0, 8, 20), (1, 7, 5), (100, 32, 301), (1030, 16, 77)))
def test_cross_entropy_matches_the_reference(
    rows: int, width: int, classes: int, dtype: torch.dtype, tolerance: float, reason: str
) -> None:
    targets = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(3))
    assert_matches_reference(
        lambda h, w, b: linear_cross_entropy(h, weight=w, targets=targets, backend=b),
        normal(rows, width, dtype=dtype), normal(classes, width, seed=1, dtype=dtype),
        tolerance=tolerance, reason=reason,
    )


@TYPES
@pytest.mark.parametrize("rows", (0, *ODD_SIZES))
def test_passes_over_rows_match_their_references(
    rows: int, dtype: torch.dtype, tolerance: float, reason: str
) -> None:
    assert_matches_reference(
        lambda x, w, b: rms_norm(x, weight=w, eps=1e-5, backend=b),
        normal(2, rows, 23, dtype=dtype), normal(23, seed=1, dtype=dtype), tolerance=tolerance, reason=reason,
    )
    assert_matches_reference(
        lambda x, p, b: swiglu(x, row_weights=p, backend=b), normal(rows, 38, dtype=dtype), normal(rows, seed=1),
        tolerance=tolerance, reason=reason,
    )
    assert_matches_reference(
        lambda x, b: swiglu(x, backend=b), normal(rows, 38, dtype=dtype), tolerance=tolerance, reason=reason
    )
    rotation = rotation_of(normal(2, rows, 11, seed=1))
    assert_matches_reference(
        lambda x, b: rope3d(x, rotation=rotation, backend=b), normal(2, rows, 3, 22, dtype=dtype),
        tolerance=tolerance, reason=reason,
    )
    places = torch.randint(0, 50, (rows, 3), generator=torch.Generator().manual_seed(1))
    x = normal(50, 23, dtype=dtype)
    gathered, expected = (gather_rows(x, sources=places[:, 0], backend=b) for b in ("native", "reference"))
    assert torch.equal(gathered, expected)
    expected = sum_places(x.double(), places=places, backend="reference")
    assert_close(sum_places(x, places=places, backend="native"), expected=expected, tolerance=tolerance, reason=reason)


@pytest.mark.parametrize(("rows", "experts", "k"), ((0, 5, 2), (7, 1, 1), (33, 17, 5), (50, 9, 9), (100, 96, 8)))
def test_the_choice_of_experts_is_that_of_a_stable_sort(rows: int, experts: int, k: int) -> None:
    """Ties, minus infinity and NaN, which counts as infinite, included."""
    x = normal(rows, experts)
    x[::3] = x[::3].round()
    x[1::5, experts // 2] = -torch.inf
    x[2::7, 0] = torch.nan
    x[3::11] = -torch.inf
    expected = x.nan_to_num(nan=torch.inf, neginf=-torch.inf).sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(choose_native(x, top_k=k), expected[:, :k])


def test_routing_by_the_library_is_that_of_the_reference() -> None:
    logits, bias, active = normal(65, 24), normal(24, seed=1), torch.arange(24) % 5 != 0
    one, other = (
        router_topk(logits, bias=bias, top_k=4, active=active, backend=backend) for backend in ("auto", "reference")
    )
    assert torch.equal(one.choices, other.choices) and torch.equal(one.weights, other.weights)


@PRODUCTS
@pytest.mark.parametrize("uses_sigmoid", (True, False), ids=("sigmoid", "softmax"))
@pytest.mark.parametrize(
    ("tokens", "width", "experts", "top_k"), ((0, 8, 4, 2), (7, 16, 4, 4), (131, 45, 37, 3), (301, 130, 300, 8))
)
def test_a_route_matches_the_reference(
    tokens: int, width: int, experts: int, top_k: int, uses_sigmoid: bool, dtype: torch.dtype, tolerance: float,
    reason: str,
) -> None:
    hidden, weight = normal(tokens, width, dtype=dtype), normal(experts, width, seed=1, dtype=dtype) * width**-0.5
    rule = {"bias": normal(experts, seed=2) / 4, "top_k": top_k, "uses_sigmoid": uses_sigmoid, "scale": 1.5}
    rule["active"] = None if experts < 10 else torch.arange(experts) % 5 != 0
    with poisoned_memory():
        made = route(hidden, weight=weight, **rule, backend="native")
    truth = route(hidden.double(), weight=weight.double(), **rule, backend="reference")
    assert torch.equal(made.choices, truth.choices)
    assert_close(made.weights, expected=truth.weights, tolerance=1e-6, reason="products of bf16 are exact in fp32 too")
    shuffled = made.choices.flip(1)
    for choices in (None, shuffled):
        assert_matches_reference(
            lambda x, w, b, choices=choices: route(x, weight=w, **rule, choices=choices, backend=b).weights,
            hidden, weight, tolerance=tolerance, reason=reason,
        )
    assert torch.equal(route(hidden, weight=weight, **rule, choices=shuffled).choices, shuffled)


def test_a_route_keeps_to_its_experts_when_numbers_are_not() -> None:
    hidden = normal(5, 16)
    hidden[1], hidden[2] = torch.nan, torch.inf
    found = route(hidden, weight=normal(9, 16, seed=1), bias=torch.zeros(9), top_k=3, backend="native")
    assert found.choices.min() >= 0 and found.choices.max() < 9
    assert all(len(set(chosen)) == 3 for chosen in found.choices.tolist())
    with pytest.raises(ValueError, match=r"route: choices .*it holds 1 to 9 and may hold 0 to 8"):
        route(hidden, weight=normal(9, 16), bias=torch.zeros(9), top_k=2, choices=torch.tensor([[1, 9]] * 5))
    with pytest.raises(ValueError, match=r"route: weight has shape \(9, 15\).*it must be \[experts, 16\]"):
        route(hidden, weight=normal(9, 15), bias=torch.zeros(9), top_k=2)
    with pytest.raises(ValueError, match=r"route: bias has shape \(8,\).*it must be \[9\], one per expert"):
        route(hidden, weight=normal(9, 16), bias=torch.zeros(8), top_k=2)
    with pytest.raises(ValueError, match=r"route: weight has shape \(\).*it must be \[experts, 16\]"):
        route(hidden, weight=torch.tensor(1.0), bias=torch.zeros(9), top_k=2)
    with pytest.raises(ValueError, match="route: hidden .*it must be of a floating type"):
        route(hidden.nan_to_num().long(), weight=normal(9, 16), bias=torch.zeros(9), top_k=2)
    with pytest.raises(ValueError, match=r"plan_rows: sources .*it holds 0 to 7 and may hold 0 to 2"):
        plan_rows(torch.tensor([0, 7]), tokens=3)


@pytest.mark.parametrize("uses_sigmoid", (True, False), ids=("sigmoid", "softmax"))
def test_experts_left_out_weigh_nothing_where_they_are_given_or_there_are_no_others(uses_sigmoid: bool) -> None:
    """Without AVX-512 (CXX="g++ -mno-avx512f") the sigmoid of their logits, minus infinity, was no number."""
    hidden, weight, given = normal(5, 7), normal(9, 7, seed=1), torch.tensor([[2, 1], [0, 3], [4, 2], [5, 6], [7, 8]])
    for active, choices in ((torch.arange(9) != 2, given), (torch.arange(9) == 3, None)):
        rule = {"bias": torch.zeros(9), "top_k": 2, "uses_sigmoid": uses_sigmoid, "active": active, "choices": choices}
        found = route(hidden, weight=weight, **rule, backend="native")
        assert torch.equal(found.weights == 0, ~active[found.choices])
        assert_matches_reference(
            lambda x, w, b, rule=rule: route(x, weight=w, **rule, backend=b).weights,
            hidden, weight, tolerance=1e-5, reason="order of fp32 sums",
        )


def test_scores_that_a_loss_reads_have_the_gradient_of_all_experts() -> None:
    hidden, weight = normal(12, 16).requires_grad_(), normal(9, 16, seed=1)
    found = route(hidden, weight=weight, bias=torch.zeros(9), top_k=2, uses_sigmoid=False, keeps_scores=True)
    (grad,) = torch.autograd.grad(found.scores[:, 3].sum() + found.logits[:, 4].sum(), hidden)
    (expected,) = torch.autograd.grad(
        torch.softmax(hidden @ weight.T, dim=-1)[:, 3].sum() + (hidden @ weight.T)[:, 4].sum(), hidden
    )
    assert torch.allclose(grad, expected, atol=1e-6)
    with pytest.raises(KernelError, match="route: native keeps no scores of all experts"):
        route(hidden, weight=weight, bias=torch.zeros(9), top_k=2, keeps_scores=True, backend="native")


def test_a_gradient_that_is_not_contiguous_is_read_right() -> None:
    """Its contiguous copy must live until the kernel has read it."""
    for function, shape in (
        (lambda x: rms_norm(x, weight=torch.ones(64), eps=1e-5, backend="native"), (64, 64)),
        (lambda x: swiglu(x, backend="native"), (64, 128)),
        (lambda x: linear(x, weight=torch.eye(64), backend="native"), (64, 64)),
    ):
        x, upstream = normal(*shape).requires_grad_(), normal(64, 64, seed=1)
        (whole,) = torch.autograd.grad(function(x), x, upstream.T.contiguous())
        (turned,) = torch.autograd.grad(function(x), x, upstream.T)
        assert torch.equal(whole, turned)


@PRODUCTS
def test_two_threads_give_the_bits_of_one(dtype: torch.dtype, tolerance: float, reason: str) -> None:
    del tolerance, reason  # none: the bits are equal
    values = functools.partial(normal, dtype=dtype)
    offsets, few = torch.tensor([100, 100, 700]), torch.arange(1, 91) * 7  # `few`: a thread takes several
    targets = torch.arange(703) % 301
    plan = plan_attention(documents(2, 300), batch_rows=2, query_tokens=300, key_tokens=300)
    calls = (
        (lambda x, w: linear(x, weight=w, backend="native"), (values(703, 64), values(96, 64))),
        (lambda x, w: linear_cross_entropy(x, weight=w, targets=targets, backend="native"),
         (values(703, 64), values(301, 64))),
        (lambda x, w: rms_norm(x, weight=w, eps=1e-5, backend="native"), (values(703, 64), values(64))),
        (lambda x, p, u, d: experts(x, row_weights=p, gate_up=u, down=d, offsets=offsets, backend="native"),
         (values(703, 64), normal(703), values(3, 64, 64), values(3, 64, 32))),
        (lambda x, p, u, d: experts(x, row_weights=p, gate_up=u, down=d, offsets=few, backend="native"),
         (values(703, 64), normal(703), values(90, 64, 64), values(90, 64, 32))),
        (lambda x, w: route(x, weight=w, bias=torch.zeros(33), top_k=3, backend="native").weights,
         (values(703, 150), values(33, 150))),
        (lambda q, k: attention(q, key=k, value=k, plan=plan, backend="native"),
         (values(2, 300, 4, 16), values(2, 300, 2, 16))),
    )
    for function, inputs in calls:
        single = outputs_and_gradients(function, inputs=inputs)
        torch.set_num_threads(2)
        double = outputs_and_gradients(function, inputs=inputs)
        torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(single, double, strict=True))


def test_what_native_cannot_take_is_refused_by_name_and_left_by_auto() -> None:
    x, weight = normal(3, 4).double(), normal(5, 4).double()
    with pytest.raises(KernelError, match="native cannot take these tensors"):
        linear(x, weight=weight, backend="native")
    assert torch.equal(linear(x, weight=weight), x @ weight.T)


def test_without_a_compiler_pytorch_runs_and_a_warning_says_so(tmp_path: Path) -> None:
    script = (
        "import torch\nfrom ernie5_kernels.linear import linear\n"
        "x = torch.ones(2, 3)\nassert torch.equal(linear(x, weight=x), x @ x.T)\n"
        "assert torch.equal(linear(x, weight=x), x @ x.T)\n"
    )
    environment = {**os.environ, "CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the C++ kernels cannot be built") == 1
    assert "apt install g++" in done.stderr


LIBRARY_SCRIPT = (
    "from ernie5_kernels.native.library import native_library\n"
    "print(native_library() is not None)\n"
)


def test_a_library_cut_short_in_the_cache_is_built_again(tmp_path: Path) -> None:
    """Loading it would end the process. The compiler is a script that copies the library of this process."""
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nfor last; do :; done\ncp "{native_library()._name}" "$last"\n')
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": f"{compiler} -DANY", "XDG_CACHE_HOME": str(tmp_path)}
    for bytes_left in (None, 5000, 0):
        for kept in tmp_path.glob("ernie5/*.so") if bytes_left is not None else ():
            kept.write_bytes(kept.read_bytes()[:bytes_left])
        done = subprocess.run([sys.executable, "-c", LIBRARY_SCRIPT], env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


@pytest.mark.parametrize(("variable", "named"), (("CXX", "false ended with status 1"), ("XDG_CACHE_HOME", "Set XDG_")))
def test_what_keeps_the_library_from_being_built_is_said_in_one_line(
    variable: str, named: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    values = {"CXX": "false", "XDG_CACHE_HOME": str(tmp_path / "file")}
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), variable: values[variable]}
    done = subprocess.run([sys.executable, "-c", LIBRARY_SCRIPT], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "False\n")
    (line,) = (x for x in done.stderr.splitlines() if "cannot be built" in x)
    assert named in line and len(line) < 400


@pytest.mark.parametrize("multiplies", (True, False))
def test_without_the_library_slow_bf16_is_told(multiplies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "multiplies_bf16", lambda device: multiplies)
    with pytest.warns(UserWarning, match="cannot be built") as told:
        library._without("no compiler")
    assert ("60 times slower in bf16" in str(told[0].message)) is not multiplies


def test_asking_for_a_library_that_is_not_there_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERNIE5_NATIVE", "0")
    native_library.cache_clear()
    try:
        with pytest.raises(KernelError, match="switched off by ERNIE5_NATIVE=0"):
            linear(torch.ones(2, 3), weight=torch.ones(2, 3), backend="native")
        monkeypatch.delenv("ERNIE5_NATIVE")
        monkeypatch.setenv("CXX", "no-such-compiler")
        native_library.cache_clear()
        with pytest.warns(UserWarning, match="no compiler no-such-compiler"), pytest.raises(KernelError, match="apt "):
            linear(torch.ones(2, 3), weight=torch.ones(2, 3), backend="native")
    finally:
        native_library.cache_clear()


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_the_upstream_number_of_a_head_is_not_rounded(backend: str) -> None:
    """1 / 333 in bf16 is 1.1e-3 too large; over all elements their own rounding to bf16 averages out below 2e-4."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 128, generator=generator).bfloat16()
    weight = (torch.randn(500, 128, generator=generator) / 10).bfloat16()
    targets = torch.randint(0, 500, (64,), generator=generator)
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    grads = torch.autograd.grad(linear_cross_entropy(leaves[0], weight=leaves[1], targets=targets, backend=backend),
                                leaves, torch.tensor(1 / 333))
    whole = torch.autograd.grad(linear_cross_entropy(leaves[0], weight=leaves[1], targets=targets, backend=backend),
                                leaves)
    for scaled, grad in zip(grads, whole, strict=True):
        ratio = (scaled.double() * grad.double()).sum() / grad.double().square().sum() * 333
        assert abs(ratio.item() - 1) < 2e-4
