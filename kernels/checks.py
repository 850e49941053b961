"""What a kernel asks of its tensors, as one ValueError that names the tensor, its shape and the rule.

Nothing here waits for a GPU. A rule's text is made where it fails alone: a step calls thousands of these.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch.autograd.function import FunctionCtx

from ernie5.errors import KernelError

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def require(holds: bool, *, op: str, name: str, tensor: torch.Tensor, rule: str) -> None:
    """Raise a ValueError about `tensor` unless `holds`."""
    if not holds:
        raise ValueError(
            f"{op}: {name} has shape {tuple(tensor.shape)}, dtype {tensor.dtype}, strides {tensor.stride()} on "
            f"{tensor.device}; {rule}"
        )


def require_shape(tensor: torch.Tensor, *, shape: tuple[int, ...], op: str, name: str, meaning: str) -> None:
    """Ask for exactly `shape`; meaning: of what it has so many, such as "one per row of x"."""
    if tensor.shape != shape:
        require(False, op=op, name=name, tensor=tensor, rule=f"it must be {list(shape)}, {meaning}")


def require_float(tensor: torch.Tensor, *, op: str, name: str) -> None:
    """Ask for a dtype that the Triton kernels compute with (they accumulate in fp32, which fp64 would lose by)."""
    rule = "the triton backend takes float32, bfloat16 or float16; use backend torch for others"
    require(tensor.dtype in TRITON_DTYPES, op=op, name=name, tensor=tensor, rule=rule)


def require_fractions(tensor: torch.Tensor, *, op: str, name: str) -> None:
    """Ask for a floating type, whatever its width."""
    require(tensor.is_floating_point(), op=op, name=name, tensor=tensor, rule="it must be of a floating type")


def require_beside(tensor: torch.Tensor, *, first: torch.Tensor, op: str, name: str, same_dtype: bool = False) -> None:
    """Ask that `tensor` be on the device of the op's first tensor, and of its dtype where `same_dtype`."""
    if tensor.device != first.device:
        rule = f"it must be on {first.device} like the first argument"
        require(False, op=op, name=name, tensor=tensor, rule=rule)
    if same_dtype and tensor.dtype != first.dtype:
        rule = f"it must have dtype {first.dtype} like the first argument"
        require(False, op=op, name=name, tensor=tensor, rule=rule)


def has_own_memory(tensor: torch.Tensor) -> bool:
    """Whether an address says where its values lie: not of a FakeTensor, a DTensor or another subclass that dispatches
    by itself, nor under `transforms`, which wrap tensors."""
    return type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__ and not transforms()


def transforms() -> bool:
    """Whether a function of torch.func (grad, vjp, jvp, vmap and the like) is calling, which knows no backward pass by
    hand: only references run there."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def lies_open(tensor: torch.Tensor) -> bool:
    """Whether the host may look at values: on the CPU, outside a program that is being compiled or only traced."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and has_own_memory(tensor)


def require_part(
    tensor: torch.Tensor, *, dtypes: tuple[torch.dtype, ...], shape: torch.Size, first: torch.Tensor, op: str, name: str
) -> None:
    """Ask for one of `dtypes`, the parameter's `shape`, no gaps, its own numbers in memory, and the device of `first`.
    """
    if tensor.dtype not in dtypes:
        rule = f"it must be {' or '.join(str(x).removeprefix('torch.') for x in dtypes)}"
        require(False, op=op, name=name, tensor=tensor, rule=rule)
    if tensor.shape != shape:
        rule = f"it must have the parameter's shape {tuple(shape)}"
        require(False, op=op, name=name, tensor=tensor, rule=rule)
    require(tensor.is_contiguous(), op=op, name=name, tensor=tensor, rule="it must be contiguous")
    rule = "it must hold its own numbers, which resolve_neg() of a negative view gives"
    require(not tensor.is_neg(), op=op, name=name, tensor=tensor, rule=rule)
    require_beside(tensor, first=first, op=op, name=name)


def require_within(index: torch.Tensor, *, limit: int, op: str, name: str) -> None:
    """Ask that every index that `lies_open` be one of 0 .. limit - 1: C++ would read whatever memory it points at.

    A GPU is not asked, because that would wait for it.
    """
    if not index.numel() or not lies_open(index):
        return
    low, high = (int(end) for end in torch.aminmax(index))
    if low < 0 or high >= limit:
        rule = f"it holds {low} to {high} and may hold 0 to {limit - 1}"
        require(False, op=op, name=name, tensor=index, rule=rule)


def require_offsets(offsets: torch.Tensor, *, rows: int, op: str) -> None:
    """Ask for int32 or int64, and of what `lies_open` that the cumulative ends rise from 0 to at most `rows`."""
    holds = offsets.dtype in (torch.int32, torch.int64)
    require(holds, op=op, name="offsets", tensor=offsets, rule="it must be int32 or int64")
    if not lies_open(offsets):
        return
    start = 0
    for end in offsets.tolist():
        if not start <= end <= rows:
            rule = f"it holds {end} after {start} and must rise from 0 to at most the {rows} rows"
            require(False, op=op, name="offsets", tensor=offsets, rule=rule)
        start = end


def note_writes(tensors: Iterable[torch.Tensor | None]) -> None:
    """Tell autograd that a kernel wrote there: a backward pass that saved one of them before is then refused, as after
    PyTorch's own operations in place, instead of taking the new values for the old."""
    torch.autograd.graph.increment_version([tensor for tensor in tensors if tensor is not None])


def kept_for_product(
    ctx: FunctionCtx, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What the backward pass of a product of x and weight, its first two arguments, reads: x for the gradient of weight
    and the other way round, None where nobody asks for that. Beside a frozen weight x would be kept for nothing."""
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    return x if needs_weight else None, weight if needs_x else None


def first_order(
    backward: Callable[..., object], *, way_out: str = 'Use backend="reference"'
) -> Callable[..., object]:
    """A backward pass by hand that refuses to be differentiated: it takes what was saved for constants, so a second
    derivative would be wrong without a word. The gradients that it gets hold their own numbers, not the opposite."""

    @functools.wraps(backward)
    def checked(ctx: object, *grads: torch.Tensor | None) -> object:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise KernelError(
                f"{backward.__qualname__}: backward was called with create_graph=True, and has no second derivative. "
                f"{way_out}"
            )
        return backward(ctx, *(grad if grad is None else grad.resolve_neg() for grad in grads))

    return checked


def fp8_runs_on(device: torch.device) -> bool:
    """Whether compiled kernels know e4m3 there: compute capability 8.9 and later; the interpreter does everywhere."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)
