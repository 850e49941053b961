"""Router, dispatch and balance of the mixture-of-experts layer, against plain loops."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ernie5.errors import ConfigError
from ernie5.model.config import BalanceConfig, MoEConfig
from ernie5.model.interfaces import Routing
from ernie5.model.moe.balance import measure_routing, orthogonality_loss, orthogonality_step, update_balance
from ernie5.model.moe.dispatch import LocalDispatcher
from ernie5.model.moe.experts import RoutedExperts
from ernie5.model.moe.router import Router, check_subnetwork
from ernie5.records import SubNetwork
from ernie5_kernels.testing import poisoned_memory

MOE = MoEConfig(num_experts=6, top_k=2, expert_width=5)


def make_router(config: MoEConfig = MOE, *, seed: int = 0) -> Router:
    router = Router(config, width=8)
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(seed))
    return router


def hidden_states(tokens: int, *, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(tokens, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_the_bias_moves_the_choice_but_neither_weight_nor_gradient(score: str) -> None:
    router = make_router(dataclasses.replace(MOE, score=score)).double()
    hidden = hidden_states(40)
    plain = router(hidden, top_k=2, active=None)
    router.balance_bias[3] += 100.0
    biased = router(hidden, top_k=2, active=None)
    assert (biased.choices == 3).any(1).all()
    assert not (plain.choices == 3).any(1).all()
    chosen = biased.scores.gather(1, biased.choices)
    assert torch.allclose(biased.weights, chosen / chosen.sum(1, keepdim=True))
    assert not biased.weights.requires_grad or router.balance_bias.grad is None
    assert torch.equal(plain.scores, biased.scores)


def test_router_arithmetic_is_fp32_and_the_bias_stays_fp32_under_a_bf16_cast() -> None:
    router = make_router().bfloat16()
    router.balance_bias += 1e-4
    assert router.balance_bias.dtype == torch.float32
    routing = router(hidden_states(5, dtype=torch.bfloat16), top_k=2, active=None)
    assert routing.weights.dtype == torch.float32
    keeping = make_router(dataclasses.replace(MOE, balance=BalanceConfig(z_loss=True))).bfloat16()
    kept = keeping(hidden_states(5, dtype=torch.bfloat16), top_k=2, active=None)
    assert kept.weights.dtype == kept.scores.dtype == kept.logits.dtype == torch.float32
    assert torch.allclose(kept.weights, routing.weights, atol=1e-6) and torch.equal(kept.choices, routing.choices)
    assert router.bfloat16().balance_bias[0].item() == pytest.approx(1e-4, rel=1e-6)


def test_inactive_experts_are_never_chosen_even_with_the_largest_bias() -> None:
    router = make_router()
    router.balance_bias[0] += 100.0
    active = torch.tensor([False, True, False, True, True, False])
    routing = router(hidden_states(50, dtype=torch.float32), top_k=3, active=active)
    assert set(routing.choices.unique().tolist()) == {1, 3, 4}
    assert routing.weights.isfinite().all()


GROUPED = dataclasses.replace(MOE, num_experts=12, top_k=4, num_groups=4, top_groups=2)


def choose_by_hand(preference: list[float], *, config: MoEConfig) -> set[int]:
    """Node-limited routing of one token as arXiv:2412.19437, section 2.1.2, words it."""
    size, counted = config.num_experts // config.num_groups, config.top_k // config.top_groups
    groups = [range(first, first + size) for first in range(0, config.num_experts, size)]
    best = sorted(groups, key=lambda group: -sum(sorted((preference[e] for e in group), reverse=True)[:counted]))
    allowed = [expert for group in best[: config.top_groups] for expert in group]
    return set(sorted(allowed, key=lambda expert: -preference[expert])[: config.top_k])


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_node_limited_routing_equals_the_paper_token_by_token(score: str) -> None:
    router = make_router(dataclasses.replace(GROUPED, score=score)).double()
    router.balance_bias += torch.linspace(-1.2, 0.3, 12)  # sums of groups are negative too
    routing = router(hidden_states(200), top_k=4, active=None)
    for choices, scores in zip(routing.choices, routing.scores, strict=True):
        expected = choose_by_hand((scores + router.balance_bias).tolist(), config=GROUPED)
        assert set(choices.tolist()) == expected
    free = make_router(dataclasses.replace(GROUPED, score=score, num_groups=1, top_groups=1)).double()
    free.balance_bias += router.balance_bias
    unlimited = free(hidden_states(200), top_k=4, active=None)
    assert (unlimited.choices.sort(1).values != routing.choices.sort(1).values).any()
    chosen = routing.scores.gather(1, routing.choices)
    assert torch.allclose(routing.weights, chosen / chosen.sum(1, keepdim=True))


def test_groups_without_enough_active_experts_are_not_chosen_and_too_few_groups_are_refused() -> None:
    router = make_router(GROUPED).double()
    experts = (0, 3, 4, 6, 7, 8, 11)  # group 0 and group 3 have one active expert each, two are counted
    active = torch.zeros(12, dtype=torch.bool)
    active[list(experts)] = True
    routing = router(hidden_states(100), top_k=4, active=active)
    assert set(routing.choices.unique().tolist()) <= {3, 4, 6, 7, 8}
    check_subnetwork(SubNetwork(experts=experts), config=GROUPED)
    with pytest.raises(ConfigError, match="1 groups of at least 2 active experts, and model.moe.top_groups = 2 of 4"):
        check_subnetwork(SubNetwork(experts=(0, 3, 4, 6, 9)), config=GROUPED)


@pytest.mark.parametrize(
    "groups, top, message",
    [(5, 1, "num_groups.*5 does not divide num_experts = 12"), (4, 5, "top_groups.*5 exceeds num_groups = 4"),
     (4, 3, "top_groups.*3 does not divide top_k = 4"), (4, 1, "top_groups.*1 groups hold 3 experts, fewer than top_k"),
     (4, 0, "top_groups")],
)
def test_groups_that_cannot_be_are_refused(groups: int, top: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoEConfig(num_experts=12, top_k=4, num_groups=groups, top_groups=top)


def plain_moe(hidden: torch.Tensor, *, routing: Routing, experts: RoutedExperts) -> torch.Tensor:
    """Token by token, choice by choice."""
    out = []
    for n in range(hidden.shape[0]):
        total = torch.zeros_like(hidden[n])
        for expert, weight in zip(routing.choices[n].tolist(), routing.weights[n], strict=True):
            gate, up = (experts.gate_up[expert] @ hidden[n]).chunk(2)
            total = total + weight * (experts.down[expert] @ (torch.nn.functional.silu(gate) * up))
        out.append(total)
    return torch.stack(out)


@pytest.mark.parametrize("tokens", [1, 2, 63])
@pytest.mark.parametrize("favourite", [None, 4])
def test_the_layer_matches_a_loop_over_tokens_with_every_gradient(tokens: int, favourite: int | None) -> None:
    router = make_router().double()
    if favourite is not None:
        router.balance_bias[favourite] += 100.0
        router.balance_bias[0] += 50.0
    experts = RoutedExperts(MOE, width=8, backend="auto").double()
    for seed, parameter in enumerate(experts.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))
    leaf = hidden_states(tokens).requires_grad_()
    parameters = [leaf, router.weight, *experts.parameters()]
    results = []
    for use_loop in (True, False):
        routing = router(leaf, top_k=2, active=None)
        if use_loop:
            out = plain_moe(leaf, routing=routing, experts=experts)
        else:
            with poisoned_memory():
                dispatcher = LocalDispatcher()
                parcels = dispatcher.receive(dispatcher.send(leaf, routing=routing, num_experts=6))
                outputs = experts(parcels.rows, arranged=dispatcher.arrange(parcels))
                out = dispatcher.combine(outputs, parcels=parcels)
        gradients = torch.autograd.grad(out.sin().sum(), parameters)
        results.append([out, *gradients])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, atol=1e-11, rtol=1e-11)


def test_padding_counts_in_no_load_and_no_loss() -> None:
    config = BalanceConfig(switch_loss=True, sequence_loss=True, z_loss=True)
    router, hidden = make_router().double(), hidden_states(12)
    kinds = torch.tensor([[1, 2, 3, 0, 0, 0], [4, 5, 6, 6, 1, 1]])
    full = router(hidden, top_k=2, active=None)
    changed = hidden.clone()
    changed[3:6] = 7.0
    other = router(changed, top_k=2, active=None)
    first, second = (measure_routing(r, kinds=kinds, config=config) for r in (full, other))
    assert first.group_loads.sum() == 9 * 2
    for field in dataclasses.fields(first):
        assert torch.allclose(getattr(first, field.name), getattr(second, field.name)), field.name
    assert first.group_loads[5].sum() == 4


def test_the_switch_loss_is_one_when_even_and_grows_when_all_tokens_choose_alike() -> None:
    config = BalanceConfig(switch_loss=True, sequence_loss=True)
    kinds = torch.ones(1, 6, dtype=torch.int64)
    choices = torch.tensor([[e, (e + 1) % 6] for e in range(6)])
    even = Routing(choices, torch.ones(6, 2), 6, torch.full((6, 6), 0.5), torch.zeros(6, 6))
    assert measure_routing(even, kinds=kinds, config=config).switch_loss.item() == pytest.approx(1.0)
    peaked = torch.full((6, 6), 0.01).index_fill(1, torch.tensor([0, 1]), 1.0)
    alike = Routing(torch.tensor([[0, 1]] * 6), torch.ones(6, 2), 6, peaked, torch.zeros(6, 6))
    stats = measure_routing(alike, kinds=kinds, config=config)
    assert stats.switch_loss.item() == pytest.approx(stats.sequence_loss.item())
    assert stats.switch_loss.item() > 2.5


def test_the_update_moves_each_bias_by_the_sign_of_mean_minus_load() -> None:
    router = make_router()
    loads = torch.tensor([[10.0, 0.0, 4.0, 4.0, 4.0, 2.0]])
    update_balance([router], loads=loads, speed=0.5)
    assert router.balance_bias.tolist() == [-0.5, 0.5, 0.0, 0.0, 0.0, 0.5]


def test_the_update_covers_active_experts_alone_and_leaves_layers_that_did_not_run() -> None:
    routers = [make_router(), make_router()]
    loads = torch.tensor([[8.0, 0.0, 2.0, 0.0, 0.0, 2.0], [0.0] * 6])
    update_balance(routers, loads=loads, speed=1.0, subnetwork=SubNetwork(experts=(0, 2, 5)))
    assert routers[0].balance_bias.tolist() == [-1.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    assert routers[1].balance_bias.tolist() == [0.0] * 6


def test_repeated_updates_even_out_a_skewed_router() -> None:
    router = make_router()
    with torch.no_grad():
        router.weight[0] += 3.0 * hidden_states(1, dtype=torch.float32)[0].sign()
    hidden, kinds = hidden_states(600, dtype=torch.float32) + 0.5, torch.ones(1, 600, dtype=torch.int64)
    ratios = []
    for _ in range(300):
        routing = router(hidden, top_k=2, active=None)
        loads = measure_routing(routing, kinds=kinds, config=BalanceConfig()).group_loads.sum(0)
        ratios.append((loads.max() / loads.mean()).item())
        update_balance([router], loads=loads.unsqueeze(0), speed=0.01)
    assert ratios[0] > 1.4
    assert ratios[-1] < 1.2


def test_the_orthogonality_step_follows_the_gradient_of_its_loss() -> None:
    router = make_router().double()
    (gradient,) = torch.autograd.grad(orthogonality_loss(router), router.weight)
    before, loss = router.weight.detach().clone(), orthogonality_loss(router)
    orthogonality_step(router, speed=0.1)
    assert torch.allclose(before - router.weight, 0.1 * gradient, atol=1e-12)
    assert orthogonality_loss(router) < loss
