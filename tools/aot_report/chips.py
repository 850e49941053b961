"""The three targets: limits of a processor and peak rates, from NVIDIA's data sheets and CUDA's programming guide."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """Rates in operations and bytes per second, dense; shared memory in bytes per block and per processor."""

    name: str
    capability: int
    processors: int
    shared_block: int
    shared_processor: int
    bf16_rate: float
    fp8_rate: float
    fp32_rate: float
    bandwidth: float
    tensor_instruction: str
    registers: int = 65536
    threads: int = 2048
    blocks: int = 32

    def rate_of(self, arithmetic: str) -> float:
        """Peak of "bf16" or "fp8" tensor cores, or of "fp32" lanes."""
        return {"bf16": self.bf16_rate, "fp8": self.fp8_rate, "fp32": self.fp32_rate}[arithmetic]

    def resident(self, *, registers: int, shared: int, warps: int) -> int:
        """Programs that a processor holds, by registers (given in units of 8), shared memory and threads."""
        per_warp = -(-registers * 32 // 256) * 256
        by_registers = self.registers // (per_warp * warps)
        by_shared = self.shared_processor // (shared + 1024)  # 1 KiB of each block is the system's
        return min(by_registers, by_shared, self.threads // (32 * warps), self.blocks)

    def occupancy(self, *, registers: int, shared: int, warps: int) -> float:
        """Resident warps over the processor's most."""
        return self.resident(registers=registers, shared=shared, warps=warps) * warps * 32 / self.threads


CHIPS = (
    Chip("A100", 80, 108, 163 << 10, 164 << 10, 312e12, 0.0, 19.5e12, 2.04e12, "mma"),
    Chip("H100", 90, 132, 227 << 10, 228 << 10, 989e12, 1979e12, 67e12, 3.35e12, "wgmma"),
    Chip("B200", 100, 148, 227 << 10, 228 << 10, 2250e12, 4500e12, 75e12, 8.0e12, "tcgen05"),
)
