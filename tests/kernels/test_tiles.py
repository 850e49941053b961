"""Matrix tiles (AMX) without a processor that has them: emulated in software, and as real machine code under a trap.

`test_native.py` holds the operators by emulated tiles against the references. Here the real instructions run: where the
processor has none, `tile_trap.cpp` takes the illegal-instruction signal and does each in software.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ernie5.errors import KernelError
from ernie5_kernels.linear import linear
from ernie5_kernels.native.library import CRASHED, FLAGS, WRONG_SUMS, native_library

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "kernels" / "native"
COMPILER = os.environ.get("CXX", "g++")
TILES = ("-mamx-tile", "-mamx-bf16")
CPU_FLAGS = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
HAS_TILES = "amx_bf16" in CPU_FLAGS
needs_avx512 = pytest.mark.skipif("avx512_bf16" not in CPU_FLAGS, reason="this processor has no AVX-512 with bf16")
TRAPPED = """
import ctypes, itertools, sys, numpy
real, emulated = (ctypes.CDLL(path) for path in sys.argv[1:3])
assert real.ernie5_start_tiles(1) == emulated.ernie5_start_tiles(1) == 1
numbers = numpy.random.default_rng(0)
def bf16(*shape, kind):
    if kind == "normal":
        return (numbers.standard_normal(shape, dtype=numpy.float32).view(numpy.uint32) >> 16).astype(numpy.uint16)
    bits = numbers.integers(0, 1 << 16, shape, dtype=numpy.uint16)  # NaN, infinities and denormals among them
    # the rest keep sign and fraction: products about the least normal number, so that sums cross it and are flushed
    return bits if kind == "any" else bits & 0x807f | numbers.integers(51, 68, shape, dtype=numpy.uint16) << 7
def run(library, operation, *arrays, out, sizes):
    pointers = (ctypes.c_void_p(a.ctypes.data) for a in (*arrays, out))
    getattr(library, operation)(1, *pointers, *map(ctypes.c_int64, sizes), *([1, 2] if "product" in operation else [2]))
    return numpy.where((out & 0x7fff) > 0x7f80, 0x7fc0, out)  # the manual does not say which NaN
for kind, (rows, summed, columns) in itertools.product(
    ("normal", "any", "least"),
    ((1, 2, 1), (16, 32, 32), (17, 33, 65), (31, 30, 40), (97, 64, 96), (300, 7, 100), (530, 3, 33)),
):
    x, weight, upstream = (bf16(*shape, kind=kind) for shape in ((rows, summed), (columns, summed), (rows, columns)))
    for operation, arrays, shape, sizes in (
        ("ernie5_product", (x, weight), (rows, columns), (rows, summed, columns)),
        ("ernie5_outer", (upstream, x), (columns, summed), (columns, summed, rows)),
    ):
        one, other = (run(library, operation, *arrays, out=numpy.full(shape, 0x7fc0, numpy.uint16), sizes=sizes)
                      for library in (real, emulated))
        assert (one == other).all(), (operation, kind, rows, summed, columns)
trapped = getattr(ctypes.CDLL(None), "trapped_tile_instructions")
trapped.restype = ctypes.c_long
print(trapped())
"""


def _compile(*arguments: str) -> None:
    subprocess.run([COMPILER, *arguments], check=True, capture_output=True, text=True, timeout=600)


def _knows(*flags: str) -> bool:
    if native_library() is None:
        return False
    command = [COMPILER, *flags, "-x", "c++", "-c", "-", "-o", os.devnull]
    done = subprocess.run(command, input='void f() { asm("tilerelease"); }', capture_output=True, text=True)
    return done.returncode == 0


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of the products alone, compiled to real tile instructions whatever this processor has."""
    if not _knows(*TILES):
        pytest.skip(f"{COMPILER} does not know {' '.join(TILES)}")
    made = tmp_path_factory.mktemp("tiles") / "products.so"
    sources = (str(SOURCES / name) for name in ("gemm.cpp", "tiles.cpp", "linear.cpp"))
    _compile(*FLAGS, *TILES, *sources, "-o", str(made))
    return made


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """The whole library with tiles in software."""
    monkeypatch.setenv("ERNIE5_NATIVE", "tiles-emulated")
    native_library.cache_clear()
    library = native_library()
    if library is None:
        pytest.skip("no C++ compiler on this machine")
    yield library
    native_library.cache_clear()


@pytest.fixture
def trap(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """tile_trap.cpp, to be loaded by LD_PRELOAD; a parameter is one more flag."""
    made = tmp_path / "trap.so"
    _compile("-std=c++17", "-O2", "-march=native", "-fPIC", "-shared", "-ftls-model=initial-exec",
             *([request.param] if hasattr(request, "param") else []), str(HERE / "tile_trap.cpp"), "-o", str(made))
    return made


@needs_avx512
@pytest.mark.skipif(HAS_TILES, reason="this processor's own tiles would run")
@pytest.mark.parametrize(
    "trap,failure", [("-DTILES_FORGET_A_SUM", WRONG_SUMS), ("-DTILES_CRASH", CRASHED)], indirect=["trap"]
)
def test_tiles_that_add_wrong_or_crash_are_not_used(products: Path, trap: Path, failure: int) -> None:
    script = (
        "import ctypes, sys\nlibrary = ctypes.CDLL(sys.argv[1])\n"
        "library.ernie5_start_tiles.restype = ctypes.c_int64\nprint(library.ernie5_start_tiles(1))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(products)], env={**os.environ, "LD_PRELOAD": str(trap)},
        capture_output=True, text=True, timeout=60,
    )
    assert done.stdout.split() == [str(-failure)], done.stderr


@needs_avx512
@pytest.mark.slow
def test_every_operator_passes_by_real_instructions(products: Path, trap: Path, tmp_path: Path) -> None:
    """test_native.py as a whole, its library compiled to real tile instructions."""
    del products  # skips where the compiler does not know them
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nexec {COMPILER} "$@" {" ".join(TILES)}\n')
    compiler.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:faulthandler", "-q", "-c", "tests/pytest.ini", "--rootdir=.",
         "tests/kernels/test_native.py"],
        cwd=HERE.parents[1], capture_output=True, text=True, timeout=1800,
        env={**os.environ, "CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path), "LD_PRELOAD": str(trap)},
    )
    assert done.returncode == 0, done.stdout
    assert ("tile instructions trapped" in done.stderr) != HAS_TILES


@needs_avx512
def test_real_instructions_give_the_bits_of_emulated_ones(products: Path, emulated: ctypes.CDLL, trap: Path) -> None:
    """Products and outer products of odd sizes on two threads; on a processor with tiles the hardware is compared."""
    done = subprocess.run(
        [sys.executable, "-c", TRAPPED, str(products), emulated._name],
        env={**os.environ, "LD_PRELOAD": str(trap)}, capture_output=True, text=True, timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (int(done.stdout) == 0) == HAS_TILES


@needs_avx512
@pytest.mark.skipif(HAS_TILES, reason="this processor has tiles, so Linux gives them")
def test_without_permission_the_same_code_runs_by_avx512(products: Path) -> None:
    library = ctypes.CDLL(str(products))
    library.ernie5_start_tiles.restype = ctypes.c_int64
    assert library.ernie5_start_tiles(1) < 0, "Linux refuses what the processor has not"
    x, weight = (torch.randn(n, 40, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (50, 70))
    out = torch.empty(50, 70, dtype=torch.bfloat16)
    library.ernie5_product(
        1, *(ctypes.c_void_p(t.data_ptr()) for t in (x, weight, out)), *map(ctypes.c_int64, (50, 40, 70)), 1, 1
    )
    assert torch.equal(out, linear(x, weight=weight, backend="native"))


@needs_avx512
def test_emulated_tiles_run_and_can_be_switched_off(emulated: ctypes.CDLL) -> None:
    assert emulated.ernie5_start_tiles(0) == 0
    assert emulated.ernie5_start_tiles(1) == 1


@needs_avx512
@pytest.mark.parametrize("by_tiles", (True, False), ids=("tiles", "avx512"))
def test_a_denormal_sum_is_flushed_though_it_would_round_up_to_a_normal_number(
    emulated: ctypes.CDLL, by_tiles: bool
) -> None:
    """2^-126 - 2^-150 is as far from 2^-126 as from the next denormal, but has 24 bits: tiny. VDPBF16PS agrees."""
    assert emulated.ernie5_start_tiles(by_tiles) == by_tiles
    x = torch.tensor([[2.0**-63, 0, 2.0**-75, 0]]).bfloat16()
    weight = torch.tensor([[2.0**-63, 0, -(2.0**-75), 0], [2.0**-63, 0, -(2.0**-76), 0]]).bfloat16()
    assert linear(x, weight=weight, backend="native").tolist() == [[0, 2.0**-126]]


def test_an_unknown_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERNIE5_NATIVE", "tiles")
    native_library.cache_clear()
    with pytest.raises(KernelError, match="no-tiles, tiles-emulated"):
        native_library()
    native_library.cache_clear()


def _inner_loops(assembly: str) -> list[list[str]]:
    """Bodies of the innermost loops that multiply tiles: the instructions, without labels and directives."""
    lines = [line.strip() for line in assembly.splitlines()]
    places = {line[:-1]: number for number, line in enumerate(lines) if re.fullmatch(r"\.L\d+:", line)}
    loops = []
    for number, line in enumerate(lines):
        jump = re.fullmatch(r"j\w+\s+(\.L\d+)", line)
        if jump is None or places.get(jump[1], number) >= number:
            continue
        body = [text for text in lines[places[jump[1]] : number + 1] if text and not text.startswith((".", "#"))]
        names = {text.split()[0] for text in body}
        if "tdpbf16ps" in names and "tilestored" not in names:
            loops.append(body)
    return loops


def test_inner_loops_for_sapphire_rapids_hold_little_but_products() -> None:
    """Per four products of tiles: four loads (five where one tile of rows meets four of columns), few others."""
    target = "-march=sapphirerapids"
    if not _knows(target):
        pytest.skip(f"{COMPILER} does not know {target}")
    flags = [target if flag == "-march=native" else flag for flag in FLAGS if flag != "-shared"]
    done = subprocess.run(
        [COMPILER, *flags, "-S", str(SOURCES / "tiles.cpp"), "-o", "-"], check=True, capture_output=True, text=True
    )
    loops = _inner_loops(done.stdout)
    shapes = set()
    for body in loops:
        names = [text.split()[0] for text in body]
        products, loads = names.count("tdpbf16ps"), names.count("tileloadd")
        shapes.add((products, loads))
        assert len(names) - products - loads <= 8, body
    assert shapes == {(4, 4), (4, 5), (2, 3)}, "two by two, one by four, one by two tiles of sums"
