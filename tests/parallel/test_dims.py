"""The rank grids: every axis partitions all ranks, both grids hold the same stages, sizes multiply out."""

from __future__ import annotations

import itertools
import math

import pytest

from ernie5.parallel.dims import AXES, GridDims, nearest_divisors

GRIDS = [
    GridDims(dp=dp, cp=cp, tp=tp, pp=pp, ep=ep, etp=etp)
    for dp, cp, tp, pp, ep, etp in itertools.product((1, 2, 3, 4), (1, 2), (1, 2), (1, 2), (1, 2, 4), (1, 2))
    if dp * cp * tp % (ep * etp) == 0
]


GRIDS += [GridDims(dp=dp, tp=tp, pp=pp, key_copies=copies) for dp, pp, tp, copies in ((2, 2, 4, 2), (1, 1, 6, 3))]


@pytest.mark.parametrize("dims", GRIDS, ids=lambda dims: dims.describe())
def test_every_axis_partitions_all_ranks(dims: GridDims) -> None:
    for axis in AXES:
        groups = dims.groups(axis)
        assert sorted(itertools.chain(*groups)) == list(range(dims.world_size)), axis
        assert {len(group) for group in groups} == {dims.size(axis)}, axis
        for rank in range(dims.world_size):
            assert dims.group(rank, axis=axis)[dims.coordinate(rank, axis=axis)] == rank


@pytest.mark.parametrize("dims", GRIDS, ids=lambda dims: dims.describe())
def test_both_grids_factor_the_same_stages(dims: GridDims) -> None:
    assert dims.edp * dims.ep * dims.etp == dims.dp * dims.cp * dims.tp
    for stage in dims.groups("stage"):
        for axis in ("edp", "ep", "etp", "block", "dp", "cp", "tp"):
            inside = [group for group in dims.groups(axis) if set(group) & set(stage)]
            assert sorted(itertools.chain(*inside)) == list(stage), axis
    assert dims.world_size == math.prod((dims.pp, dims.edp, dims.ep, dims.etp))


def test_experts_of_one_block_are_on_neighbouring_ranks() -> None:
    dims = GridDims(dp=8, ep=4)
    assert dims.groups("ep") == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert dims.groups("edp") == ((0, 4), (1, 5), (2, 6), (3, 7))


def test_attention_and_expert_tensor_parallelism_are_chosen_apart() -> None:
    dims = GridDims(dp=2, tp=2, ep=4)
    assert dims.groups("tp") == ((0, 1), (2, 3)) and dims.groups("ep") == ((0, 1, 2, 3),)
    dims = GridDims(dp=4, ep=2, etp=2)
    assert dims.groups("etp") == ((0, 1), (2, 3)) and dims.groups("ep") == ((0, 2), (1, 3))


def test_a_grid_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="ep x etp = 2 x 2 does not divide dp x cp x tp = 6"):
        GridDims(dp=6, ep=2, etp=2)


def test_nearest_divisors() -> None:
    assert nearest_divisors(256, wanted=48) == (32, 64)
    assert nearest_divisors(12, wanted=4) == (4,)
    assert nearest_divisors(6, wanted=9) == (6,)


def test_a_grid_of_two_thousand_ranks_takes_milliseconds() -> None:
    dims = GridDims(dp=64, tp=4, pp=8, ep=32)
    assert dims.world_size == 2048 and dims.coordinate(2047, axis="pp") == 7


def test_neighbouring_ranks_hold_the_same_key_heads() -> None:
    dims = GridDims(tp=4, dp=2, key_copies=2)
    assert dims.groups("key_copies") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert [dims.coordinate(rank, axis="keys") for rank in range(4)] == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="2 copies of every key head do not divide tp = 3"):
        GridDims(tp=3, key_copies=2)
