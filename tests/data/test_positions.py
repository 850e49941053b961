"""Uni-RoPE positions: the golden sequence text - image - text - video - audio, and the grid formula."""

from __future__ import annotations

import pytest
import torch

from ernie5.data.positions import PositionCursor, grid_coordinates


def test_cells_of_every_scale_share_one_centre_aligned_grid() -> None:
    assert grid_coordinates((1, 1), finest=(8, 8)).tolist() == [[3.5, 3.5]]
    assert grid_coordinates((2, 2), finest=(8, 8)).tolist() == [[1.5, 1.5], [1.5, 5.5], [5.5, 1.5], [5.5, 5.5]]
    assert grid_coordinates((2, 3), finest=(2, 3)).tolist() == [[i, j] for i in range(2) for j in range(3)]
    third = grid_coordinates((3, 3), finest=(8, 8))
    assert third[4].tolist() == [3.5, 3.5]
    assert third[0, 0].item() == pytest.approx(0.5 * 8 / 3 - 0.5)


def _places(grid: tuple[int, int], *, finest: tuple[int, int], frame: int = 0) -> torch.Tensor:
    coordinates = grid_coordinates(grid, finest=finest)
    return torch.cat([torch.full((len(coordinates), 1), float(frame)), coordinates], dim=1)


def test_golden_positions_of_text_image_text_video_audio() -> None:
    cursor, trace = PositionCursor(), []

    def text(count: int) -> torch.Tensor:
        return torch.tensor(cursor.text(count), dtype=torch.float32)[:, None].expand(count, 3)

    trace.append(text(2))                                         # two words
    trace.append(text(1))                                         # BOI at 2
    image = cursor.cells(_places((2, 2), finest=(2, 2)))
    trace.append(image)
    cursor.leave(image)
    trace.append(text(1))                                         # EOI
    trace.append(text(1))                                         # BOV at 6
    clip = cursor.cells(torch.cat([_places((1, 1), finest=(2, 2), frame=frame) for frame in range(3)]))
    trace.append(clip)
    cursor.leave(clip)
    trace.append(text(2))                                         # EOV, BOA
    trace.append(text(2))                                         # two audio frames
    expected = [
        [0, 0, 0], [1, 1, 1], [2, 2, 2],
        [3, 3, 3], [3, 3, 4], [3, 4, 3], [3, 4, 4],
        [5, 5, 5], [6, 6, 6],
        [7, 7.5, 7.5], [8, 7.5, 7.5], [9, 7.5, 7.5],
        [10, 10, 10], [11, 11, 11], [12, 12, 12], [13, 13, 13],
    ]
    assert torch.cat(trace).tolist() == expected
    assert cursor.next == 14


def test_a_tall_picture_moves_on_by_its_longest_side_and_fractions_round_up() -> None:
    cursor = PositionCursor()
    block = cursor.cells(_places((1, 1), finest=(6, 2)))
    assert block.tolist() == [[0.0, 2.5, 0.5]]
    cursor.leave(block)
    assert cursor.next == 4


def test_origin_zero_leaves_only_time_running() -> None:
    cursor = PositionCursor(visual_origin="zero")
    cursor.text(5)
    assert cursor.cells(_places((1, 2), finest=(1, 2), frame=1)).tolist() == [[6, 0, 0], [6, 0, 1]]


def test_an_empty_medium_does_not_move_the_position() -> None:
    cursor = PositionCursor()
    cursor.leave(torch.zeros(0, 3))
    assert cursor.next == 0
