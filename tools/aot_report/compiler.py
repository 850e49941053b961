"""Compile one kernel for one chip with Triton's compiler alone, and read what the machine code says of itself."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# machine instructions of the tensor cores, most recent first, and the name under which PTX documents them
TENSOR_INSTRUCTIONS = {
    "UTC[A-Z]*MMA": "tcgen05", "[HQI]GMMA": "wgmma", "[HQI]MMA": "mma",
}
SPILLS = re.compile(r"\b(STL|LDL)\b")


@dataclasses.dataclass(frozen=True)
class Source:
    """A kernel and how it is specialised: argument types, constants, arguments that 16 divides, warps, stages, and the
    compiler's other options."""

    kernel: JITFunction
    types: Mapping[str, str]
    constants: Mapping[str, object]
    divisible: tuple[str, ...]
    warps: int
    stages: int
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What stands in the machine code. spills: instructions that move registers to local memory or back."""

    registers: int
    spills: int
    stack_bytes: int
    shared_bytes: int
    warps: int
    tensor_instruction: str
    asynchronous_copies: str


def build(source: Source, *, capability: int) -> CompiledKernel:
    """Compile to a cubin, by way of PTX. Raises what Triton raises where a chip cannot run the kernel."""
    types = {name: source.types.get(name, "constexpr") for name in source.kernel.arg_names}
    attributes = {
        (source.kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types.items()
        if kind.startswith("*") or name in source.divisible
    }
    return triton.compile(
        ASTSource(source.kernel, types, dict(source.constants), attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": source.warps, "num_stages": source.stages, **source.options},
    )


def compile_for(source: Source, *, capability: int) -> Compiled:
    """Compile and disassemble."""
    built = build(source, capability=capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        machine = _run("cuobjdump", "-sass", file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    used = [name for pattern, name in TENSOR_INSTRUCTIONS.items() if re.search(rf"\b{pattern}\b", machine)]
    copies = [name for code, name in (("UTMALDG", "TMA"), ("LDGSTS", "cp.async")) if re.search(rf"\b{code}\b", machine)]
    return Compiled(
        int(registers), len(SPILLS.findall(machine)), int(stack), built.metadata.shared, built.metadata.num_warps,
        used[0] if used else "", "+".join(copies),
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout
