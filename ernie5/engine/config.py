"""Settings of the engine that runs the optimizer steps."""

from __future__ import annotations

from ernie5.config.base import Config, config
from ernie5.config.field import field


@config
class EngineConfig(Config):
    """Which engine, in which precision."""

    kind: str = field(
        "deepspeed", doc="local: plain PyTorch, one process; grid: plain PyTorch on any layout; deepspeed: ZeRO",
        choices=("local", "grid", "deepspeed"), kind="performance",
    )
    precision: str = field(
        "fp32", doc="dtype of weights and activations; bf16 keeps fp32 master weights and moments",
        choices=("fp32", "bf16"), kind="numerics",
    )
    zero_stage: int = field(
        1, doc="ZeRO: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters are sharded over dp",
        choices=(0, 1, 2, 3), kind="performance",
    )
    device: str = field("auto", doc="auto: a GPU where there is one", choices=("auto", "cpu", "cuda"),
                        kind="performance")
    cpu_threads: int = field(0, doc="intra-op threads of torch on the CPU; 0 leaves torch's choice",
                             kind="performance")
