import torch

from ernie5.tokenizers.visual.quantizer import (
    MultiScaleQuantizer,
    accumulate,
    bits_to_values,
    flip_bits,
    quantize_bits,
    straight_through,
)
from ernie5.tokenizers.visual.scales import resize_to, scale_schedule


def latents_of(seed: int, *, batch: int = 3, side: int = 8) -> torch.Tensor:
    return torch.randn(batch, 16, side, side, generator=torch.Generator().manual_seed(seed))


def test_bits_are_signs_worth_one_over_root_d():
    residual = torch.tensor([[-0.3, 0.0, 2.0, -9.0]])
    bits = quantize_bits(residual)
    assert bits.tolist() == [[0.0, 1.0, 1.0, 0.0]]
    assert bits_to_values(bits).tolist() == [[-0.5, 0.5, 0.5, -0.5]]
    torch.testing.assert_close(bits_to_values(bits).norm(dim=-1), torch.ones(1))


def test_each_scale_quantises_what_the_earlier_scales_left_over():
    latents, schedule = latents_of(0), scale_schedule(8, 8)
    codes = MultiScaleQuantizer().encode(latents, schedule=schedule)
    accumulated = torch.zeros_like(latents)
    for k, grid in enumerate(schedule):
        torch.testing.assert_close(codes.inputs[k], resize_to(accumulated, grid).movedim(1, -1))
        expected = quantize_bits(resize_to(latents - accumulated, grid).movedim(1, -1))
        assert torch.equal(codes.targets[k], expected)
        accumulated = accumulate(accumulated, codes.targets[k])
    torch.testing.assert_close(codes.finished, accumulated.movedim(1, -1))
    assert codes.inputs[0].abs().max() == 0


def test_decoding_the_targets_gives_the_finished_picture():
    latents, schedule = latents_of(1), scale_schedule(8, 8)
    codes = MultiScaleQuantizer().encode(latents, schedule=schedule)
    summed = MultiScaleQuantizer().decode(codes.targets, grid=(8, 8))
    torch.testing.assert_close(summed, codes.finished.movedim(-1, 1))


def test_flipped_bits_are_accumulated_but_never_targets():
    latents, schedule = latents_of(2), scale_schedule(8, 8)
    certain = torch.zeros(3, len(schedule))
    certain[:, 2] = 1.0
    quantizer = MultiScaleQuantizer()
    clean = quantizer.encode(latents, schedule=schedule)
    dirty = quantizer.encode(latents, schedule=schedule, flip_probability=certain,
                             generator=torch.Generator().manual_seed(0))
    for k in range(3):
        assert torch.equal(clean.targets[k], dirty.targets[k])
    flipped = list(clean.targets[:2]) + [1.0 - clean.targets[2]]
    accumulated = quantizer.decode(flipped, grid=(8, 8))
    torch.testing.assert_close(dirty.inputs[3], resize_to(accumulated, (4, 4)).movedim(1, -1))
    again = quantize_bits(resize_to(latents - accumulated, (4, 4)).movedim(1, -1))
    assert torch.equal(dirty.targets[3], again)


def test_requantisation_repairs_most_of_the_damage_of_early_flips():
    latents, schedule = 0.6 * latents_of(3, batch=16), scale_schedule(8, 8)
    flips = torch.zeros(1, len(schedule))
    flips[:, :3] = 0.3
    quantizer = MultiScaleQuantizer()
    dirty = quantizer.encode(latents, schedule=schedule, flip_probability=flips,
                             generator=torch.Generator().manual_seed(1))
    clean = quantizer.encode(latents, schedule=schedule)
    flipped = [flip_bits(bits, torch.full((16,), 0.3 if k < 3 else 0.0), generator=torch.Generator().manual_seed(k))
               for k, bits in enumerate(clean.targets)]
    unrepaired = quantizer.decode(flipped, grid=(8, 8)).movedim(1, -1)
    target = latents.movedim(1, -1)
    assert (dirty.finished - target).square().mean() < 0.8 * (unrepaired - target).square().mean()


def test_flips_follow_their_probability_and_their_generator():
    bits = torch.zeros(2, 100, 100)
    flipped = flip_bits(bits, torch.tensor([0.0, 0.25]), generator=torch.Generator().manual_seed(0))
    assert flipped[0].sum() == 0
    assert abs(flipped[1].mean() - 0.25) < 0.02  # 4.6 standard deviations of 10,000 draws
    again = flip_bits(bits, torch.tensor([0.0, 0.25]), generator=torch.Generator().manual_seed(0))
    assert torch.equal(flipped, again)


def test_inactive_bits_stay_zero_in_the_finished_picture():
    codes = MultiScaleQuantizer().encode(latents_of(4), schedule=scale_schedule(8, 8), active_bits=5)
    assert codes.finished[..., 5:].abs().max() == 0 and codes.finished[..., :5].abs().amax((0, 1, 2)).min() > 0


def test_the_straight_through_estimate_passes_codes_forward_and_gradients_back():
    latents = latents_of(5).requires_grad_()
    codes = MultiScaleQuantizer().encode(latents, schedule=scale_schedule(8, 8))
    through = straight_through(latents, codes.finished)
    torch.testing.assert_close(through, codes.finished.movedim(-1, 1))
    through.sum().backward()
    assert torch.equal(latents.grad, torch.ones_like(latents))


def test_a_one_cell_picture_has_one_scale():
    codes = MultiScaleQuantizer().encode(latents_of(6, side=1), schedule=scale_schedule(1, 1))
    assert len(codes.targets) == 1 and codes.finished.shape == (3, 1, 1, 16)
