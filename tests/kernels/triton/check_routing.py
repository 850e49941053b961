"""Routing and expert order in Triton: ties, inactive experts, NaN, one expert for all, no tokens at all."""

from __future__ import annotations

import pytest
import torch

from ernie5_kernels.moe_permute import Permutation, permute, permute_cast, plan_permutation, unpermute
from ernie5_kernels.moe_permute.kernel import permute_triton, plan_triton, unpermute_triton
from ernie5_kernels.route import route
from ernie5_kernels.router_topk import router_topk
from ernie5_kernels.router_topk.kernel import router_topk_triton
from ernie5_kernels.testing import assert_backends_agree, assert_close, kernel_device, poisoned_memory, random_tensor
from ernie5_kernels.token_rows import sum_places

FP32 = {"tolerance": 3e-6, "reason": "fp32, another order of sums"}
ODD = (1, 7, 129)


def active_of(experts: int) -> torch.Tensor:
    return torch.arange(experts, device=kernel_device()) % 3 != 0


@pytest.mark.parametrize("tokens", (0, *ODD))
@pytest.mark.parametrize(("uses_sigmoid", "restricted"), [(True, False), (True, True), (False, False), (False, True)])
def test_routing_matches_the_reference(tokens: int, uses_sigmoid: bool, restricted: bool) -> None:
    logits, bias = random_tensor(tokens, 11), random_tensor(11, seed=1) / 4
    active = active_of(11) if restricted else None
    with poisoned_memory():
        ours, truth = (
            router_topk(logits, bias=bias, top_k=3, uses_sigmoid=uses_sigmoid, scale=1.5, active=active, backend=b)
            for b in ("triton", "reference")
        )
    assert torch.equal(ours.choices, truth.choices) and torch.equal(ours.counts, truth.counts)
    assert_close(ours.weights, expected=truth.weights, **FP32)
    assert_close(ours.scores, expected=truth.scores, **FP32)


@pytest.mark.parametrize("uses_sigmoid", [True, False])
def test_gradients_flow_from_weights_and_scores(uses_sigmoid: bool) -> None:
    upstream = random_tensor(20, 3, seed=5)

    def routed(logits: torch.Tensor, backend: str) -> torch.Tensor:
        choice = router_topk(logits, bias=random_tensor(11, seed=1), top_k=3, uses_sigmoid=uses_sigmoid, scale=2.0,
                             active=active_of(11), backend=backend)
        return (choice.weights * upstream).sum(-1) + choice.scores.square().sum(-1)

    assert_backends_agree(routed, inputs=(random_tensor(20, 11),), **FP32)

    def weighed(logits: torch.Tensor, backend: str) -> torch.Tensor:
        return router_topk(logits, bias=random_tensor(11, seed=1), top_k=3, uses_sigmoid=uses_sigmoid,
                           backend=backend).weights

    assert_backends_agree(weighed, inputs=(random_tensor(20, 11),), **FP32)


def test_ties_go_to_the_lower_expert_and_nothing_is_chosen_twice() -> None:
    bias = torch.zeros(9, device=kernel_device())
    choice = router_topk(torch.zeros(4, 9, device=kernel_device()), bias=bias, top_k=4, backend="triton")
    assert choice.choices.tolist() == [[0, 1, 2, 3]] * 4 and choice.counts.tolist() == [4] * 4 + [0] * 5
    few = torch.arange(9, device=kernel_device()) < 2  # fewer active experts than choices
    choice = router_topk(random_tensor(3, 9), bias=bias, top_k=4, active=few, backend="triton")
    assert all(len(set(row)) == 4 for row in choice.choices.tolist())
    assert choice.weights[:, 2:].abs().max() == 0


def test_a_score_of_zero_everywhere_gives_finite_weights_and_gradients() -> None:
    logits = torch.full((2, 5), -200.0, device=kernel_device()).requires_grad_()
    choice = router_topk(logits, bias=torch.zeros(5, device=kernel_device()), top_k=2, backend="triton")
    choice.weights.sum().backward()
    assert choice.weights.isfinite().all() and logits.grad.isfinite().all()


def test_nan_logits_stay_inside_the_arrays() -> None:
    logits = random_tensor(3, 5)
    logits[1] = float("nan")
    choice = router_topk(logits, bias=torch.zeros(5, device=kernel_device()), top_k=2, backend="triton")
    assert 0 <= int(choice.choices.min()) and int(choice.choices.max()) < 5


def test_routing_refuses_by_name() -> None:
    logits, bias = random_tensor(3, 5), random_tensor(5)
    with pytest.raises(ValueError, match="router_topk: bias has shape"):
        router_topk(logits, bias=bias[:4], top_k=2)
    with pytest.raises(ValueError, match="top_k is 6"):
        router_topk(logits, bias=bias, top_k=6)
    with pytest.raises(ValueError, match="logits .* float32"):
        router_topk(logits.bfloat16(), bias=bias, top_k=2, backend="triton")
    with pytest.raises(ValueError, match="active has shape .* of bool"):
        router_topk(logits, bias=bias, top_k=2, active=bias)


def test_fp64_is_routed_by_pytorch_and_not_summed_in_fp32() -> None:
    """auto leaves it to PyTorch, as the other operators do; by name Triton says no."""
    hidden, weight = (random_tensor(*shape, seed=n, dtype=torch.float64) for n, shape in enumerate(((5, 8), (7, 8))))
    made = route(hidden, weight=weight, bias=torch.zeros(7, device=hidden.device), top_k=2)
    assert made.weights.dtype == torch.float64
    places = torch.arange(4, device=hidden.device).view(2, 2)
    with pytest.raises(ValueError, match="sum_places: rows .* dtype torch.float64.*takes float32"):
        sum_places(hidden[:4], places=places, backend="triton")
    assert sum_places(hidden[:4], places=places).dtype == torch.float64


def choices_of(tokens: int, experts: int, top_k: int) -> torch.Tensor:
    return torch.stack([torch.randperm(experts, generator=torch.Generator().manual_seed(n))[:top_k]
                        for n in range(tokens)]).to(kernel_device())


@pytest.mark.parametrize("tokens", ODD)
def test_expert_order_equals_a_stable_sort(tokens: int) -> None:
    for choices in (choices_of(tokens, 7, 3), torch.full((tokens, 3), 5, device=kernel_device())):
        with poisoned_memory():
            ours, truth = (plan_permutation(choices, num_experts=7, backend=b) for b in ("triton", "reference"))
        assert torch.equal(ours.offsets, truth.offsets)
        assert torch.equal(ours.sources, truth.sources) and torch.equal(ours.places, truth.places)


def test_no_tokens_make_an_empty_order() -> None:
    plan = plan_permutation(torch.empty(0, 3, dtype=torch.int64, device=kernel_device()), num_experts=4)
    assert plan.offsets.tolist() == [0] * 4
    assert unpermute(random_tensor(0, 5), permutation=plan).shape == (0, 5)


@pytest.mark.parametrize("width", (1, 33, 1100))
def test_rows_travel_there_and_back_with_gradients(width: int) -> None:
    plan = plan_permutation(choices_of(6, 7, 3), num_experts=7, backend="reference")
    assert_backends_agree(lambda x, b: permute(x, permutation=plan, backend=b), inputs=(random_tensor(6, width),),
                          **FP32)
    rows, weights = random_tensor(18, width), random_tensor(6, 3, seed=1)
    assert_backends_agree(lambda r, b: unpermute(r, permutation=plan, backend=b), inputs=(rows,), **FP32)
    assert_backends_agree(lambda r, w, b: unpermute(r, permutation=plan, weights=w, backend=b), inputs=(rows, weights),
                          tolerance=1e-5, reason="fp32 sums over the width in another order")


def test_places_in_a_strided_view_are_read_right() -> None:
    choices = torch.arange(14, device=kernel_device()).view(7, 2) % 5
    plan = plan_permutation(choices, num_experts=5, backend="triton")
    turned = Permutation(plan.offsets, plan.sources, plan.places.T.contiguous().T)
    assert not turned.places.is_contiguous()
    x, rows, weights = random_tensor(7, 9), random_tensor(14, 9), random_tensor(7, 2, seed=1)
    assert_backends_agree(lambda x, b: permute(x, permutation=turned, backend=b), inputs=(x,), **FP32)
    assert_backends_agree(
        lambda r, w, b: unpermute(r, permutation=turned, weights=w, backend=b), inputs=(rows, weights), **FP32
    )
    one, other = (permute_cast(x, permutation=order, backend="triton") for order in (plan, turned))
    assert torch.equal(one.values.float(), other.values.float()) and torch.equal(one.scales, other.scales)


def test_spreading_while_casting_equals_casting_the_spread_rows() -> None:
    plan, x = plan_permutation(choices_of(6, 7, 3), num_experts=7), random_tensor(6, 130)
    ours, truth = (permute_cast(x, permutation=plan, backend=b) for b in ("triton", "reference"))
    assert_close(ours.widened(), expected=truth.widened(), tolerance=2.0 ** -4, reason="a tie may round either way")


def test_order_refuses_by_name_and_the_operators_pass_opcheck() -> None:
    choices = choices_of(4, 5, 2)
    plan = plan_permutation(choices, num_experts=5)
    with pytest.raises(ValueError, match=r"rows has shape \(7, 3\).*\[8, width\]"):
        unpermute(random_tensor(7, 3), permutation=plan)
    with pytest.raises(ValueError, match="weights has shape"):
        unpermute(random_tensor(8, 3), permutation=plan, weights=random_tensor(8))
    with pytest.raises(ValueError, match="choices has shape .* int64"):
        plan_permutation(choices.int(), num_experts=5)
    torch.library.opcheck(plan_triton, (choices, 5))
    torch.library.opcheck(permute_triton, (random_tensor(4, 3).requires_grad_(), plan.places))
    rows, weights = random_tensor(8, 3).requires_grad_(), random_tensor(4, 2).requires_grad_()
    torch.library.opcheck(unpermute_triton, (rows, plan.places, weights))
    logits = random_tensor(4, 5).requires_grad_()
    torch.library.opcheck(router_topk_triton, (logits, random_tensor(5), None, 2, True, 1.0))
