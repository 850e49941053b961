"""What each rank does in the tests of checkpoints by many ranks: tiny engines, loaded, stepped and saved."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib.util
import time
from pathlib import Path

import torch
import torch.distributed as dist

from ernie5.checkpoint import outgoing
from ernie5.checkpoint.config import CheckpointConfig
from ernie5.checkpoint.load import load_run
from ernie5.checkpoint.manifest import RunState
from ernie5.checkpoint.names import latest_checkpoint
from ernie5.checkpoint.save import Contents
from ernie5.checkpoint.saver import Saver
from ernie5.data.synthetic import synthetic_batch
from ernie5.engine.config import EngineConfig
from ernie5.engine.grid import GridEngine
from ernie5.engine.interface import Engine, StepSettings
from ernie5.engine.local import LocalEngine
from ernie5.errors import CheckpointError, EnvironmentFault
from ernie5.model.backbone import UnifiedModel, build_model
from ernie5.objectives.config import ObjectivesConfig
from ernie5.objectives.mix import uniform_magnitudes
from ernie5.optim.config import OptimConfig
from ernie5.parallel.config import ParallelConfig

SPEC = importlib.util.spec_from_file_location("tiny_run", Path(__file__).parent.parent / "engine" / "tiny_run.py")
TINY = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(TINY)
STEP = 1
# text alone and few rows, because eight engines take steps; media add nothing to what slices are
MODEL = dataclasses.replace(TINY.MODEL, kv_heads=2, layers=2, modalities=("text",))


def make_engine(layout: dict | None, *, seed: int = 3, precision: str = "fp32") -> Engine:
    """A grid engine of `layout`, or the local one; other seeds make other weights."""
    model = (build_model if layout is None else UnifiedModel.outline)(MODEL, seed=seed)
    settings = StepSettings(
        objectives=ObjectivesConfig(ema_decay=0.5), clip_norm=0.05, balance_speed=0.01,
        magnitudes=uniform_magnitudes(vocab_size=TINY.MODEL.vocab_size, audio_codes=TINY.MODEL.audio.codes),
    )
    optim, device = OptimConfig(learning_rate=1e-2, clip_norm=0.05), torch.device("cpu")
    if layout is None:
        return LocalEngine(model, optim=optim, settings=settings, precision=precision, device=device)
    engine = EngineConfig(kind="grid", precision=precision)
    parallel = ParallelConfig(**layout)
    return GridEngine(model, engine=engine, parallel=parallel, optim=optim, settings=settings, device=device)


def contents_of(engine: Engine, *, step: int, precision: str = "fp32") -> Contents:
    """What this rank saves."""
    slices = tuple(engine.slices())
    run = RunState(step=step, tokens=7, data={"cursor": 3}, rng={"cpu": "00ff"})
    return Contents(slices, engine.updates, engine.magnitudes, run, "train: {}\n", precision, {"text": "abc"},
                    engine.rank, engine.world_size)


def save(
    engine: Engine, *, folder: Path, step: int = STEP, precision: str = "fp32", behind: bool = False
) -> Path:
    """A checkpoint of all ranks. behind: the state is spoilt as soon as training might go on, and comes back later."""
    saver = Saver(folder, config=CheckpointConfig(keep=9), engine=engine)
    saver.start(contents_of(engine, step=step, precision=precision), behind=behind)
    if behind:
        kept = [part.values.clone() for part in engine.slices()]
        for part in engine.slices():
            part.values.fill_(7)
        saver.settle(wait=True)
        for part, values in zip(engine.slices(), kept, strict=True):
            part.values.copy_(values)
    saver.settle(wait=True)
    saver.result()
    return latest_checkpoint(folder)


def train(engine: Engine, *, seed: int) -> tuple[list[float], float]:
    """One step of four rows; losses and norm."""
    rows = [
        synthetic_batch(TINY.VOCAB, shapes=TINY.SHAPES, rows=1, sequence_tokens=64, seed=seed + i, tasks=("text",))
        for i in range(4)
    ]
    batches = rows[engine.dp_rank :: engine.dp_size]
    report = engine.train_step(batches, learning_rate=1e-2)
    return [float(value) for value in vars(report.sums.terms).values()], float(report.grad_norm)


def reload_everywhere(source: str, folder: str, layouts: dict[str, dict], precision: str) -> dict[str, dict]:
    """Load `source` under each layout, save, train a step, go back to what was saved and train it again."""
    results = {}
    for name, layout in layouts.items():
        engine = make_engine(layout, seed=4, precision=precision)
        engine.load_state(load_run(source).engine)
        path = save(engine, folder=Path(folder) / name, precision=precision)
        once = train(engine, seed=9)
        after = [part.values.clone() for part in engine.slices()]
        other = make_engine(layout, seed=5, precision=precision)
        other.load_state(load_run(path).engine)
        save(other, folder=Path(folder) / f"{name}-again", precision=precision, behind=True)
        twice = train(other, seed=9)
        same = all(torch.equal(a, part.values) for a, part in zip(after, other.slices(), strict=True))
        results[name] = {"path": str(path), "once": once, "twice": twice, "same": same}
    return results


def fail_on_one_rank(folder: str, failing: int, phase: str) -> tuple[str, list[str]]:
    """A first save, then one whose writing fails on one rank while the other is still at its own; the message, and what
    is left in the folder. phase: behind the training, where the disk is full before it goes on, or while it waits."""
    engine = make_engine({"ep": 2})
    save(engine, folder=Path(folder), step=1)
    name = "begin_tensor_file" if phase == "behind" else "write_tensor_file"
    write_whole = getattr(outgoing, name)

    def write(path: Path, *, tensors: object, **options: object) -> object:
        if engine.rank == failing:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        deadline = time.monotonic() + 0.3
        while time.monotonic() < deadline and path.parent.is_dir():  # a folder in which files appear resists removal
            with contextlib.suppress(FileNotFoundError):
                path.with_suffix(f".{time.monotonic_ns()}").touch()
        return write_whole(path, tensors=tensors, **options)

    setattr(outgoing, name, write)
    try:
        save(engine, folder=Path(folder), step=2, behind=phase == "behind")
        message = "saved"
    except EnvironmentFault as error:
        message = str(error)
    dist.barrier()
    return message, sorted(path.name for path in Path(folder).iterdir())


def forget_a_slice(folder: str) -> list[list[str]]:
    """Rank 1 leaves out a slice of a cut tensor, then a whole tensor that it alone writes; its messages."""
    engine = make_engine({"ep": 2})
    messages = []
    for is_cut in (True, False):
        contents = contents_of(engine, step=1)
        if engine.rank == 1:
            left = next(p for p in contents.slices if p.is_written and (p.box.shape != p.shape) == is_cut)
            kept = tuple(part for part in contents.slices if part is not left)
            contents = dataclasses.replace(contents, slices=kept)
        saver = Saver(Path(folder), config=CheckpointConfig(), engine=engine)
        saver.start(contents)
        saver.settle(wait=True)
        try:
            saver.result()
        except (CheckpointError, EnvironmentFault) as error:
            messages.append(str(error))
    return messages


def wrong_model(source: str) -> list[str]:
    """The message of loading a checkpoint into an engine of another width, on each rank."""
    engine = make_engine({"tp": 2})
    loaded = load_run(source)
    loaded.engine._shapes["parameters"] = {**loaded.engine.shapes("parameters"), "final_norm.weight": (31,)}
    try:
        engine.load_state(loaded.engine)
    except CheckpointError as error:
        return [str(error)]
    return []
