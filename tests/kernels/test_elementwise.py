"""RMSNorm, SwiGLU, rotation and the two cross-entropies against their references, and the choice of backend."""

from __future__ import annotations

import pytest
import torch

from ernie5.errors import KernelError
from ernie5_kernels.bit_cross_entropy import bit_cross_entropy
from ernie5_kernels.dispatch import choose_backend
from ernie5_kernels.linear_cross_entropy import chunked, linear_cross_entropy
from ernie5_kernels.rms_norm import rms_norm
from ernie5_kernels.rope3d import rope3d, rotation_of
from ernie5_kernels.swiglu import swiglu
from ernie5_kernels.testing import ODD_SIZES, assert_close, outputs_and_gradients, poisoned_memory


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compare(function, *inputs: torch.Tensor, tolerance: float = 1e-12) -> None:
    """Outputs and gradients of function(*inputs, backend) for torch and reference."""
    with poisoned_memory():
        actual, expected = (
            outputs_and_gradients(lambda *x, b=b: function(*x, b), inputs=inputs) for b in ("torch", "reference")
        )
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, expected=other, tolerance=tolerance, reason="fp64, another order of sums")


@pytest.mark.parametrize("rows", (0, *ODD_SIZES))
def test_rms_norm_matches_the_reference_with_gradients(rows: int) -> None:
    compare(lambda x, w, b: rms_norm(x, weight=w, eps=1e-5, backend=b), normal(2, rows, 7), normal(7, seed=1))


def test_rms_norm_of_a_zero_row_is_zero_and_has_a_finite_gradient() -> None:
    x = torch.zeros(2, 5, requires_grad=True)
    rms_norm(x, weight=torch.ones(5), eps=1e-5).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("rows", (0, *ODD_SIZES))
def test_swiglu_matches_the_reference_with_and_without_row_weights(rows: int) -> None:
    compare(lambda x, b: swiglu(x, backend=b), normal(rows, 14))
    compare(lambda x, p, b: swiglu(x, row_weights=p, backend=b), normal(rows, 14), normal(rows, seed=1))


@pytest.mark.parametrize("tokens", ODD_SIZES)
def test_rotation_matches_the_reference_and_keeps_lengths(tokens: int) -> None:
    rotation = rotation_of(normal(2, tokens, 3, seed=1))
    compare(lambda x, b: rope3d(x, rotation=rotation, backend=b), normal(2, tokens, 3, 6))
    x = normal(2, tokens, 3, 6)
    assert_close(rope3d(x, rotation=rotation).norm(dim=-1), expected=x.norm(dim=-1), tolerance=1e-12, reason="rotation")


@pytest.mark.parametrize("rows", (0, *ODD_SIZES))
def test_bit_cross_entropy_matches_the_reference_with_gradients(rows: int) -> None:
    bits, weights = (normal(rows, 5, seed=1) > 0).double(), normal(rows, seed=2).abs()
    compare(lambda x, b: bit_cross_entropy(x, bits=bits, weights=weights, backend=b), 30 * normal(rows, 5))


@pytest.mark.parametrize("rows", (0, *ODD_SIZES))
def test_linear_cross_entropy_matches_the_reference_with_gradients(rows: int) -> None:
    targets = torch.randint(0, 11, (rows,), generator=torch.Generator().manual_seed(rows))

    def function(hidden: torch.Tensor, weight: torch.Tensor, backend: str) -> torch.Tensor:
        return linear_cross_entropy(hidden, weight=weight, targets=targets, chunk_rows=10, backend=backend)

    compare(function, normal(rows, 7), 20 * normal(11, 7, seed=1))


def test_linear_cross_entropy_without_gradients_gives_the_same_sum() -> None:
    hidden, weight, targets = normal(20, 7), normal(11, 7, seed=1), torch.arange(20) % 11
    with torch.no_grad():
        bare = linear_cross_entropy(hidden, weight=weight, targets=targets)
    assert torch.equal(bare, linear_cross_entropy(hidden.requires_grad_(), weight=weight, targets=targets).detach())


def test_linear_cross_entropy_makes_no_gradient_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes gradients in the forward pass, and a parameter asks for its own under no_grad as well."""
    hidden, weight, targets = normal(20, 7), torch.nn.Parameter(normal(11, 7, seed=1)), torch.arange(20) % 11
    expected = linear_cross_entropy(hidden, weight=weight, targets=targets).detach()
    monkeypatch.setattr(chunked, "_accumulate", None)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight=weight, targets=targets), expected)


def test_a_backend_that_cannot_run_is_refused_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu = torch.device("cpu")
    with pytest.raises(KernelError, match="triton cannot run on cpu"):
        choose_backend("triton", op="x", offered=("triton", "torch"), device=cpu)
    with pytest.raises(KernelError, match="no triton implementation"):
        choose_backend("triton", op="x", offered=("torch",), device=cpu)
    with pytest.raises(KernelError, match="unknown backend"):
        choose_backend("cuda", op="x", offered=("torch",), device=cpu)
    assert choose_backend("auto", op="x", offered=("triton", "torch"), device=cpu) == "torch"
