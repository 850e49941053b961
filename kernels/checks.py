"""What a Triton kernel asks of its tensors, as one ValueError that names the tensor, its shape and the rule."""

from __future__ import annotations

import torch

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def require(holds: bool, *, op: str, name: str, tensor: torch.Tensor, rule: str) -> None:
    """Raise a ValueError about `tensor` unless `holds`."""
    if not holds:
        raise ValueError(
            f"{op}: {name} has shape {tuple(tensor.shape)}, dtype {tensor.dtype}, strides {tensor.stride()} on "
            f"{tensor.device}; {rule}"
        )


def require_float(tensor: torch.Tensor, *, op: str, name: str) -> None:
    """Ask for a dtype that the Triton kernels compute with (they accumulate in fp32, which fp64 would lose by)."""
    rule = "the triton backend takes float32, bfloat16 or float16; use backend torch for others"
    require(tensor.dtype in TRITON_DTYPES, op=op, name=name, tensor=tensor, rule=rule)


def require_beside(tensor: torch.Tensor, *, first: torch.Tensor, op: str, name: str, same_dtype: bool = False) -> None:
    """Ask that `tensor` be on the device of the op's first tensor, and of its dtype where `same_dtype`."""
    rule = f"it must be on {first.device} like the first argument"
    require(tensor.device == first.device, op=op, name=name, tensor=tensor, rule=rule)
    if same_dtype:
        rule = f"it must have dtype {first.dtype} like the first argument"
        require(tensor.dtype == first.dtype, op=op, name=name, tensor=tensor, rule=rule)


def fp8_runs_on(device: torch.device) -> bool:
    """Whether compiled kernels know e4m3 there: compute capability 8.9 and later; the interpreter does everywhere."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)
