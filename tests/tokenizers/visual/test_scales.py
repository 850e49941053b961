import pytest
import torch

from ernie5.errors import ConfigError, TokenizerError
from ernie5.tokenizers.config import VisualTokenizerConfig
from ernie5.tokenizers.visual.scales import DEFAULT_SIZES, num_cells, resize_to, scale_schedule


def test_the_default_schedule_of_an_8x8_grid_has_130_cells():
    schedule = scale_schedule(8, 8)
    assert schedule == ((1, 1), (2, 2), (3, 3), (4, 4), (6, 6), (8, 8))
    assert num_cells(schedule) == 130


@pytest.mark.parametrize(("side", "sides"), [(1, (1,)), (2, (1, 2)), (4, (1, 2, 3, 4)), (5, (1, 2, 3, 4, 5)),
                                             (6, (1, 2, 3, 4, 6)), (16, (1, 4, 6, 8, 12, 16))])
def test_square_grids_start_with_one_cell_and_end_with_themselves(side, sides):
    assert scale_schedule(side, side) == tuple((s, s) for s in sides)


@pytest.mark.parametrize("grid", [(4, 8), (8, 3), (1, 8), (7, 5), (9, 13)])
def test_oblong_grids_ascend_from_one_cell_to_the_whole_grid(grid):
    schedule = scale_schedule(*grid)
    assert schedule[0] == (1, 1) and schedule[-1] == grid
    for before, after in zip(schedule, schedule[1:]):
        assert before != after and before[0] <= after[0] and before[1] <= after[1]


@pytest.mark.parametrize(("height", "sizes"), [(0, (1, 2)), (-3, (1, 2)), (4, (2, 4)), (4, ()), (4, (1, 4, 2))])
def test_impossible_grids_and_sizes_are_refused(height, sizes):
    with pytest.raises(TokenizerError):
        scale_schedule(height, 4, sizes=sizes)


@pytest.mark.parametrize("grid", [(1, 1), (3, 3), (4, 6), (8, 8), (11, 2)])
def test_resizing_keeps_constants_and_shapes_at_any_ratio(grid):
    latents = torch.full((2, 5, 6, 7), 1.5)
    resized = resize_to(latents, grid)
    assert resized.shape == (2, 5, *grid)
    torch.testing.assert_close(resized, torch.full_like(resized, 1.5))


def test_shrinking_averages_areas_and_keeps_the_mean():
    latents = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(resize_to(latents, (2, 2)).mean((-2, -1)), latents.mean((-2, -1)))
    assert resize_to(latents, (8, 8)) is latents


def test_growing_lies_on_centre_aligned_positions():
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)
    grown = resize_to(ramp, (4, 8))[0, 0, 0]
    # cell i of 8 sits at (i + 0.5) * 4/8 - 0.5 of the coarse grid; the ends are clamped to the first and last cell
    torch.testing.assert_close(grown, ((torch.arange(8) + 0.5) / 2 - 0.5).clamp(0, 3))


def test_no_grid_has_more_scales_than_sizes_and_one_size_is_refused():
    """Index S of the scale embedding is the finished picture's alone."""
    for sizes in ((1, 2), (1, 5), (1, 3, 7), DEFAULT_SIZES):
        for height, width in ((1, 1), (1, 2), (2, 2), (3, 7), (7, 7), (8, 11), (13, 13), (40, 39)):
            assert len(scale_schedule(height, width, sizes=sizes)) <= len(sizes)
    with pytest.raises(ConfigError, match="second size"):
        VisualTokenizerConfig(sizes=(1,))


def test_extra_leading_axes_are_kept():
    assert resize_to(torch.zeros(2, 3, 4, 8, 8), (3, 3)).shape == (2, 3, 4, 3, 3)
