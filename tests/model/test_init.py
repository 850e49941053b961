"""The initialisation table and the shard plan, over the names of a model with every part."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import pytest
import torch

from ernie5.config.load import load_config
from ernie5.model import init
from ernie5.model.backbone import UnifiedModel, build_model
from ernie5.model.config import ModelConfig, MoEConfig, VisualModelConfig
from ernie5.model.init import MarkedValues, SeededValues, std_of
from ernie5.model.shard_plan import SHARD_PLAN, placements_of
from ernie5.train.config import RootConfig

CONFIGS = Path(__file__).parent.parent.parent / "configs" / "pretrain"
ODD_SHAPES = ((1,), (15,), (16,), (17,), (33,), (3, 5), (5, 16), (7, 9), (2, 100, 3), (6, 1, 31), (9, 2, 8))


@pytest.fixture(scope="module")
def wide():
    config = ModelConfig(
        layers=5, width=96, query_heads=4, kv_heads=2, head_width=32, vocab_size=300, dense_layers=1, dense_width=64,
        tie_embeddings=False, moe=MoEConfig(num_experts=8, top_k=2, expert_width=32, shared_experts=1),
        visual=VisualModelConfig(vit_width=64, encoder_channels=64),
    )
    return config, build_model(config, seed=5)


def test_every_parameter_starts_with_the_standard_deviation_of_the_table(wide) -> None:
    config, model = wide
    for name, parameter in model.named_parameters():
        std = std_of(name, config=config)
        if std is None:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            allowance = 5 / parameter.numel() ** 0.5
            assert parameter.std().item() == pytest.approx(std, rel=allowance), name
    assert std_of("layers.0.attention.query.weight", config=config) == pytest.approx((0.3333 / 96) ** 0.5)
    assert std_of("layers.1.moe.experts.down", config=config) == pytest.approx((0.3333 / 96 / 10) ** 0.5)
    assert std_of("layers.1.attention.query_norm.weight", config=config) is None


def test_values_depend_on_seed_and_name_alone(wide) -> None:
    config, model = wide
    again, other = build_model(config, seed=5), build_model(config, seed=6)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    assert not torch.equal(model.text_weight, other.text_weight)
    layers = [model.get_parameter(f"layers.{i}.attention.query.weight") for i in (0, 1)]
    assert not torch.equal(*layers)


def test_parameter_names_are_unique_and_each_matches_exactly_one_placement(wide) -> None:
    names = [name for name, _ in wide[1].named_parameters()]
    assert len(names) == len(set(names))
    for name in names:
        assert len(placements_of(name)) == 1, (name, placements_of(name))
    unused = [p.pattern for p in SHARD_PLAN if not any(p in placements_of(name) for name in names)]
    assert not unused


def test_cut_dims_exist_and_fused_parts_split_evenly(wide) -> None:
    for name, parameter in wide[1].named_parameters():
        (placement,) = placements_of(name)
        for dim in (placement.tp_dim, placement.ep_dim):
            assert dim is None or dim < parameter.ndim, name
        if placement.tp_dim is not None:
            # Codec heads have an odd number of classes: their ranks hold rows of unlike number.
            pieces = 1 if name.startswith("audio_head.") else 2 * placement.fused
            assert parameter.shape[placement.tp_dim] % pieces == 0, name


def one_draw(key: str, *, shape: tuple[int, ...], std: float) -> torch.Tensor:
    """A stream in one call of torch: what every run so far has started from."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1
    return torch.empty(shape).normal_(std=std, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["debug", "quickstart", "small"])
def test_trained_configurations_start_from_one_draw_per_parameter(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml", schema=RootConfig).model
    for key, parameter in build_model(config, seed=1234).named_parameters():
        std = std_of(key, config=config)
        if std is not None:
            assert torch.equal(parameter, one_draw(f"1234/{key}", shape=tuple(parameter.shape), std=std)), key


@pytest.mark.parametrize("name", ["debug", "quickstart", "small", "single_gpu"])
def test_no_parameter_of_a_small_configuration_has_a_stream_per_index(name: str) -> None:
    outline = UnifiedModel.outline(load_config(CONFIGS / f"{name}.yaml", schema=RootConfig).model, seed=0)
    assert max(parameter.numel() for parameter in outline.parameters()) <= init.WHOLE_STREAM_ELEMENTS


def test_an_outline_has_names_and_shapes_and_no_parameters_in_memory(wide) -> None:
    config, model = wide
    outline = UnifiedModel.outline(config, seed=5)
    assert all(parameter.is_meta for parameter in outline.parameters())
    assert not any(buffer.is_meta or buffer.any() for buffer in outline.buffers())
    found, expected = ({k: v.shape for k, v in m.state_dict().items()} for m in (outline, model))
    assert found == expected


def test_marks_are_equal_in_copies_differ_between_parts_and_draw_nothing_large() -> None:
    """In bf16 too, in which values that are nearly equal become equal."""

    def fill(name: str, *kept: torch.Tensor | None, size: int) -> torch.Tensor:
        part = torch.full((size, 32), torch.nan)
        MarkedValues(drawn).fill(part, name=name, shape=(64, 32), kept=kept)
        return part.bfloat16()

    drawn = SeededValues(ModelConfig(), seed=5)
    first, second, third = (torch.arange(start, start + 8) for start in (0, 8, 7))
    parts = [fill("a.weight", own, None, size=8) for own in (first, second, third)]
    parts += [fill("b.weight", first, None, size=8), fill("a.weight", None, first, size=8)]
    assert all((one == other).all() == (i == j) for i, one in enumerate(parts) for j, other in enumerate(parts))
    assert torch.equal(parts[0], fill("a.weight", first.clone(), None, size=8))
    whole = fill("a.weight", None, None, size=64)
    assert whole.view(-1)[:256].abs().eq(1).all() and not whole.view(-1)[256:].any()
    small, expected = torch.empty(7, 32), torch.empty(7, 32)
    MarkedValues(drawn).fill(small, name="a.weight", shape=(64, 32), kept=(first[:7], None))
    drawn.fill(expected, name="a.weight", shape=(64, 32), kept=(first[:7], None))
    assert torch.equal(small, expected)


@pytest.mark.parametrize("piece_elements", [1, 40, 100])
@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_a_part_drawn_in_pieces_is_that_of_one_draw(
    wide, shape: tuple[int, ...], piece_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(init, "PIECE_ELEMENTS", piece_elements)
    config, name = wide[0], "text_head.weight"
    expected = one_draw(f"5/{name}", shape=shape, std=std_of(name, config=config))
    kept = tuple(torch.arange(n)[dim % 2 :: 2] if n > 2 else None for dim, n in enumerate(shape))
    for dim, indices in enumerate(kept):
        expected = expected if indices is None else expected.index_select(dim, indices)
    part = torch.full(expected.shape, torch.nan)
    SeededValues(config, seed=5).fill(part, name=name, shape=shape, kept=kept)
    assert torch.equal(part, expected)


def test_a_huge_parameter_has_a_stream_per_index_and_a_rank_draws_its_own(wide, monkeypatch) -> None:
    config, name, shape = wide[0], "layers.1.moe.experts.down", (6, 5, 33)
    monkeypatch.setattr(init, "WHOLE_STREAM_ELEMENTS", math.prod(shape) - 1)
    drawn = []
    plain = init._stream
    monkeypatch.setattr(init, "_stream", lambda key, *, index: drawn.append((key, index)) or plain(key, index=index))
    part = torch.full((2, 5, 3), torch.nan)
    kept = (torch.tensor([1, 4]), None, torch.tensor([0, 1, 30]))
    SeededValues(config, seed=5).fill(part, name=name, shape=shape, kept=kept)
    std = std_of(name, config=config)
    for values, index in zip(part, (1, 4), strict=True):
        expected = torch.empty(5, 33).normal_(std=std, generator=plain(f"5/{name}", index=index))
        assert torch.equal(values, expected[:, [0, 1, 30]])
    assert drawn == [(f"5/{name}", 1), (f"5/{name}", 4)]


def test_no_two_rows_of_a_huge_parameter_start_equal(wide) -> None:
    """torch takes 32 bits of a seed, in which hashes of (seed, name, index) meet: these two pairs of rows did."""
    part = torch.full((4, 200), torch.nan)
    kept = (torch.tensor([9794, 36761, 153636, 154592]), None)
    SeededValues(wide[0], seed=0).fill(part, name="embedding.text.weight", shape=(200_000, 200), kept=kept)
    assert len({tuple(row) for row in part.tolist()}) == 4
    seeds = [init._stream("0/embedding.text.weight", index=index).initial_seed() for index in range(200_000)]
    assert len(set(seeds)) == len(seeds) and max(seeds) < 2**32
