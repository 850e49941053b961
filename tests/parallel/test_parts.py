"""A rank's part of a model made from its outline: the values of a cut whole model, and never a whole model's memory."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ernie5.model import init
from ernie5.model.backbone import UnifiedModel, build_model
from ernie5.model.config import AudioModelConfig, ModelConfig, MoEConfig, VisualModelConfig
from ernie5.parallel.apply import Layout, make_parts, shapes_of
from ernie5.parallel.config import ParallelConfig
from ernie5.parallel.held import GridPlace, planned_layout
from ernie5.parallel.stages import plan_stages

MODEL = ModelConfig(
    layers=4, width=48, query_heads=4, kv_heads=2, head_width=16, vocab_size=307, dense_layers=1, dense_width=40,
    tie_embeddings=False, moe=MoEConfig(num_experts=6, top_k=2, expert_width=12, shared_experts=1),
    visual=VisualModelConfig(bits=5, patch_pixels=2, encoder_channels=6, vit_width=16, vit_layers=1, vit_heads=2),
    audio=AudioModelConfig(levels=2, codes=16),
)
TIED = dataclasses.replace(MODEL, tie_embeddings=True)
LARGE = ModelConfig(
    layers=4, width=256, query_heads=4, kv_heads=2, head_width=64, vocab_size=4096, modalities=("text",),
    tie_embeddings=False, moe=MoEConfig(num_experts=16, top_k=2, expert_width=256),
)
LAYOUTS = (
    (1, {}), (2, {}), (2, {"cp": 2}), (2, {"ep": 2}), (3, {"ep": 3}), (2, {"etp": 2}), (4, {"ep": 2, "etp": 2}),
    (2, {"tp": 2}), (4, {"tp": 4}), (2, {"pp": 2}), (2, {"pp": 2, "vpp": 2}), (3, {"pp": 3}),
    (8, {"pp": 2, "tp": 2, "ep": 2, "etp": 2}), (8, {"tp": 4, "ep": 2, "etp": 4}),
)
MIB = 1 << 20


def plan(model: UnifiedModel, *, ranks: int, rank: int, degrees: dict[str, int]) -> Layout:
    parallel = ParallelConfig(**degrees)
    place = GridPlace(parallel.derive_dims(ranks, kv_heads=model.config.kv_heads), rank=rank)
    stages = plan_stages(model.config, pp=parallel.pp, vpp=parallel.vpp)
    return planned_layout(shapes_of(model), place=place, stages=stages)


def part_of(config: ModelConfig, *, ranks: int, rank: int, degrees: dict[str, int]) -> UnifiedModel:
    model = UnifiedModel.outline(config, seed=7)
    layout = plan(model, ranks=ranks, rank=rank, degrees=degrees)
    layout.leave_out(model)
    make_parts(model, layout=layout)
    return model


def check_parts(config: ModelConfig, *, ranks: int, degrees: dict[str, int]) -> None:
    whole = build_model(config, seed=7)
    held = set()
    for rank in range(ranks):
        layout = plan(whole, ranks=ranks, rank=rank, degrees=degrees)
        parts = dict(part_of(config, ranks=ranks, rank=rank, degrees=degrees).named_parameters())
        assert set(parts) == set(filter(layout.is_here, layout.shards))
        for name, part in parts.items():
            assert part.requires_grad and part.is_contiguous() and part.device.type == "cpu"
            assert torch.equal(part, layout.cut(whole.get_parameter(name).data, name=name)), (rank, name)
        held |= set(parts)
    assert held == set(layout.shards)


@pytest.mark.parametrize("ranks,degrees", LAYOUTS, ids=str)
def test_every_rank_has_what_a_cut_of_the_whole_model_gives(ranks: int, degrees: dict[str, int]) -> None:
    check_parts(MODEL, ranks=ranks, degrees=degrees)


@pytest.mark.parametrize("degrees", [{"pp": 2}, {"tp": 2, "ep": 2}], ids=str)
def test_every_rank_has_it_too_with_a_tied_head(degrees: dict[str, int]) -> None:
    check_parts(TIED, ranks=2, degrees=degrees)


@pytest.mark.parametrize("ranks,degrees", LAYOUTS, ids=str)
def test_and_so_it_is_with_streams_per_index_and_many_pieces(
    ranks: int, degrees: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(init, "WHOLE_STREAM_ELEMENTS", 500)
    monkeypatch.setattr(init, "PIECE_ELEMENTS", 100)
    check_parts(MODEL, ranks=ranks, degrees=degrees)


def test_a_model_that_has_values_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, own = build_model(MODEL, seed=7), build_model(MODEL, seed=8)
    layout = plan(own, ranks=4, rank=3, degrees={"tp": 2, "ep": 2})
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            parameter.copy_(whole.get_parameter(name))
    make_parts(own, layout=layout)
    for name, part in own.named_parameters():
        assert torch.equal(part, layout.cut(whole.get_parameter(name).data, name=name))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of CPU storages that are alive after every operation; `peak` is the most so far."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._alive = 0, WeakIdKeyDictionary(ref_type=weakref.ref)

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                storage = value.untyped_storage()
                self._alive[storage] = storage.nbytes()
        self.peak = max(self.peak, sum(self._alive.values()))
        return out


def peak_bytes(make: Callable[[], UnifiedModel]) -> tuple[int, int]:
    """The most bytes of CPU tensors alive at once while `make` runs, and those of the parameters that it returns."""
    with LiveBytes() as counted:
        made = make()
    return counted.peak, sum(parameter.numel() * parameter.element_size() for parameter in made.parameters())


@pytest.mark.parametrize(
    "ranks,degrees", [(2, {"ep": 2}), (2, {"tp": 2}), (2, {"pp": 2}), (8, {"pp": 2, "tp": 2, "ep": 2, "etp": 2})],
    ids=str,
)
def test_building_a_part_takes_the_part_and_a_bounded_piece(
    ranks: int, degrees: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(init, "PIECE_ELEMENTS", MIB // 4)
    total, whole = peak_bytes(lambda: build_model(LARGE, seed=7))
    assert whole > 60 * MIB and total >= whole  # the count sees a whole model where there is one
    peak, held = peak_bytes(lambda: part_of(LARGE, ranks=ranks, rank=1, degrees=degrees))
    assert held + 4 * MIB < whole
    # a piece is at most 1 MiB here, two copies of it are made to pick rows and columns, and indices take the rest
    assert held <= peak < held + 4 * MIB
