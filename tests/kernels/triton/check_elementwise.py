"""SwiGLU, RMSNorm and rotation in Triton against their references."""

from __future__ import annotations

import pytest
import torch

from ernie5_kernels.launch import readable
from ernie5_kernels.rms_norm import rms_norm
from ernie5_kernels.rope3d import rope3d, rotation_of
from ernie5_kernels.swiglu import swiglu
from ernie5_kernels.testing import assert_backends_agree, kernel_device, random_tensor

SIZES = (0, 1, 7, 63)
FP32 = {"tolerance": 3e-6, "reason": "fp32, another order of sums"}
BF16 = {"tolerance": 2e-2, "reason": "8 bits of mantissa; the kernel rounds once, the reference after every step"}
OP_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("rows", SIZES)
def test_swiglu_matches_the_reference_with_and_without_row_weights(rows: int) -> None:
    gate_up, weights = random_tensor(rows, 14), random_tensor(rows, seed=1)
    assert_backends_agree(lambda x, b: swiglu(x, backend=b), inputs=(gate_up,), **FP32)
    assert_backends_agree(lambda x, p, b: swiglu(x, row_weights=p, backend=b), inputs=(gate_up, weights), **FP32)


def test_swiglu_wider_than_a_tile_matches_in_bf16_and_with_fp32_weights() -> None:
    gate_up, weights = random_tensor(3, 2 * 1030, dtype=torch.bfloat16), random_tensor(3, seed=1)
    assert_backends_agree(lambda x, p, b: swiglu(x, row_weights=p, backend=b), inputs=(gate_up, weights.bfloat16()),
                          tolerance=6e-2, reason="the gradient of a weight sums 1,030 bf16 products of about 1")
    assert swiglu(gate_up, row_weights=weights, backend="triton").dtype == torch.bfloat16


@pytest.mark.parametrize("rows", SIZES)
def test_rms_norm_matches_the_reference(rows: int) -> None:
    inputs = (random_tensor(2, rows, 7), random_tensor(7, seed=1))
    assert_backends_agree(lambda x, w, b: rms_norm(x, weight=w, eps=1e-5, backend=b), inputs=inputs, **FP32)


def test_rms_norm_matches_where_one_program_takes_many_rows_and_in_bf16() -> None:
    inputs = (random_tensor(200, 33), random_tensor(33, seed=1))
    assert_backends_agree(lambda x, w, b: rms_norm(x, weight=w, eps=1e-5, backend=b), inputs=inputs, **FP32)
    narrow = tuple(x[:5].bfloat16() for x in inputs[:1]) + (inputs[1].bfloat16(),)
    assert_backends_agree(lambda x, w, b: rms_norm(x, weight=w, eps=1e-5, backend=b), inputs=narrow, **BF16)


@pytest.mark.parametrize("tokens", SIZES)
def test_rotation_matches_the_reference(tokens: int) -> None:
    rotation = rotation_of(random_tensor(2, tokens, 3, seed=1))
    inputs = (random_tensor(2, tokens, 3, 6),)
    assert_backends_agree(lambda x, b: rope3d(x, rotation=rotation, backend=b), inputs=inputs, **FP32)


def test_heads_too_far_apart_for_32_bits_are_copied() -> None:
    near, far = (torch.empty(1, 64, n, 128, device="meta").transpose(1, 2) for n in (1 << 17, 1 << 18))
    assert readable(near) is near and not far.is_contiguous()
    assert readable(far).is_contiguous()


def test_rotation_reads_a_slice_of_a_fused_projection_in_place() -> None:
    rotation = rotation_of(random_tensor(2, 5, 4, seed=1))

    def turn(fused: torch.Tensor, backend: str) -> torch.Tensor:
        return rope3d(fused[..., 8:24].unflatten(-1, (2, 8)), rotation=rotation, backend=backend)

    assert_backends_agree(turn, inputs=(random_tensor(2, 5, 32),), **FP32)


def test_wrong_dtypes_and_devices_are_refused_by_name() -> None:
    x, weight = random_tensor(3, 8), random_tensor(8)
    with pytest.raises(ValueError, match=r"rms_norm: x has shape \(3, 8\), dtype torch.float64.*takes float32"):
        rms_norm(x.double(), weight=weight.double(), eps=1e-5, backend="triton")
    with pytest.raises(ValueError, match=r"rms_norm: weight .* it must be on"):
        rms_norm(x, weight=weight.to("meta"), eps=1e-5, backend="triton")
    with pytest.raises(ValueError, match="swiglu: gate_up has shape .* dtype torch.int32"):
        swiglu(x.int(), backend="triton")
    with pytest.raises(ValueError, match="rms_norm: x .* at most 16384"):
        rms_norm(random_tensor(1, 16385), weight=random_tensor(16385), eps=1e-5, backend="triton")
    assert rms_norm(x.double(), weight=weight.double(), eps=1e-5).dtype == torch.float64


def test_the_operators_pass_opcheck_and_compile_into_one_graph() -> None:
    from ernie5_kernels.rms_norm.kernel import rms_norm_op
    from ernie5_kernels.rope3d.kernel import rope3d_triton
    from ernie5_kernels.swiglu.kernel import swiglu_triton

    x, weight = random_tensor(3, 8).requires_grad_(), random_tensor(8).requires_grad_()
    torch.library.opcheck(swiglu_triton, (x, random_tensor(3).requires_grad_()), test_utils=OP_CHECKS)
    torch.library.opcheck(rms_norm_op, (x, weight, 1e-5), test_utils=OP_CHECKS)
    heads = random_tensor(1, 3, 2, 4).requires_grad_()
    torch.library.opcheck(rope3d_triton, (heads, random_tensor(1, 3, 2, 2), 1.0), test_utils=OP_CHECKS)
    compiled = torch.compile(lambda x, w: swiglu(rms_norm(x, weight=w, eps=1e-5)), fullgraph=True, backend="aot_eager")
    compiled(x, weight).sum().backward()
    assert x.grad.device.type == kernel_device().type and weight.grad.isfinite().all()
