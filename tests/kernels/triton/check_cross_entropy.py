"""The two cross-entropies in Triton against their references, whole and over parts of the vocabulary."""

from __future__ import annotations

import pytest
import torch

from ernie5_kernels.bit_cross_entropy import bit_cross_entropy
from ernie5_kernels.bit_cross_entropy.kernel import bit_cross_entropy_triton
from ernie5_kernels.linear_cross_entropy import kernel, linear_cross_entropy, vocabulary_partials
from ernie5_kernels.testing import assert_backends_agree, assert_close, kernel_device, random_tensor

SUMS = {"tolerance": 1e-5, "reason": "fp32 sums in another order"}


def targets_of(rows: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(rows)).to(kernel_device())


@pytest.mark.parametrize("rows", (0, 1, 7, 70))
def test_linear_cross_entropy_matches_the_reference_with_gradients(rows: int) -> None:
    targets = targets_of(rows, 75)
    assert_backends_agree(
        lambda h, w, b: linear_cross_entropy(h, weight=w, targets=targets, backend=b),
        inputs=(random_tensor(rows, 9), 20 * random_tensor(75, 9, seed=1)), **SUMS,
    )


def test_targets_in_a_strided_view_are_read_right() -> None:
    targets = targets_of(20, 75).repeat_interleave(2)[::2]
    assert not targets.is_contiguous()
    assert_backends_agree(
        lambda h, w, b: linear_cross_entropy(h, weight=w, targets=targets, backend=b),
        inputs=(random_tensor(20, 9), random_tensor(75, 9, seed=1)), **SUMS,
    )


def test_linear_cross_entropy_in_bf16_and_through_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = kernel.HeadTiles(32, 32, 16, warps=4, stages=2, uses_tma=True)
    monkeypatch.setattr(kernel, "choose_tiles", lambda **_: tiles)
    targets = targets_of(40, 75)
    inputs = random_tensor(40, 24, dtype=torch.bfloat16), random_tensor(75, 24, seed=1, dtype=torch.bfloat16)
    assert_backends_agree(lambda h, w, b: linear_cross_entropy(h, weight=w, targets=targets, backend=b), inputs=inputs,
                          tolerance=2e-2, reason="the reference rounds its logits to bf16, the kernel keeps fp32")
    wide = tuple(x.float() for x in inputs)
    assert_backends_agree(lambda h, w, b: linear_cross_entropy(h, weight=w, targets=targets, backend=b), inputs=wide,
                          **SUMS)


def test_gradients_made_in_chunks_of_rows_equal_those_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "DELTA_BYTES", 1)
    targets = targets_of(70, 40)
    assert_backends_agree(lambda h, w, b: linear_cross_entropy(h, weight=w, targets=targets, backend=b),
                          inputs=(random_tensor(70, 9), random_tensor(40, 9, seed=1)), **SUMS)


def test_parts_of_the_vocabulary_merge_to_the_whole_in_loss_and_gradient() -> None:
    hidden, weight, targets = random_tensor(7, 9), random_tensor(75, 9, seed=1), targets_of(7, 75)
    parts = [(0, weight[:30]), (30, weight[30:])]
    merged = [vocabulary_partials(hidden, weight=w, targets=targets, first_id=first, backend="triton")
              for first, w in parts]
    for (first, w), ours in zip(parts, merged, strict=True):
        truth = vocabulary_partials(hidden, weight=w, targets=targets, first_id=first, backend="reference")
        for one, other in zip(ours, truth, strict=True):
            assert_close(one, expected=other, **SUMS)
    peaks, masses, picks = (torch.stack(x) for x in zip(*merged, strict=True))
    peak = peaks.amax(0)
    normaliser = (masses * (peaks - peak).exp()).sum(0).log() + peak
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    whole = linear_cross_entropy(leaves[0], weight=leaves[1], targets=targets, backend="reference")
    assert_close((normaliser - picks.sum(0)).sum(), expected=whole.detach(), **SUMS)
    expected = torch.autograd.grad(whole, leaves)
    one = torch.ones((), device=hidden.device)
    grads = [kernel.gradients_triton(hidden, w, targets, normaliser, one, first) for first, w in parts]
    assert_close(grads[0][0] + grads[1][0], expected=expected[0], **SUMS)
    assert_close(torch.cat([grads[0][1], grads[1][1]]), expected=expected[1], **SUMS)


@pytest.mark.parametrize("rows", (0, 1, 7, 129))
def test_bit_cross_entropy_matches_the_reference_with_gradients(rows: int) -> None:
    bits = random_tensor(rows, 5, seed=1) > 0
    for kind in (torch.bool, torch.uint8, torch.float32):
        assert_backends_agree(
            lambda x, w, b, kind=kind: bit_cross_entropy(x, bits=bits.to(kind), weights=w, backend=b) if b == "triton"
            else bit_cross_entropy(x, bits=bits.float(), weights=w, backend=b),
            inputs=(30 * random_tensor(rows, 5), random_tensor(rows, seed=2).abs()), **SUMS,
        )


def test_a_confident_bit_keeps_its_small_loss() -> None:
    logit, one = torch.full((1, 1), 18.0, device=kernel_device()), torch.ones(1, 1, device=kernel_device())
    loss = bit_cross_entropy(logit, bits=one, weights=one[0], backend="triton")
    assert_close(loss * 1e8, expected=torch.log1p(torch.exp(-logit.double()))[0] * 1e8, tolerance=1e-5, reason="fp32")


def test_wrong_tensors_are_refused_and_the_operators_pass_opcheck() -> None:
    hidden, weight, targets = random_tensor(3, 8), random_tensor(6, 8), targets_of(3, 6)
    with pytest.raises(ValueError, match="linear_cross_entropy: targets .* int64"):
        linear_cross_entropy(hidden, weight=weight, targets=targets.int(), backend="triton")
    with pytest.raises(ValueError, match="linear_cross_entropy: weight .* contiguous"):
        linear_cross_entropy(hidden, weight=random_tensor(8, 6).T, targets=targets, backend="triton")
    with pytest.raises(ValueError, match="linear_cross_entropy: weight .* dtype torch.float32"):
        linear_cross_entropy(hidden, weight=weight.bfloat16(), targets=targets, backend="triton")
    with pytest.raises(ValueError, match="bit_cross_entropy: logits .* dtype torch.float64"):
        bit_cross_entropy(hidden.double(), bits=hidden > 0, weights=hidden[:, 0], backend="triton")
    torch.library.opcheck(kernel.cross_entropy_op, (hidden.requires_grad_(), weight.requires_grad_(), targets))
    weights = random_tensor(3).requires_grad_()
    torch.library.opcheck(bit_cross_entropy_triton, (random_tensor(3, 5).requires_grad_(), hidden[:, :5] > 0, weights))
