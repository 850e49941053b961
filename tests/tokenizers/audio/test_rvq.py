"""The residual quantiser: nearest codes, prefixes of levels, gradients, moving averages, hostile codes."""

import pytest
import torch

from ernie5.errors import TokenizerError
from ernie5.tokenizers.audio.rvq import CodebookAverages, ResidualQuantizer, kmeans, nearest_codes


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def quantizer() -> ResidualQuantizer:
    torch.manual_seed(0)
    made = ResidualQuantizer(6, levels=4, codes=16)
    made.codebooks.copy_(torch.randn(4, 16, 6) * 0.5 ** torch.arange(4)[:, None, None])
    return made


def all_levels(quantizer: ResidualQuantizer, latents: torch.Tensor) -> torch.Tensor:
    return torch.full((latents.shape[0],), quantizer.levels)


@pytest.mark.parametrize("num_points", [1, 511, 1025])
def test_nearest_codes_equal_a_full_distance_matrix(num_points):
    points = torch.randn(num_points, 5, generator=seeded(1))
    codebook = torch.randn(9, 5, generator=seeded(2))
    torch.testing.assert_close(nearest_codes(points, codebook=codebook), torch.cdist(points, codebook).argmin(1))


def test_each_level_codes_what_the_levels_before_it_left(quantizer):
    latents = torch.randn(2, 7, 6, generator=seeded(3))
    codes = quantizer.quantize(latents, active_levels=all_levels(quantizer, latents)).codes
    rest = latents.clone()
    for level in range(4):
        expected = torch.cdist(rest.reshape(-1, 6), quantizer.codebooks[level]).argmin(1).view(2, 7)
        torch.testing.assert_close(codes[:, :, level], expected)
        rest = rest - quantizer.codebooks[level][expected]


@pytest.mark.parametrize("num_levels", [1, 2, 3, 4])
def test_dropped_levels_decode_like_the_codes_of_the_first_levels(quantizer, num_levels):
    latents = torch.randn(3, 5, 6, generator=seeded(4))
    coded = quantizer.quantize(latents, active_levels=torch.tensor([4, num_levels, 1]))
    looked_up = quantizer.look_up(coded.codes[:, :, :num_levels])
    torch.testing.assert_close(coded.latents[1], looked_up[1])
    torch.testing.assert_close(coded.first, quantizer.look_up(coded.codes[:, :, :1]))


def test_the_gradient_passes_straight_through_to_the_latents(quantizer):
    latents = torch.randn(2, 3, 6, generator=seeded(5), requires_grad=True)
    weight = torch.randn(2, 3, 6, generator=seeded(6))
    (quantizer.quantize(latents, active_levels=torch.tensor([4, 2])).latents * weight).sum().backward()
    torch.testing.assert_close(latents.grad, weight)


def test_commitment_pulls_latents_towards_the_sum_of_their_codes_at_every_level(quantizer):
    latents = torch.randn(1, 4, 6, generator=seeded(7), requires_grad=True)
    coded = quantizer.quantize(latents, active_levels=torch.tensor([4]))
    coded.commitment.backward()
    sums = [quantizer.look_up(coded.codes[:, :, : level + 1]) for level in range(4)]
    expected = sum(2.0 * (latents.detach() - total) / latents.numel() for total in sums) / 4
    torch.testing.assert_close(latents.grad, expected)


def test_kmeans_finds_separate_clusters_and_survives_fewer_points_than_codes():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    points = centres.repeat(50, 1) + 0.01 * torch.randn(150, 2, generator=seeded(8))
    found = kmeans(points, num_codes=12, generator=seeded(9))
    assert float(torch.cdist(centres, found).min(1).values.max()) < 0.05
    assert torch.isfinite(kmeans(points[:2], num_codes=5, generator=seeded(10))).all()


def test_more_levels_leave_less_after_a_start_from_latents(quantizer):
    latents = torch.randn(600, 6, generator=seeded(11))
    CodebookAverages(6, levels=4, codes=16).start(quantizer, latents=latents, generator=seeded(12))
    coded = quantizer.quantize(latents[None], active_levels=torch.tensor([4]))
    errors = [float((latents - quantizer.look_up(coded.codes[:, :, :q])[0]).square().mean()) for q in range(1, 5)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.35 * errors[0]


def test_averages_move_codes_towards_the_residuals_they_win_and_revive_dead_ones(quantizer):
    averages = CodebookAverages(6, levels=4, codes=16)
    averages.start(quantizer, latents=torch.randn(400, 6, generator=seeded(13)), generator=seeded(14))
    # All latents at one far point: one code per level wins, the others die and are moved onto the residuals.
    latents = torch.full((1, 32, 6), 5.0)
    moved = 0
    for step in range(600):
        codes = quantizer.quantize(latents, active_levels=torch.tensor([4])).codes
        moved += averages.update(quantizer, latents=latents, codes=codes, generator=seeded(step))
    decoded = quantizer.look_up(quantizer.quantize(latents, active_levels=torch.tensor([4])).codes)
    assert moved > 0
    assert torch.isfinite(quantizer.codebooks).all()
    # The decay of 0.99 forgets the start to 0.99^600 = 0.2 %.
    assert float((decoded - latents).abs().max()) < 0.05


@pytest.mark.parametrize(
    "codes, said",
    [
        (torch.zeros(1, 2, 5, dtype=torch.long), "(1, 2, 5)"),
        (torch.zeros(1, 2, 0, dtype=torch.long), "(1, 2, 0)"),
        (torch.zeros(2, 4, dtype=torch.long), "(2, 4)"),
        (torch.full((1, 2, 4), 16), "Remove end codes (16)"),
        (torch.full((1, 2, 4), -1), "[-1, -1]"),
    ],
)
def test_codes_that_do_not_fit_are_refused(quantizer, codes, said):
    with pytest.raises(TokenizerError) as caught:
        quantizer.look_up(codes)
    assert said in str(caught.value)
