"""Which implementation of an op runs: the one asked for by name or an error, never a silent fallback.

Names: `reference` is the plain truth, slow and memory-hungry; `torch` the production path in PyTorch on any device;
`native` hand-written C++ for the CPU, fp32 and bf16; `triton` a hand-written kernel for NVIDIA GPUs; `sdpa` and `flex`
PyTorch's own attention, which only `attention` has; `megablocks` and `deepgemm` (grouped products, the latter in fp8)
and `flash_attn` (attention) other people's CUDA packages, run by name alone; `auto` the first of an op's list that can
run on the tensor's device.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from ernie5.errors import KernelError

from .checks import TRITON_DTYPES, transforms
from .native.library import COMPILER, WRITABLE, native_library

BACKENDS = ("auto", "native", "torch", "sdpa", "flex", "reference", "triton", "megablocks", "deepgemm", "flash_attn")
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None  # asked once: torch.compile cannot trace the question
PACKAGES = {
    "megablocks": ("grouped_gemm", "pip install grouped_gemm"),
    "deepgemm": (
        "deep_gemm", "git clone --recursive https://github.com/deepseek-ai/DeepGEMM and run its install.sh; needs nvcc",
    ),
    "flash_attn": ("flash_attn", "pip install flash-attn --no-build-isolation"),
}
"""Back ends that live in a package of their own: its import name (megablocks' products are a separate one), and how to
get it."""


def choose_backend(
    requested: str,
    *,
    op: str,
    offered: tuple[str, ...],
    device: torch.device,
    dtype: torch.dtype | None = None,
    native: bool = False,
) -> str:
    """Return the backend that runs `op` on `device`.

    requested: one of BACKENDS; offered: what the op has, fastest first; dtype: of the op's first tensor, because auto
    leaves what Triton would compute in fp32 only to the next in line; native: whether the C++ library is there and
    takes the op's tensors (`runs_native`). Inside torch.func's transforms the reference alone can run. Raises
    KernelError for an unknown name, for a backend that the op does not have, and for one that cannot run there.
    """
    if requested not in BACKENDS:
        raise KernelError(f"kernel {op}: unknown backend {requested!r}. Known: {', '.join(BACKENDS)}")
    transformed = transforms() and "reference" in offered
    if requested == "auto":
        if transformed:
            return "reference"
        able = {"native": native, "triton": triton_runs_on(device) and dtype in (None, *TRITON_DTYPES)}
        able |= dict.fromkeys(PACKAGES, False)
        chosen = next(name for name in offered if able.get(name, True))
        if chosen == "triton":
            _require_current_device(device, op=op)
        return chosen
    if requested not in offered:
        raise KernelError(f"kernel {op}: no {requested} implementation. It offers {', '.join(offered)}, or use auto")
    if transformed and requested != "reference":
        raise KernelError(
            f"kernel {op}: {requested} has a backward pass by hand, which torch.func cannot transform; use auto or "
            "reference there"
        )
    if requested == "native" and not native:
        raise KernelError(f"kernel {op}: {_without_native()}; use auto or torch")
    if requested == "triton" and not triton_runs_on(device):
        package = "the triton package" if TRITON_INSTALLED else "the package triton (pip install triton)"
        raise KernelError(
            f"kernel {op}: triton cannot run on {device.type}. It needs an NVIDIA GPU and {package} (or "
            "TRITON_INTERPRET=1 for tests); use auto or torch"
        )
    if requested == "triton":
        _require_current_device(device, op=op)
    if requested in PACKAGES:
        _require_package(requested, op=op, device=device)
    return requested


def _without_native() -> str:
    if torch.compiler.is_compiling():
        return "native cannot run inside torch.compile"
    if os.environ.get("ERNIE5_NATIVE") == "0":
        return "native is switched off by ERNIE5_NATIVE=0"
    if native_library() is None:
        return f"native has no C++ library here, as a warning said. {COMPILER}. Or: {WRITABLE}"
    return "native cannot take these tensors. It needs all in fp32 or all in bf16, on the CPU"


def _require_current_device(device: torch.device, *, op: str) -> None:
    """Triton launches on the current device and its stream, wherever the tensors are: at best unordered with them."""
    if device.type != "cuda" or device.index is None or not torch.cuda.is_initialized():
        return
    current = torch.cuda.current_device()
    if device.index != current:
        raise KernelError(
            f"kernel {op}: triton launches on the current device, cuda:{current}, and the tensors are on {device}. "
            f"Call torch.cuda.set_device({device.index}) before; or use torch"
        )


def _require_package(requested: str, *, op: str, device: torch.device) -> None:
    package, install = PACKAGES[requested]
    missing = [] if device.type == "cuda" else [f"an NVIDIA GPU (the tensors are on {device.type})"]
    if importlib.util.find_spec(package) is None:
        missing.append(f"the package {package} ({install})")
    if missing:
        raise KernelError(f"kernel {op}: {requested} needs {' and '.join(missing)}; or use auto, triton or torch")


def triton_runs_on(device: torch.device) -> bool:
    """Whether a Triton kernel can run on `device`: a GPU, or any device under Triton's interpreter."""
    return TRITON_INSTALLED and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
