"""Mends Triton's interpreter, which multiplies bf16 matrices as the 16-bit integers that it stores them in (3.9).

Without this a bf16 product under TRITON_INTERPRET=1 is silently wrong by many orders of magnitude; the compiled
kernels are not concerned.
"""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter


def mend_bf16_products() -> None:
    """Widen bf16 operands of tl.dot to fp32, which holds their products exactly."""
    original = interpreter.InterpreterBuilder.create_dot

    def create_dot(builder, a, b, d, input_precision, max_num_imprecise_acc):
        return original(builder, _widened(a), _widened(b), d, input_precision, max_num_imprecise_acc)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _widened(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
    if handle.dtype.scalar != tl.bfloat16 or handle.data.dtype != np.uint16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


if triton.knobs.runtime.interpret:
    mend_bf16_products()
