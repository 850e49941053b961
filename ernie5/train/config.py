"""The root of a training configuration: what a YAML of `ernie5 train` may say. No torch."""

from __future__ import annotations

import math

from ernie5.checkpoint.config import CheckpointConfig
from ernie5.config.base import Config, config
from ernie5.config.field import REQUIRED, field, non_negative, positive
from ernie5.data.config import DataConfig, RampStageConfig
from ernie5.engine.config import EngineConfig
from ernie5.errors import LayoutError
from ernie5.evaluate.config import EvaluateConfig
from ernie5.generate.config import GenerateConfig
from ernie5.model.config import ModelConfig
from ernie5.objectives.config import ObjectivesConfig
from ernie5.observe.config import ObserveConfig
from ernie5.optim.config import OptimConfig
from ernie5.parallel.config import ParallelConfig
from ernie5.tokenizers.config import TokenizersConfig

MODALITY_OF_TASK = (
    ("image_to_text", "image"),
    ("text_to_image", "image"),
    ("video_to_text", "video"),
    ("text_to_video", "video"),
    ("audio_to_text", "audio"),
    ("text_to_audio", "audio"),
    ("page", "image"),
)


@config
class TrainConfig(Config):
    """Length, place and rhythm of a run."""

    steps: int = field(REQUIRED, doc="optimizer steps of the whole run", unit="steps", check=positive, kind="numerics")
    run_dir: str = field(
        REQUIRED, doc="directory of the run: config, metrics, checkpoints, samples, report", kind="logging",
        is_path=True,
    )
    seed: int = field(0, doc="seed of initialisation, data order and every draw", check=non_negative, kind="numerics")
    init_from: str | None = field(
        None, doc="checkpoint whose weights a new run starts from, with a new optimizer, at step 0 and the start of "
        "the data; a run that has a checkpoint of its own goes on from that", kind="numerics", is_path=True,
    )
    eval_every_steps: int = field(
        0, doc="distance between passes over the fixed validation batches; 0: none", unit="steps",
        check=non_negative, kind="logging",
    )
    eval_batches: int = field(
        2, doc="validation: global steps of data per pass, the same ones every time", unit="steps", check=positive,
        kind="logging",
    )
    sample_every_steps: int = field(
        0, doc="distance between generated samples; 0: none", unit="steps", check=non_negative, kind="logging"
    )
    routing_every_steps: int = field(
        50, doc="distance between snapshots of expert loads by token kind; 0: none", unit="steps",
        check=non_negative, kind="logging",
    )
    spike_retries: int = field(
        3, doc="steps that may be skipped in a row, and returns to a checkpoint without a quiet window in between, "
        "before the run ends (exit 4)", check=non_negative, kind="numerics",
    )
    hang_seconds: float = field(
        1800.0, doc="longest time without the end of a step, with its validation, saving and samples; then every rank "
        "writes its stacks to RUN_DIR/errors and the run ends (exit 5); 0: wait for ever", unit="s",
        check=non_negative, kind="logging",
    )
    peer_seconds: float = field(
        120.0, doc="longest time that the machine of another rank may be unreachable before every rank ends (exit 5); "
        "0: only hang_seconds counts", unit="s", check=non_negative, kind="logging",
    )
    preflight: bool = field(
        False, doc="check hosts, storage, clocks and network before the first step, as launch/preflight.py does",
        kind="logging",
    )


@config
class BatchConfig(Config):
    """Rows of one optimizer step."""

    global_sequences: int = field(
        8, doc="rows that one optimizer step sees, whatever the layout", unit="rows", check=positive, kind="numerics"
    )
    ramp: tuple[RampStageConfig, ...] = field(
        (), doc="stages of smaller steps before that size, [{steps: S, global_sequences: R}, ...] in order; counted in "
        "steps of the data, which a return to a checkpoint does not repeat", kind="numerics",
    )
    micro_sequences: int = field(
        1, doc="rows of one forward pass on one rank", unit="rows", check=positive, kind="performance"
    )

    def validate(self) -> None:
        """Every stage of the ramp is smaller than the one behind it."""
        sizes = [stage.global_sequences for stage in self.ramp] + [self.global_sequences]
        for stage, larger in zip(self.ramp, sizes[1:], strict=True):
            if stage.global_sequences >= larger:
                stage.fail(
                    "global_sequences",
                    f"the steps behind this stage have {larger} rows. A ramp grows from stage to stage up to "
                    f"batch.global_sequences = {self.global_sequences}. Lower this value or leave the stage out",
                )


@config
class RootConfig(Config):
    """Everything that `ernie5 train` reads; each section is documented in its own folder."""

    train: TrainConfig = field(REQUIRED, doc="length, place and rhythm of the run")
    data: DataConfig = field(DataConfig, doc="shards, mixture, packing")
    batch: BatchConfig = field(BatchConfig, doc="rows per step and per forward pass")
    model: ModelConfig = field(ModelConfig, doc="architecture")
    tokenizers: TokenizersConfig = field(TokenizersConfig, doc="tokenizers of text, pictures and sound")
    objectives: ObjectivesConfig = field(ObjectivesConfig, doc="losses and their weights")
    optim: OptimConfig = field(OptimConfig, doc="optimizer and learning rate")
    engine: EngineConfig = field(EngineConfig, doc="what runs the steps, in which precision")
    parallel: ParallelConfig = field(ParallelConfig, doc="parallel degrees")
    checkpoint: CheckpointConfig = field(CheckpointConfig, doc="when and where checkpoints are written")
    observe: ObserveConfig = field(ObserveConfig, doc="metrics, sinks, alarms")
    evaluate: EvaluateConfig = field(EvaluateConfig, doc="figures of `ernie5 evaluate`")
    generate: GenerateConfig = field(GenerateConfig, doc="defaults of `ernie5 generate`")

    def validate(self) -> None:
        """Check the rules that cross sections; raises LayoutError."""
        for axis in ("dp", "ep", "etp", "tp", "cp", "pp"):
            if self.engine.kind == "local" and vars(self.parallel)[axis] not in (None, 1):
                self.fail(
                    f"parallel.{axis}",
                    f"the local engine is one process. Set engine.kind: deepspeed (or grid) or parallel.{axis}: 1",
                    error=LayoutError,
                )
        if self.engine.kind == "deepspeed":
            self.parallel.check_zero(self.engine.zero_stage)
        elif self.engine.zero_stage > EngineConfig.zero_stage:
            self.fail(
                "engine.zero_stage",
                f"the {self.engine.kind} engine keeps whole optimizer states, gradients and parameters and would "
                "ignore it. Set engine.kind: deepspeed or leave engine.zero_stage out",
            )
        self.optim.check_engine(kind=self.engine.kind, precision=self.engine.precision)
        self.parallel.check_model(self.model)
        self.parallel.check_rows(self.data.sequence_tokens, ahead=self.model.mtp.depth)
        if self.model.has_audio and self.model.audio.levels != self.tokenizers.audio_levels:
            self.fail(
                "tokenizers.audio_levels",
                f"differs from model.audio.levels = {self.model.audio.levels}. The model predicts exactly the levels "
                "that the tokenizer gives it. Set both to the same number",
            )
        unfit = {task: modality for task, modality in MODALITY_OF_TASK
                 if vars(self.data.mixture)[task] and modality not in self.model.modalities}
        if unfit:
            task, modality = next(iter(unfit.items()))
            self.fail(
                f"data.mixture.{task}",
                f"needs {modality}, and model.modalities = {', '.join(self.model.modalities)}. The model would see "
                f"empty placeholders. Set under data.mixture: {', '.join(f'{name}: 0' for name in unfit)}; or add "
                f"{' and '.join(dict.fromkeys(unfit.values()))} to model.modalities",
            )
        self.check_layout(self.parallel.dp or 1)
        self._refuse_unavailable()
        if self.checkpoint.format == "deepspeed":
            self._check_native_format()

    def _check_native_format(self) -> None:
        """Refuse DeepSpeed's own checkpoints where they lose something (tried with 0.19.8)."""
        reason, experts = None, self.parallel.ep * self.parallel.etp
        if self.engine.kind != "deepspeed":
            reason = f"the {self.engine.kind} engine has no such files. Set engine.kind: deepspeed"
        elif self.parallel.tp > 1:
            reason = (
                f"with tp = {self.parallel.tp} DeepSpeed's ds_to_universal.py joins every weight of the tensor ranks "
                "along its first axis, even what all of them hold whole, and zero_to_fp32.py stops. Set parallel.tp: 1"
            )
        elif experts > 1:
            reason = (
                f"with ep x etp = {experts} DeepSpeed saves the experts of one rank and loses all others. Set "
                "parallel.ep: 1 and parallel.etp: 1"
            )
        elif self.parallel.pp > 1:
            reason = (
                f"with pp = {self.parallel.pp} every stage writes files of its own weights, and DeepSpeed's "
                "zero_to_fp32.py stops at any but the first's. Set parallel.pp: 1"
            )
        elif self.engine.zero_stage > 1:
            reason = (
                f"in stage {self.engine.zero_stage} DeepSpeed sees weights without their names, and reads stage 3 back "
                "with one step counter and one weight decay for all groups of parameters. Set engine.zero_stage: 1"
            )
        if reason is not None:
            self.checkpoint.fail("format", f"{reason}, or checkpoint.format: ernie5, which holds everything")

    def _refuse_unavailable(self) -> None:
        """Refuse settings that this version would have to ignore."""
        if self.objectives.orthogonality_weight and (self.engine.kind, self.engine.precision) != ("local", "fp32"):
            self.fail(
                "objectives.orthogonality_weight",
                "the decoupled router step needs whole fp32 weights. Set engine.kind: local and engine.precision: fp32",
            )
        if self.parallel.dispatcher == "deepep" and self.engine.precision != "bf16":
            self.fail(
                "parallel.dispatcher",
                "it carries bf16 rows. Set engine.precision: bf16, or parallel.dispatcher: alltoall",
            )
        balance, weights = self.model.moe.balance, self.objectives
        for name, on, weight in (
            ("switch", balance.switch_loss, weights.switch_weight),
            ("sequence", balance.sequence_loss, weights.sequence_weight),
            ("z", balance.z_loss, weights.z_weight),
        ):
            if weight and not on:
                self.fail(
                    f"objectives.{name}_weight", f"this loss is not computed. Set model.moe.balance.{name}_loss: true"
                )

    def check_layout(self, dp: int) -> None:
        """Check that rows and data streams divide over `dp` ranks; raises LayoutError."""
        rows = dp * self.batch.micro_sequences
        if self.batch.global_sequences % rows:
            self.fail(
                "batch.global_sequences",
                f"is not a multiple of dp x batch.micro_sequences = {dp} x {self.batch.micro_sequences}. Every rank "
                "runs the same number of micro-batches. Change batch.micro_sequences or the number of processes",
                error=LayoutError,
            )
        if self.batch.global_sequences % self.data.streams:
            self.fail(
                "batch.global_sequences",
                f"is not a multiple of data.streams = {self.data.streams}. Every step takes the same number of rows "
                "from every stream. Change one of the two",
                error=LayoutError,
            )
        if self.data.streams % dp:
            self.fail(
                "data.streams",
                f"is not a multiple of dp = {dp}. Each rank owns whole streams, so that the data do not depend on the "
                "number of ranks. Raise data.streams or change the number of processes",
                error=LayoutError,
            )
        self._check_ramp(dp)

    def _check_ramp(self, dp: int) -> None:
        """Refuse stages that do not divide as `batch.global_sequences` must."""
        unit = math.lcm(self.data.streams, dp * self.batch.micro_sequences)
        for stage in self.batch.ramp:
            if stage.global_sequences % unit:
                steps = max(1, round(stage.global_sequences / unit))
                nearest = min(steps * unit, self.batch.global_sequences - unit)
                way = f"Nearest that works: {nearest}" if nearest else "No smaller step works: leave out batch.ramp"
                stage.fail(
                    "global_sequences",
                    f"is not a multiple of {unit}, the smallest number that data.streams = {self.data.streams} and "
                    f"dp x batch.micro_sequences = {dp} x {self.batch.micro_sequences} both divide. {way}",
                    error=LayoutError,
                )

    def derive_dp(self, world_size: int) -> int:
        """Return the data-parallel degree of `world_size` processes; raises ConfigError where the engine is
        one process, LayoutError where the layout is illegal."""
        if self.engine.kind == "local" and world_size > 1:
            self.fail("engine.kind", f"{world_size} processes were started, and the local engine is one. Use deepspeed")
        dims = self.parallel.derive_dims(world_size, kv_heads=self.model.kv_heads)
        self.check_layout(dims.dp)
        self.engine.check_micro_batches(self.batch.global_sequences // (dims.dp * self.batch.micro_sequences))
        return dims.dp
