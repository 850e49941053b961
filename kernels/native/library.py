"""The C++ library of the CPU kernels: compiled once per machine and source, kept in a cache, called through ctypes.

Its plain C interface needs neither torch's headers nor its build system: g++ takes seconds. Threads are OpenMP's, of
the very runtime that torch has loaded, so one pool serves both. Where there is no compiler, `native_library` says so
once and the caller uses PyTorch instead.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch

from ernie5.errors import KernelError

from ..checks import has_own_memory
from ..processor import multiplies_bf16

SOURCES = (
    "gemm.cpp", "tiles.cpp", "attention.cpp", "experts.cpp", "linear.cpp", "cross_entropy.cpp", "elementwise.cpp",
    "optimizer.cpp", "compact.cpp", "router.cpp",
)
HEADERS = ("vector.h", "tiles.h", "emulated_tiles.h", "gemm.h", "swiglu.h")
FLAGS = (
    "-std=c++17", "-O3", "-march=native", *(("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()),
    "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared", "-w",
)
MODES = {"": (), "1": (), "0": (), "no-tiles": (), "tiles-emulated": ("-DERNIE5_EMULATED_TILES",)}
"""What ERNIE5_NATIVE may be, and the compiler flags that it adds. `0`: no library; `no-tiles`: bf16 by AVX-512 though
the processor has matrix tiles (AMX); `tiles-emulated`: tiles in software, for tests (slow)."""
NATIVE_TYPES = (torch.float32, torch.bfloat16)
# what ernie5_start_tiles returns, negated, beyond every error number of the operating system
WRONG_SUMS, CRASHED = 4096, 8192
TRIALS = {WRONG_SUMS: "a product of small integers came out wrong", CRASHED: "a product ended the process trying it"}
COMPILER = "Install g++ (Debian: apt install g++), or set CXX to a compiler"
WRITABLE = "Set XDG_CACHE_HOME to a folder that can be written"
DIGEST_BYTES = hashlib.sha256().digest_size
COMPILER_SECONDS = 1800  # a dozen of one core; at a load of 30 on two cores 300 were not enough


@functools.cache
def native_library() -> ctypes.CDLL | None:
    """The loaded library; None, after one warning, where it cannot be built, and under ERNIE5_NATIVE=0 (see MODES).

    Raises KernelError for a value of ERNIE5_NATIVE that MODES has not.
    """
    mode = os.environ.get("ERNIE5_NATIVE", "")
    if mode not in MODES:
        raise KernelError(f"ERNIE5_NATIVE is {mode!r}. It may be unset or one of {', '.join(filter(None, MODES))}")
    if mode == "0":
        return None
    try:
        library = ctypes.CDLL(str(_built(_compiler(), (*FLAGS, *MODES[mode]))))
        library.ernie5_sum_squares.restype = ctypes.c_double
        library.ernie5_start_tiles.restype = ctypes.c_int64
        _start_tiles(library, wanted=mode != "no-tiles")
        return library
    except subprocess.CalledProcessError as error:
        return _without(error.stderr.strip() or f"{error.cmd[0]} ended with status {error.returncode}")
    except subprocess.SubprocessError as error:
        return _without(str(error))
    except OSError as error:
        return _without(str(error), way_out=WRITABLE if error.filename else COMPILER)


def _start_tiles(library: ctypes.CDLL, *, wanted: bool) -> None:
    refused = -library.ernie5_start_tiles(ctypes.c_int(wanted))
    if refused > 0:
        reason = TRIALS.get(refused) or os.strerror(refused)
        warnings.warn(
            f"the processor's matrix tiles (AMX) cannot be used ({reason}); bf16 runs by AVX-512. "
            "ERNIE5_NATIVE=no-tiles does not try",
            stacklevel=4,
        )


def _without(reason: str, *, way_out: str = COMPILER) -> None:
    is_slow = not multiplies_bf16(torch.device("cpu"))
    slow = " (on this processor some 60 times slower in bf16 than in fp32)" if is_slow else ""
    warnings.warn(
        f"the C++ kernels cannot be built ({reason.splitlines()[0]}); PyTorch's slower operators run instead{slow}. "
        f"{way_out}",
        stacklevel=3,
    )


def runs_native(*tensors: torch.Tensor) -> bool:
    """Whether the library can take these tensors: on the CPU, all fp32 or all bf16, with memory of their own, and the
    library is there."""
    first = tensors[0]
    return (
        first.device.type == "cpu"
        and first.dtype in NATIVE_TYPES
        and all(tensor.dtype == first.dtype and tensor.device == first.device for tensor in tensors)
        and not torch.compiler.is_compiling()
        and all(map(has_own_memory, tensors))
        and not any(tensor.is_neg() for tensor in tensors)  # a view whose memory holds the opposite numbers
        and native_library() is not None
    )


def has_tiles(tensor: torch.Tensor) -> bool:
    """Whether oneDNN multiplies this tensor with the processor's matrix tiles (AMX): the library's never ran on any."""
    return tensor.dtype == torch.bfloat16 and _cpu_has_tiles()


@functools.cache
def _cpu_has_tiles() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())


def is_narrow(tensor: torch.Tensor) -> ctypes.c_int:
    """The first argument of most entry points: 1 for bf16, 0 for fp32."""
    return ctypes.c_int(tensor.dtype == torch.bfloat16)


def sizes(*counts: int) -> list[ctypes.c_int64]:
    """Sizes as the entry points take them."""
    return [ctypes.c_int64(count) for count in counts]


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """Address of a contiguous tensor (null for None), which the caller must keep alive in a variable.

    Raises KernelError for a tensor without memory, at whose address C++ would end the process.
    """
    return ctypes.c_void_p(None if tensor is None else _address(tensor))


def _address(tensor: torch.Tensor) -> int:
    address = tensor.data_ptr()
    if not address and tensor.numel():
        raise KernelError(
            f"a C++ kernel was given a tensor of shape {tuple(tensor.shape)} that has no memory: it is traced only "
            "(FakeTensorMode) or wrapped (torch.func, DTensor), on the device meta, or its storage was freed"
        )
    return address


def int64s(numbers: Iterable[int]) -> ctypes.Array:
    """Numbers as an array of the library's."""
    numbers = list(numbers)
    return (ctypes.c_int64 * len(numbers))(*numbers)


def addresses(tensors: Iterable[torch.Tensor | None]) -> ctypes.Array:
    """Addresses of contiguous tensors (null for None), which the caller must keep alive."""
    found = [None if tensor is None else _address(tensor) for tensor in tensors]
    return (ctypes.c_void_p * len(found))(*found)


def threads() -> ctypes.c_int:
    """Threads that a kernel may use: torch's."""
    return ctypes.c_int(torch.get_num_threads())


def _compiler() -> tuple[str, ...]:
    named = shlex.split(os.environ.get("CXX", "g++")) or ["g++"]
    found = shutil.which(named[0])
    if found is None:
        raise FileNotFoundError(f"no compiler {named[0]}")
    return found, *named[1:]


def _built(compiler: tuple[str, ...], flags: tuple[str, ...]) -> Path:
    """Path of the compiled library; of processes that start together one compiles and the others wait for it."""
    folder = Path(__file__).parent
    texts = [(folder / name).read_bytes() for name in (*SOURCES, *HEADERS)]
    key = hashlib.sha256(b"\0".join([*texts, " ".join((*compiler, *flags)).encode(), _processor()])).hexdigest()[:20]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ernie5"
    library = cache / f"kernels-{key}.so"
    if not _is_whole(library):
        cache.mkdir(parents=True, exist_ok=True)
        with (cache / "lock").open("w") as lock, tempfile.TemporaryDirectory(dir=cache) as work:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_whole(library):
                made = Path(work) / "kernels.so"
                command = [*compiler, *flags, *(str(folder / name) for name in SOURCES), "-o", str(made)]
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILER_SECONDS)
                _seal(made)
                made.replace(library)
    return library


def _seal(library: Path) -> None:
    """Append the digest of a library to it, which the loader does not look at."""
    digest = hashlib.sha256(library.read_bytes()).digest()
    with library.open("ab") as file:
        file.write(digest)


def _is_whole(library: Path) -> bool:
    """Whether it is there as it was sealed: loading what a full disk or a crash cut short ends the process (SIGBUS)."""
    if not library.exists():
        return False
    data = library.read_bytes()
    return hashlib.sha256(data[:-DIGEST_BYTES]).digest() == data[-DIGEST_BYTES:]


def _processor() -> bytes:
    """What -march=native depends on: a home directory may be shared by unlike machines."""
    flags = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
        flags += next((line for line in lines if line.startswith("model name")), "")
    return f"{platform.machine()} {sys.platform} {flags}".encode()
