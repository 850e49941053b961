"""From a configuration to a run that is ready to step: one line per folder, in the order of the floors."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch

from ernie5.checkpoint.load import LoadedRun, check_tokenizers, own_tokenizers
from ernie5.checkpoint.origin import open_origin, start_from
from ernie5.checkpoint.places import folder_of_run
from ernie5.checkpoint.save import failures_explained, point_latest
from ernie5.config.load import config_to_yaml
from ernie5.config.registry import resolve
from ernie5.data.lengths import shortest_documents
from ernie5.data.loader import Loader, StepShape, build_loader
from ernie5.data.patches import SIDE
from ernie5.engine.interface import Engine, StepSettings
from ernie5.engine.recompute import install_recompute
from ernie5.errors import ConfigError, DataError, EnvironmentFault
from ernie5.generate.interleave import Generation
from ernie5.generate.widths import misfits
from ernie5.model.backbone import UnifiedModel
from ernie5.model.config import flops_per_token
from ernie5.model.init import MarkedValues
from ernie5.objectives.mix import uniform_magnitudes
from ernie5.observe.log import get_log
from ernie5.observe.metrics import Figures, Metrics
from ernie5.observe.sinks import check_sinks, keep_until_step, open_sinks
from ernie5.observe.throughput import matrix_rate
from ernie5.parallel.deepep import require_deepep
from ernie5.records import Batch
from ernie5.tokenizers.bundle import TokenizerBundle, load_tokenizers
from ernie5.tokenizers.kept import KEPT_FOLDER, keep_tokenizers
from ernie5.train.config import RootConfig
from ernie5.train.hook import Hook
from ernie5.train.hooks import FiguresBoard, RecordHook, RoutingHook, StepFiguresHook, ValidationHook
from ernie5.train.replica import ReplicaHook, agree, open_newest, replica_folder
from ernie5.train.rollback import AlarmHook, Rollback
from ernie5.train.run_dir import clear_run
from ernie5.train.samples import SamplesHook
from ernie5.train.saving import CheckpointHook, CheckpointIdentity, Snapshot
from ernie5.train.state import Progression
from ernie5_kernels.native.memory import keep_freed_memory

ROUTING_FILE = "routing.jsonl"


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything the loop needs, and the checkpoint folder for messages; rewind: the way back after an alarm."""

    config: RootConfig
    run_dir: Path
    checkpoints: Path
    engine: Engine
    loader: Loader
    progression: Progression
    hooks: tuple[Hook, ...]
    rewind: Rollback


def build_run(config: RootConfig, *, run_dir: Path, resume_from: Path | None, fresh: bool) -> Run:
    """Load tokenizers and data, build model and engine, restore `resume_from`, open sinks, list hooks.

    fresh: clear what an earlier run left in `run_dir`, once nothing is left that could refuse this one on any rank.
    Raises ConfigError, DataError, TokenizerError, CheckpointError or LayoutError.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    dp = config.derive_dp(world_size)
    device = choose_device(config.engine.device)
    config.engine.check_device(device.type)
    if config.parallel.dispatcher == "deepep":
        require_deepep()
    keep_freed_memory()
    if config.engine.cpu_threads:
        torch.set_num_threads(config.engine.cpu_threads)
    loaded = open_newest(resume_from)
    first = config.train.init_from if resume_from is None else None  # the same on all ranks, whatever memory holds
    origin = open_origin(first) if first is not None and loaded is None else None
    places, known = config.tokenizers, loaded or origin
    if known is not None:
        places = own_tokenizers(
            places, directory=known.directory, identities=known.manifest.tokenizers, first=[run_dir / KEPT_FOLDER]
        )
    tokenizers = load_tokenizers(places)
    check_widths(config, tokenizers=tokenizers)
    identities = dataclasses.asdict(tokenizers.identities)
    if known is not None:
        check_tokenizers(known.manifest, identities=identities)
    model = UnifiedModel.outline(config.model, seed=config.train.seed)
    if resume_from is not None or first is not None:  # read over all parameters below, or the start ends in an error
        model.initial = MarkedValues(model.initial)
    if config.engine.kind == "local":
        model.draw()
    engine = build_engine(config, model=model, device=device, dp=dp, run_dir=run_dir)
    if engine.is_main:
        get_log().info("%s", describe_start(config, world_size=world_size, device=device))
    loader = open_loader(config, tokenizers=tokenizers, split="train", engine=engine)
    progression = Progression()
    loaded = agree(loaded, source=resume_from, engine=engine)
    if loaded is not None:
        restore(loaded, engine=engine, loader=loader, progression=progression)
        if config.train.init_from is not None and engine.is_main:
            get_log().warning(
                "train.init_from = %s is not used: the run goes on from its own %s. --fresh starts over from there",
                config.train.init_from, loaded.directory,
            )
    elif first is not None:
        start_from(origin or open_origin(first), config=config, engine=engine)
    validation = validation_batches(config, tokenizers=tokenizers, engine=engine)
    check_sinks(config.observe)
    checkpoints = folder_of_run(run_dir, setting=config.checkpoint.dir)
    if fresh:
        engine.total(0.0)  # until all ranks are here
    if fresh and engine.is_main:
        clear_run(run_dir, folder=checkpoints)
    if engine.is_main:
        keep_tokenizers(places, folder=run_dir / KEPT_FOLDER)
    if resume_from is not None and engine.is_main:
        with failures_explained(checkpoints, temporary=None):
            point_latest(checkpoints, target=resume_from)  # before the hooks cut the metrics back to its step
    identity = CheckpointIdentity(config_to_yaml(config), config.engine.precision, identities)
    hooks = build_hooks(
        config,
        run_dir=run_dir,
        engine=engine,
        loader=loader,
        validation=validation,
        progression=progression,
        identity=identity,
    )
    hooks += sample_hooks(config, run_dir=run_dir, engine=engine, tokenizers=tokenizers)
    rewind = build_rollback(config, folder=checkpoints, engine=engine, progression=progression, hooks=hooks)
    return Run(config, run_dir, checkpoints, engine, loader, progression, hooks, rewind)


def describe_start(config: RootConfig, *, world_size: int, device: torch.device) -> str:
    """One line for the log: how many processes, how they are laid out (`dims`), which engine, and what a step is."""
    dims = config.parallel.derive_dims(world_size, kv_heads=config.model.kv_heads)
    stage = f" with zero_stage {config.engine.zero_stage}" if config.engine.kind == "deepspeed" else ""
    ranks = "1 process" if world_size == 1 else f"{world_size} processes, {dims.describe()}"
    batch = config.batch
    count = batch.global_sequences // (dims.dp * batch.micro_sequences)
    ramp = " (after batch.ramp)" if batch.ramp else ""
    return (
        f"{ranks}: {config.engine.kind} engine{stage}, {config.engine.precision} on {device.type}; a step{ramp} is "
        f"{batch.global_sequences} rows = dp {dims.dp} x micro-batches {count} x rows {batch.micro_sequences}"
    )


def build_engine(
    config: RootConfig, *, model: UnifiedModel, device: torch.device, dp: int, run_dir: Path
) -> Engine:
    """The engine that the configuration names, around `model`."""
    speed = config.model.moe.balance.speed
    settings = StepSettings(
        objectives=config.objectives,
        clip_norm=config.optim.clip_norm,
        balance_speed=max(1e-4, 0.3 / config.train.steps) if speed is None else speed,
        magnitudes=uniform_magnitudes(vocab_size=config.model.vocab_size, audio_codes=config.model.audio.codes),
    )
    engine_class = resolve("engine", name=config.engine.kind)
    if config.engine.kind == "local":
        install_recompute(model, engine=config.engine, device=device)
        return engine_class(
            model, optim=config.optim, settings=settings, precision=config.engine.precision, device=device
        )
    if config.engine.kind == "grid":
        return engine_class(
            model,
            engine=config.engine,
            parallel=config.parallel,
            optim=config.optim,
            settings=settings,
            device=device,
        )
    return engine_class(
        model,
        engine=config.engine,
        parallel=config.parallel,
        optim=config.optim,
        settings=settings,
        device=device,
        micro_batches=config.batch.global_sequences // (dp * config.batch.micro_sequences),
        micro_sequences=config.batch.micro_sequences,
        log_path=run_dir / "deepspeed.log",
    )


def build_hooks(
    config: RootConfig,
    *,
    run_dir: Path,
    engine: Engine,
    loader: Loader,
    validation: tuple[Batch, ...],
    progression: Progression,
    identity: CheckpointIdentity,
) -> tuple[Hook, ...]:
    """What happens after each step, in this order: figures, validation, routing, writing, alarms, checkpoint, replica;
    samples (`sample_hooks`) come last."""
    last_step = progression.step
    routing = RoutingHook(
        run_dir / ROUTING_FILE, every=config.train.routing_every_steps, is_main=engine.is_main, progression=progression
    )
    if engine.is_main:
        keep_until_step(run_dir / ROUTING_FILE, last_step=last_step)
    steps = config.train.steps
    sinks = open_sinks(config.observe, run_dir=run_dir, steps=steps, last_step=last_step) if engine.is_main else ()
    metrics = Metrics(sinks, flush_every_steps=config.observe.flush_every_steps)
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    rate = matrix_rate(
        run_dir if engine.is_main else None, device=engine.device, dtype=dtype, peak_tflops=config.observe.peak_tflops
    )
    flops = flops_per_token(config.model, sequence_tokens=config.data.sequence_tokens)
    board = FiguresBoard(Figures(0))
    snapshot = Snapshot(
        engine=engine, progression=progression, data=loader, identity=identity, metrics=metrics
    )
    return (
        StepFiguresHook(
            board,
            engine=engine,
            progression=progression,
            objectives=config.objectives,
            flops_per_token=flops,
            rate=rate,
        ),
        ValidationHook(
            board,
            engine=engine,
            batches=validation,
            every=config.train.eval_every_steps,
            objectives=config.objectives,
        ),
        routing,
        RecordHook(board, metrics=metrics),
        AlarmHook(
            config.observe.alarms,
            progression=progression,
            retries=config.train.spike_retries,
            objectives=config.objectives,
            steps=config.train.steps,
            is_main=engine.is_main,
        ),
        CheckpointHook(
            folder_of_run(run_dir, setting=config.checkpoint.dir),
            config=config.checkpoint,
            engine=engine,
            progression=progression,
            snapshot=snapshot,
            board=board,
        ),
        *replica_hooks(config, engine=engine, snapshot=snapshot),
    )


def replica_hooks(config: RootConfig, *, engine: Engine, snapshot: Snapshot) -> tuple[Hook, ...]:
    """The hook that keeps the last step in memory, where an agent owns a folder for it."""
    folder, every = replica_folder(), config.checkpoint.replica_every_steps
    return (ReplicaHook(folder, every=every, engine=engine, snapshot=snapshot),) if folder and every else ()


def build_rollback(
    config: RootConfig, *, folder: Path, engine: Engine, progression: Progression, hooks: tuple[Hook, ...]
) -> Rollback:
    """The way back to a checkpoint of `folder`, which the hook that saves must have finished writing."""
    saving = next(hook for hook in hooks if isinstance(hook, CheckpointHook))
    return Rollback(
        folder,
        engine=engine,
        progression=progression,
        settle=saving.settle,
        retries=config.train.spike_retries,
        quiet_steps=config.observe.alarms.spike_window_steps,
    )


def sample_hooks(
    config: RootConfig, *, run_dir: Path, engine: Engine, tokenizers: TokenizerBundle
) -> tuple[Hook, ...]:
    """The hook that writes samples, where it is switched on: the last of the list, for it takes longest."""
    if not config.train.sample_every_steps:
        return ()
    generation = Generation(engine.model, tokenizers=tokenizers, data=config.data, config=config.generate)
    return (
        SamplesHook(
            run_dir / "samples",
            generation=generation,
            data=config.data,
            every=config.train.sample_every_steps,
            engine=engine,
        ),
    )


def open_loader(config: RootConfig, *, tokenizers: TokenizerBundle, split: str, engine: Engine) -> Loader:
    """The stream of this rank's micro-batches of one split; the ramp is of training alone."""
    batch = config.batch
    ramp = batch.ramp if split == "train" else ()
    return build_loader(
        config.data,
        tokenizers=tokenizers,
        shape=StepShape(batch.global_sequences, batch.micro_sequences, config.model.mtp.depth, ramp),
        seed=config.train.seed,
        split=split,
        dp_rank=engine.dp_rank,
        dp_size=engine.dp_size,
    )


def validation_batches(
    config: RootConfig, *, tokenizers: TokenizerBundle, engine: Engine
) -> tuple[Batch, ...]:
    """The first `eval_batches` steps of the validation stream, kept in memory; empty where validation is off."""
    if not config.train.eval_every_steps:
        return ()
    try:
        loader = open_loader(config, tokenizers=tokenizers, split="validation", engine=engine)
    except DataError as error:
        raise DataError(f"{error} Or do without validation: train.eval_every_steps=0.") from error
    batches = tuple(batch for _ in range(config.train.eval_batches) for batch in loader.next_step())
    loader.close()  # its workers would go on making rows that nobody takes
    return batches


def restore(loaded: LoadedRun, *, engine: Engine, loader: Loader, progression: Progression) -> None:
    """Continue from a checkpoint: engine, data cursor, counters, random generators."""
    engine.load_state(loaded.engine)
    loader.load_state_dict(loaded.run.data)
    progression.restore(loaded.run)
    get_log().info("resumed from %s at step %d", loaded.directory, progression.step)


def choose_device(name: str) -> torch.device:
    """The device of this rank. Raises EnvironmentFault where a GPU is asked for and absent, or this host has fewer GPUs
    than processes."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise EnvironmentFault("engine.device = cuda, but torch sees no GPU. Set engine.device: auto")
    if name == "cpu" or not available:
        return torch.device("cpu")
    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= count:
        raise EnvironmentFault(
            f"this is process {index} of its host (LOCAL_RANK, from 0), and torch sees {count} GPU(s) there. Start one "
            "process per GPU and let each see them all (CUDA_VISIBLE_DEVICES), or set engine.device: cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def check_widths(config: RootConfig, *, tokenizers: TokenizerBundle) -> None:
    """Raise ConfigError where the model's widths are not those of its tokenizers."""
    for modality in ("text", *(name for name in config.model.modalities if name != "text")):
        for found in misfits(config.model, tokenizers=tokenizers, modality=modality):
            config.fail(
                f"model.{found.key}", f"the tokenizers need {found.needed}. Set model.{found.key}: {found.needed}",
                error=ConfigError,
            )
    check_pixels(config, stride=tokenizers.visual.stride)
    check_lengths(config, lengths=shortest_documents(config.data, visual=tokenizers.visual))


def check_pixels(config: RootConfig, *, stride: int) -> None:
    """Raise ConfigError where the sides of pictures or clips do not fit the patches: else every sample is skipped."""
    data, mixture = config.data, config.data.mixture
    for key, pixels, is_seen, is_drawn in (
        ("image_pixels", data.image_pixels, mixture.image_to_text or mixture.page, mixture.text_to_image),
        ("video_pixels", data.video_pixels, mixture.video_to_text, mixture.text_to_video),
    ):
        unit = SIDE * stride if is_seen else stride
        if (is_seen or is_drawn) and pixels % unit:
            config.fail(
                f"data.{key}",
                f"{pixels} px are not a multiple of {unit} px: the visual tokenizer's stride is {stride} px, and "
                f"understanding merges {SIDE} x {SIDE} cells. Nearest that works: "
                f"{max(1, round(pixels / unit)) * unit}",
                error=ConfigError,
            )


def check_lengths(config: RootConfig, *, lengths: dict[str, int]) -> None:
    """Raise ConfigError where no document of a task can ever fit a row: else every one of its samples is skipped."""
    used = {task: length for task, length in lengths.items() if vars(config.data.mixture)[task]}
    longest = max(used, key=lambda task: used[task], default=None)
    if longest is not None and used[longest] > config.data.sequence_tokens:
        config.fail(
            "data.sequence_tokens",
            f"a document of {longest} takes {used[longest]} positions besides its words, and media are never split. "
            f"Nearest that works: {used[longest]} and room for the words; or set data.mixture.{longest}: 0",
            error=ConfigError,
        )
