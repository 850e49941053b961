"""Which parameters of the real model Muon orthogonalises, and that fused matrices are taken apart."""

from __future__ import annotations

import copy

import pytest
import torch

from ernie5.model.backbone import build_model
from ernie5.model.config import AudioModelConfig, ModelConfig, MoEConfig, VisualModelConfig
from ernie5.optim.build import build_optimizer
from ernie5.optim.config import OptimConfig
from ernie5.optim.groups import NOT_HIDDEN, ParameterGroup, build_groups
from ernie5.optim.newton_schulz import join_stacks, orthogonalise
from ernie5.optim.spread import Peers, Spread, Team, share_matrices

CONFIG = ModelConfig(
    layers=3, width=16, query_heads=2, kv_heads=1, head_width=8, vocab_size=64, dense_layers=1, dense_width=16,
    moe=MoEConfig(num_experts=4, top_k=2, expert_width=8, shared_experts=1),
    visual=VisualModelConfig(bits=4, num_scales=3, patch_pixels=2, encoder_channels=6, vit_width=8, vit_layers=1,
                             vit_heads=1),
    audio=AudioModelConfig(levels=2, codes=16), tie_embeddings=False,
)


def test_muon_takes_the_matrices_of_layers_vit_and_mergers_and_no_table_input_or_head() -> None:
    model = build_model(CONFIG, seed=0)
    groups = {g.name: g for g in build_groups(model, weight_decay=0.1, split_matrices=True)}
    matrices, others = set(groups["matrix"].names), set(groups["decay"].names)
    block = ("attention.query.weight", "attention.output.weight", "mlp.gate_up.weight", "mlp.down.weight")
    for part in ("embedding.vision.vit.layers.0", "layers.0", "mtp.0.block"):
        assert {f"{part}.{name}" for name in block} <= matrices
    assert {"embedding.vision.image_merger.output.weight", "layers.1.moe.experts.gate_up", "mtp.0.project.weight",
            "layers.1.moe.shared.down.weight"} <= matrices
    patterns = [pattern for pattern, _ in NOT_HIDDEN]
    assert {name for name in others if any(p.split("*")[0] in name for p in patterns)} == others
    assert {"embedding.text.weight", "text_head.weight", "layers.1.moe.router.weight", "bit_head.weight",
            "embedding.vision.image_merger.slots", "embedding.vision.vit.patch.weight"} <= others


def test_gate_and_up_are_orthogonalised_apart() -> None:
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"experts": torch.nn.Module()})
    model["experts"].gate_up = torch.nn.Parameter(torch.zeros(3, 8, 6))
    groups = build_groups(model, weight_decay=0.0, split_matrices=True)
    optimizer = build_optimizer(groups, config=OptimConfig(name="muon", learning_rate=1.0, muon_momentum=0.0))
    gradient = torch.randn(3, 8, 6)
    gradient[:, 4:] *= 100.0  # as one matrix, the large half would decide where the small one goes
    model["experts"].gate_up.grad = gradient.clone()
    optimizer.step()
    halves = [orthogonalise(half, steps=5) for half in gradient.split(4, dim=1)]
    torch.testing.assert_close(model["experts"].gate_up.data, -0.2 * 6**0.5 * torch.cat(halves, dim=1).float())


SHAPES = [torch.Size(shape) for shape in ((3, 2, 4, 6), (1, 1, 2, 9), (5, 1, 3, 3), (1, 7, 8), (1, 1, 5, 4))]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7, 40])
def test_every_matrix_is_iterated_by_one_rank_and_the_shares_cost_about_as_much(num_ranks: int) -> None:
    cuts = share_matrices(SHAPES, num_ranks=num_ranks)
    costs = [shape[-2:].numel() * min(shape[-2:]) for shape in SHAPES]
    owners = []
    for cut, shape in zip(cuts, SHAPES, strict=True):
        assert cut[0] == 0 and cut[-1] == shape[:-2].numel() and cut == sorted(cut)
        owners += [rank for rank in range(num_ranks) for _ in range(cut[rank + 1] - cut[rank])]
    assert owners == sorted(owners)  # parts in order of ranks are stacks in order
    shares = [
        sum((cut[rank + 1] - cut[rank]) * cost for cut, cost in zip(cuts, costs, strict=True))
        for rank in range(num_ranks)
    ]
    assert max(shares) <= sum(shares) / num_ranks + max(costs)


@pytest.mark.parametrize("size", [2, 3, 9])
def test_peers_that_share_the_iterations_step_as_one_rank_does(size: int) -> None:
    def fresh() -> torch.nn.Module:
        torch.manual_seed(0)
        model = torch.nn.Sequential(*(torch.nn.Linear(8, 6, bias=False) for _ in range(3)))
        model.append(torch.nn.Linear(6, 6))
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        model[1].weight.grad = None  # no gradient, no step, on any rank
        return model

    def step(peers: Peers) -> torch.nn.Module:
        model = fresh()
        groups = build_groups(model, weight_decay=0.1, split_matrices=True)
        (matrix,) = (group for group in groups if group.is_matrix)
        shapes = zip(matrix.names, (parameter.shape for parameter in matrix.parameters), strict=True)
        spreads = {name: Spread(shape, Team(copies=peers)) for name, shape in shapes}
        build_optimizer(groups, config=OptimConfig(name="muon", learning_rate=0.1), spreads=spreads).step()
        return model

    parts: dict[int, tuple[torch.Tensor, list[int]]] = {}

    def keep(rank: int) -> Peers:
        def gather(part: torch.Tensor, sizes: list[int]) -> torch.Tensor:
            parts[rank] = (part, list(sizes))
            return part.new_zeros(sum(sizes))

        return Peers(rank=rank, size=size, gather=gather)

    for rank in range(size):
        step(keep(rank))
        assert parts[rank][0].numel() == parts[rank][1][rank]
    whole = torch.cat([parts[rank][0] for rank in range(size)])
    found = step(Peers(rank=size - 1, size=size, gather=lambda part, sizes: whole))
    alone = build_groups(expected := fresh(), weight_decay=0.1, split_matrices=True)
    build_optimizer(alone, config=OptimConfig(name="muon", learning_rate=0.1)).step()
    assert torch.equal(found[1].weight, fresh()[1].weight)
    for parameter, wanted in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter, wanted)


def test_a_kernel_is_one_map_from_all_it_sees_and_state_survives_loading() -> None:
    """A 3x3 kernel steps like the matrix [out, in*9] that it is, also where its gradient lies channels-last; an
    optimizer whose state was loaded goes on where the other one would (AdamW's share of the state included)."""
    torch.manual_seed(0)
    kernel, bias = torch.randn(6, 4, 3, 3), torch.randn(6)
    slopes = [(torch.randn(6, 4, 3, 3), torch.randn(6)) for _ in range(4)]

    def build(*shape: int) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
        parameters = [torch.nn.Parameter(kernel.reshape(shape).clone()), torch.nn.Parameter(bias.clone())]
        groups = [ParameterGroup(name, (name,), (p,), 0.01, name == "matrix")
                  for name, p in zip(("matrix", "plain"), parameters, strict=True)]
        return parameters, build_optimizer(groups, config=OptimConfig(name="muon", learning_rate=0.1))

    def step(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, number: int) -> None:
        weight, shift = slopes[number]
        gradient = weight.contiguous(memory_format=torch.channels_last) if parameters[0].dim() == 4 else weight
        parameters[0].grad = gradient if parameters[0].dim() == 4 else gradient.reshape(6, 36)
        parameters[1].grad = shift
        optimizer.step()

    convolution, flat = build(6, 4, 3, 3), build(6, 36)
    for number in range(2):
        step(*convolution, number)
        step(*flat, number)
    assert torch.equal(convolution[0][0].flatten(1), flat[0][0]) and not torch.equal(convolution[0][0], kernel)
    again = build(6, 4, 3, 3)
    again[1].load_state_dict(copy.deepcopy(convolution[1].state_dict()))
    for mine, theirs in zip(again[0], convolution[0], strict=True):
        mine.data.copy_(theirs.data)
    for number in (2, 3):
        step(*convolution, number)
        step(*again, number)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again[0], convolution[0], strict=True))


def test_stacks_of_one_shape_are_iterated_together_within_the_limit() -> None:
    stacks = [torch.randn(*shape) for shape in ((1, 8, 6), (3, 8, 6), (2, 4, 9), (1, 8, 6), (5, 8, 6), (1, 4, 9))]
    assert join_stacks(stacks, limit=2**24) == [[0, 1, 3, 4], [2, 5]]
    assert join_stacks(stacks, limit=200) == [[0, 1], [3], [4], [2, 5]]  # 48 + 144 fit, 240 alone does not
