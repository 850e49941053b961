"""The ViT stays within a frame, knows places, and does not mind the order or number of patches."""

from __future__ import annotations

import torch

from ernie5.model.vision import _slots_by_frame


def test_features_of_a_frame_do_not_depend_on_other_frames(model) -> None:
    vit, generator = model.embedding.vision.vit, torch.Generator().manual_seed(0)
    pixels = torch.randn(9, 12, generator=generator, dtype=torch.float64)
    frames = torch.tensor([7, 7, 7, 7, 3, 3, 9, 9, 9])
    places = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [0, 0], [0, 1], [0, 0], [0, 1], [1, 0]])
    whole = vit(pixels, frame_ids=frames, places=places)
    for frame in (3, 7, 9):
        rows = torch.nonzero(frames == frame).flatten()
        alone = vit(pixels[rows], frame_ids=frames[rows], places=places[rows])
        assert torch.allclose(whole[rows], alone, atol=1e-12)
    order = torch.randperm(9, generator=generator)
    shuffled = vit(pixels[order], frame_ids=frames[order], places=places[order])
    assert torch.allclose(shuffled, whole[order], atol=1e-12)


def test_moving_a_patch_to_another_place_changes_its_frame(model) -> None:
    vit = model.embedding.vision.vit
    pixels = torch.randn(2, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    frames = torch.zeros(2, dtype=torch.int64)
    here, there = (vit(pixels, frame_ids=frames, places=torch.tensor([[0, 0], at])) for at in ([0, 1], [1, 0]))
    assert not torch.allclose(here, there)


def test_slots_fill_a_grid_of_frames_without_collision() -> None:
    slots, frames, largest = _slots_by_frame(torch.tensor([5, 2, 5, 5, 2]))
    assert (frames, largest) == (2, 3)
    assert sorted(slots.tolist()) == [0, 1, 3, 4, 5]
