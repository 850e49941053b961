import math

import torch

from ernie5.tokenizers.losses import (
    PatchDiscriminator,
    commitment_loss,
    entropy_loss,
    hinge_discriminator_loss,
    laplacian_loss,
    log_error,
    psnr,
)
from ernie5.tokenizers.visual.quantizer import MultiScaleQuantizer
from ernie5.tokenizers.visual.scales import scale_schedule


def picture(seed: int) -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def encode(latents: torch.Tensor):
    schedule = scale_schedule(4, 4)
    return MultiScaleQuantizer().encode(latents, schedule=schedule), schedule


def test_psnr_is_that_of_a_known_error():
    output = torch.zeros(2, 3, 8, 8)
    target = torch.stack([torch.full((3, 8, 8), 0.2), torch.full((3, 8, 8), 2.0)])
    torch.testing.assert_close(psnr(output, target), torch.tensor([20.0, 0.0]), atol=1e-5, rtol=0)


def test_the_log_error_orders_like_psnr_and_has_a_floor():
    target = picture(1)
    ratio = math.log(10.0) / 10.0
    for gap in (0.2, 0.5):
        output = target + gap
        expected = math.log(4.0) - ratio * psnr(output, target).mean()
        # the floor of 1e-3 adds 1e-3 / 0.04 = 0.025 at the smaller gap
        torch.testing.assert_close(log_error(output, target), expected, atol=0.03, rtol=0)
    still = target.clone().requires_grad_(True)
    log_error(still, target).backward()
    assert torch.isfinite(still.grad).all() and log_error(target, target) == torch.tensor(1e-3).log()


def test_the_log_error_weighs_a_good_picture_as_much_as_a_bad_one():
    target = torch.zeros(2, 3, 8, 8)
    output = torch.stack([torch.full((3, 8, 8), 0.2), torch.full((3, 8, 8), 1.0)]).requires_grad_(True)
    log_error(output, target).backward()
    pull = (output.grad * output).flatten(1).sum(1)
    torch.testing.assert_close(pull[0], pull[1], atol=0.03, rtol=0)


def test_the_detail_loss_ignores_shade_and_sees_blur():
    sharp = picture(0)
    blurred = torch.nn.functional.avg_pool2d(sharp, 3, stride=1, padding=1)
    assert laplacian_loss(sharp, sharp) == 0
    assert laplacian_loss(sharp + 0.3, sharp) < 1e-6
    assert laplacian_loss(blurred, sharp) > 0.05


def test_the_detail_loss_takes_odd_and_tiny_pictures():
    for side in (1, 2, 7, 13):
        value = laplacian_loss(torch.zeros(1, 3, side, side), torch.ones(1, 3, side, side))
        assert torch.isfinite(value)


def test_latents_that_are_their_own_codes_have_no_commitment_loss():
    codes, _ = encode(torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0)))
    fixed = codes.finished.movedim(-1, 1)
    assert commitment_loss(fixed, codes) == 0
    torch.testing.assert_close(commitment_loss(fixed + 0.25, codes), torch.tensor(1.0))


def test_sure_and_balanced_bits_have_the_least_entropy_loss():
    generator = torch.Generator().manual_seed(0)
    balanced = 40.0 * torch.randn(64, 16, 1, 1, generator=generator)
    one_sided = balanced.abs()
    unsure = 0.001 * balanced
    values = []
    for latents in (balanced, one_sided, unsure):
        codes = MultiScaleQuantizer().encode(latents, schedule=((1, 1),))
        values.append(float(entropy_loss(latents, codes, schedule=((1, 1),), active_bits=16)))
    assert abs(values[0] + math.log(2)) < 0.05
    assert values[0] < values[1] - 0.5 and values[0] < values[2] - 0.5


def test_the_entropy_loss_reaches_the_latents_at_every_scale():
    latents = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    codes, schedule = encode(latents)
    entropy_loss(latents, codes, schedule=schedule, active_bits=16).backward()
    assert torch.isfinite(latents.grad).all() and latents.grad.abs().min() > 0


def test_the_discriminator_learns_to_tell_noise_from_shade():
    torch.manual_seed(0)
    network = PatchDiscriminator(8)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        real, fake = picture(step), picture(step).mean((2, 3), keepdim=True).expand(-1, -1, 32, 32)
        loss = hinge_discriminator_loss(network(real), network(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
