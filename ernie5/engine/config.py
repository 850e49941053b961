"""Settings of the engine that runs the optimizer steps."""

from __future__ import annotations

from ernie5.config.base import Config, config
from ernie5.config.field import field

OPERATORS = ("experts", "attention", "feed_forward")


@config
class EngineConfig(Config):
    """Which engine, in which precision, and what is not kept in the device's memory."""

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
    recompute: str = field(
        "none", doc="activations that backward computes again: none, those of some operators, or of whole layers",
        choices=("none", "selective", "full"), kind="performance",
    )
    recompute_parts: tuple[str, ...] = field(
        ("experts", "attention"), doc="operators that recompute: selective repeats, each from its input",
        choices=OPERATORS, kind="performance",
    )
    offload_activations: tuple[str, ...] = field(
        (), doc="parts whose saved activations wait in the host's memory; layers with recompute: full are their inputs",
        choices=("layers", *OPERATORS), kind="performance",
    )
    offload_optimizer: str = field(
        "none", doc="deepspeed, zero_stage 1 to 3: masters and moments in the host's memory, which steps them; nvme, "
        "zero_stage 3: in files under nvme_path, mapped into it",
        choices=("none", "cpu", "nvme"), kind="performance",
    )
    nvme_path: str | None = field(
        None, doc="folder on a drive of each host, for offload_optimizer: nvme; 12 bytes per parameter of its ranks",
        kind="performance", is_path=True,
    )
    device: str = field("auto", doc="auto: a GPU where there is one", choices=("auto", "cpu", "cuda"),
                        kind="performance")
    cpu_threads: int = field(0, doc="intra-op threads of torch on the CPU; 0 leaves torch's choice",
                             kind="performance")

    def validate(self) -> None:
        """Refuse settings that would do nothing."""
        if self.recompute == "selective" and not self.recompute_parts:
            self.fail("recompute_parts", "recompute: selective names no operator. Name some, or set recompute: none")
        if self.offload_optimizer == "nvme" and self.nvme_path is None:
            self.fail(
                "nvme_path",
                "offload_optimizer = nvme needs a folder for its files. Set engine.nvme_path to one on a local drive, "
                "or engine.offload_optimizer: cpu",
            )
        if self.offload_optimizer != "nvme" and self.nvme_path is not None:
            self.fail(
                "nvme_path",
                f"offload_optimizer = {self.offload_optimizer} writes nothing there. Leave engine.nvme_path out, or "
                "set engine.offload_optimizer: nvme",
            )
        if self.offload_optimizer == "nvme" and self.zero_stage in (1, 2):
            self.fail(
                "offload_optimizer",
                f"zero_stage {self.zero_stage} keeps views of its masters, which cannot move to files. Set "
                "zero_stage: 3, or offload_optimizer: cpu",
            )
        if self.offload_optimizer != "none" and (self.kind != "deepspeed" or self.zero_stage == 0):
            self.fail(
                "offload_optimizer",
                f"only DeepSpeed's ZeRO moves optimizer state, and the engine is {self.kind} with zero_stage "
                f"{self.zero_stage}. Set kind: deepspeed and zero_stage: 1, 2 or 3, or offload_optimizer: none",
            )
        if self.kind == "deepspeed" and self.recompute != "none" and self.zero_stage == 0 and self.precision == "bf16":
            self.fail(
                "recompute",
                "stage 0 runs each pass on bf16 copies of fp32 weights, which no longer exist when backward repeats a "
                "part. Set engine.zero_stage: 1",
            )

    def check_device(self, name: str) -> None:
        """Refuse what the device of a run ("cpu", "cuda") makes pointless."""
        if self.offload_activations and name == "cpu":
            self.fail(
                "offload_activations",
                f"the device of this run is {name}, and activations are in its memory already. Set "
                "engine.offload_activations: [] or run on a GPU",
            )

    def check_micro_batches(self, count: int) -> None:
        """Refuse so many micro-batches per rank where their gradients would be added up in bf16: ZeRO-1 adds them up
        where autograd leaves them. (Stages 2 and 3 have fp32 pieces of their own for that.)"""
        is_on_host = self.kind == "deepspeed" and self.offload_optimizer != "none"
        if is_on_host and self.precision == "bf16" and self.zero_stage == 1 and count > 1:
            self.fail(
                "offload_optimizer",
                f"with bf16 weights, zero_stage {self.zero_stage} would add up the gradients of {count} micro-batches "
                "in bf16. Set engine.zero_stage: 2 or 3, or a batch of one micro-batch per rank",
            )

    @property
    def recomputed_parts(self) -> tuple[str, ...]:
        """The parts of the model that run again in backward."""
        return {"none": (), "selective": self.recompute_parts, "full": ("layers",)}[self.recompute]
