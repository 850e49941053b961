"""Mends three faults of Triton's interpreter (3.9) that the compiled kernels do not have.

It multiplies bf16 matrices as the 16-bit integers that it stores them in, wrong by many orders of magnitude; it cuts
fp32 off to bf16 where the hardware rounds; and it loses the carry of rounding to e4m3, so that 127 becomes 64.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

ROUNDED = {tl.bfloat16: (torch.bfloat16, torch.uint16), tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8)}


def mend_products() -> None:
    """Widen bf16 operands of tl.dot to fp32, which holds their products exactly."""
    original = interpreter.InterpreterBuilder.create_dot

    def create_dot(builder, a, b, d, input_precision, max_num_imprecise_acc):
        return original(builder, _widened(a), _widened(b), d, input_precision, max_num_imprecise_acc)

    interpreter.InterpreterBuilder.create_dot = create_dot


def mend_rounding() -> None:
    """Round fp32 to the nearest bf16 or e4m3, ties to even."""
    original: Callable = interpreter._convert_float

    def convert(values, input_dtype, output_dtype, rounding_mode):
        if input_dtype != tl.float32 or output_dtype not in ROUNDED:
            return original(values, input_dtype, output_dtype, rounding_mode)
        narrow, bits = ROUNDED[output_dtype]
        wide = torch.from_numpy(np.array(values, dtype=np.float32))
        return wide.to(narrow).view(bits).numpy().reshape(np.shape(values))

    interpreter._convert_float = convert


def _widened(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
    if handle.dtype.scalar != tl.bfloat16 or handle.data.dtype != np.uint16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


if triton.knobs.runtime.interpret:
    mend_products()
    mend_rounding()
