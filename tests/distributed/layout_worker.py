"""A job of the layout table: `python layout_worker.py JOB.json` forks its ranks, runs all rows, writes what rank 0 saw.

Rows of one job run one after another in the same processes, which start once.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib.util
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import weakref
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks

from ernie5.checkpoint.config import CheckpointConfig
from ernie5.checkpoint.load import load_run
from ernie5.checkpoint.manifest import RunState
from ernie5.checkpoint.names import find_checkpoint
from ernie5.checkpoint.save import Contents
from ernie5.checkpoint.saver import Saver
from ernie5.config.base import Config
from ernie5.data.collate import Layout as RowLayout
from ernie5.data.collate import collate_rows
from ernie5.data.document import Document, DocumentBuilder
from ernie5.data.synthetic import synthetic_batch, synthetic_document
from ernie5.engine.config import EngineConfig
from ernie5.engine.grid import GridEngine
from ernie5.engine.interface import Engine, StepSettings
from ernie5.engine.local import LocalEngine
from ernie5.model.backbone import UnifiedModel, build_model
from ernie5.model.interfaces import Routing
from ernie5.objectives.config import ObjectivesConfig
from ernie5.objectives.mix import uniform_magnitudes
from ernie5.optim import newton_schulz
from ernie5.optim.config import OptimConfig
from ernie5.parallel.config import ParallelConfig
from ernie5.records import Batch
from layout_replay import Choices, Notes
from layout_rows import LEARNING_RATES, MODELS, OBJECTIVES, STEPS, Row, find_row

SPEC = importlib.util.spec_from_file_location("tiny_run", Path(__file__).parent.parent / "engine" / "tiny_run.py")
TINY = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(TINY)
FAR = 1e3
PR_SET_PDEATHSIG = 1
NATIVE = newton_schulz.iteration_dtype


def make_rows(step: int, *, row: Row, rows: int) -> list[Batch]:
    """Micro-batches of one row of an odd number of tokens; every other one of other tasks, as a rule text alone."""
    return [
        _make_row(row, tasks=row.others if index % 2 else row.tasks, seed=1000 * step + index) for index in range(rows)
    ]


def _make_row(row: Row, *, tasks: tuple[str, ...], seed: int) -> Batch:
    if row.documents is None and tasks != ("speech",):
        return synthetic_batch(
            TINY.VOCAB, shapes=TINY.SHAPES, rows=1, sequence_tokens=row.tokens, seed=seed, tasks=tasks
        )
    if row.documents is None:
        documents = [_speech(seed=seed + place) for place in range(8)]
    else:  # short ones: three tokens of text, or a word with some frames of speech
        short = ("text", "text", "audio_to_text", "text", "text_to_audio")
        documents = [
            synthetic_document(TINY.VOCAB, shapes=TINY.SHAPES, task=short[place % 5], seed=seed + place, text_tokens=1)
            for place in range(row.documents)
        ]
    return collate_rows([tuple(documents)], layout=RowLayout(row.tokens, TINY.VOCAB.pad, 1))


def _speech(*, seed: int) -> Document:
    """Generated frames of speech and not one target of text."""
    shapes = TINY.SHAPES
    codes = torch.randint(shapes.audio_codes, (5, shapes.audio_levels), generator=torch.Generator().manual_seed(seed))
    builder = DocumentBuilder(f"speech-{seed}", task="speech", vocab=TINY.VOCAB, shapes=shapes)
    builder.audio(codes, generate=True)
    return builder.build()


def make_engine(row: Row) -> Engine:
    """The engine of a row around the same model, of which a rank builds its part; `case` shifts the routers' bias."""
    make_model = build_model if row.is_local else UnifiedModel.outline
    model = make_model(changed(TINY.MODEL, fields=MODELS[row.model]), seed=3)
    precision, device = row.precision, torch.device("cpu")
    if precision == "fp64":
        model, precision = model.double(), "fp32"
    for router in model.routers():
        if row.case == "one_expert":  # the first expert of every token is 5, the second one of the others
            router.balance_bias[5] = FAR
        if row.case == "one_rank":  # all choices fall on the experts of the first rank
            router.balance_bias[:2] = FAR
        if row.case == "idle_expert":
            router.balance_bias[6] = -FAR
    settings = StepSettings(
        objectives=ObjectivesConfig(ema_decay=0.5, **OBJECTIVES.get(row.model, {})), clip_norm=0.05, balance_speed=0.01,
        magnitudes=uniform_magnitudes(vocab_size=TINY.MODEL.vocab_size, audio_codes=TINY.MODEL.audio.codes),
    )
    optim = OptimConfig(learning_rate=1e-2, clip_norm=settings.clip_norm, name=row.optimizer)
    if row.is_local:
        return LocalEngine(model, optim=optim, settings=settings, precision=precision, device=device)
    kind = "grid" if row.stage is None else "deepspeed"
    engine = EngineConfig(kind=kind, zero_stage=row.stage or 0, precision=precision, **row.settings)
    parallel = ParallelConfig(**row.parallel)
    if row.stage is None:
        return GridEngine(model, engine=engine, parallel=parallel, optim=optim, settings=settings, device=device)
    from ernie5.engine import deepspeed_engine

    deepspeed_engine.SUB_GROUP_ELEMENTS = row.sub_group
    return deepspeed_engine.DeepSpeedEngine(
        model, engine=engine, parallel=parallel, optim=optim, settings=settings, device=device,
        micro_batches=row.rows // row.dp, micro_sequences=1, log_path=Path(os.devnull),
    )


def changed(config: Config, *, fields: dict) -> Config:
    """`config` with some fields changed, those of nested configurations by nested dicts."""
    new = {
        name: changed(vars(config)[name], fields=value) if isinstance(value, dict) else value
        for name, value in fields.items()
    }
    return dataclasses.replace(config, **new)


def run_row(row: Row, *, steps: int, recorded: Notes | None, out: Path) -> dict[str, object]:
    """Some steps, an evaluation, and the state; the same figures for every engine."""
    if row.poison != torch.are_deterministic_algorithms_enabled():  # fresh memory is then filled with NaN
        torch.use_deterministic_algorithms(row.poison, warn_only=True)  # loads the compiler: 2 s of every rank
    engine = make_engine(row)
    result: dict[str, object] = {"losses": [], "norms": [], "loads": []}
    result["start"] = {name: value.clone() for name, value in engine.state().parameters.items()}
    pairs = count_pairs(engine, ranks=row.parallel.get("ep", 1)) if row.count_bytes else None
    kept = Kept()
    watched = row.is_local or recorded is not None
    choices = Choices(engine, layout=vars(engine).get("_layout"), recorded=recorded) if watched else None
    for step in range(steps):
        batches = make_rows(step, row=row, rows=row.rows)[engine.dp_rank :: engine.dp_size]
        if row.dropped and step == 1:
            engine.discard(engine.accumulate(batches))
        with contextlib.ExitStack() as stack:
            if row.measure:
                stack.enter_context(kept.watch())
            if choices is not None:
                stack.enter_context(choices.watch(batches, step=step, first=engine.dp_rank, stride=engine.dp_size))
            sums = engine.accumulate(batches)
        if step == 0:
            if pairs is not None:
                result["bytes"] = add_bytes(engine, pairs=pairs)
            result["gradients"] = engine.gradients()
        report = engine.update(sums, learning_rate=LEARNING_RATES[steps])
        names = ("text", "image", "video", "audio", "mtp")
        result["losses"].append([float(vars(sums.terms)[name]) for name in names] + [float(sums.objective)])
        result["norms"].append(float(report.grad_norm))
        result["loads"].append(sums.routing.group_loads)
    result["noted"] = choices.noted if choices is not None else {}
    mine = {"kept": kept.most, "divergences": choices.divergences if choices is not None else set()}
    everyone = engine.gather(mine)
    result["kept_bytes"] = [one["kept"] for one in everyone]
    result["divergences"] = set().union(*(one["divergences"] for one in everyone))
    return {**result, **finish_row(row, engine=engine, steps=steps, out=out)}


def finish_row(row: Row, *, engine: Engine, steps: int, out: Path) -> dict[str, object]:
    """What is to be seen after the steps."""
    result: dict[str, object] = {"state": engine.state()}
    if not row.is_local:  # copies of one part, those of two stages included
        engine.check_copies()
    pair = make_rows(8, row=row, rows=engine.dp_size)
    result["evaluated"] = float(engine.evaluate_batch(pair[engine.dp_rank]).terms.text)
    batch = make_rows(7, row=row, rows=1)[0]
    with engine.whole_model(), torch.no_grad():
        if engine.is_main:  # no other rank runs: no collective may be left in the whole model
            result["by_hand"] = engine.model(batch).text_hidden
    if row.third and steps == STEPS:
        result["third"] = third_step(row, engine=engine, folder=out / "checkpoints" / row.name)
    return result


def third_step(row: Row, *, engine: Engine, folder: Path) -> dict[str, object]:
    """The state goes to a checkpoint, each rank writing its part, and a new engine continues from there."""
    written, again = engine.state(), make_engine(row)
    loaded = load_run(save(engine, folder=folder))
    again.load_state(loaded.engine)
    read, peers = again.state(), make_rows(2, row=row, rows=row.rows)[again.dp_rank :: again.dp_size]
    report, straight = (one.train_step(peers, learning_rate=1e-2) for one in (again, engine))
    losses = [float(value) for value in vars(report.sums.terms).values()]
    return {
        "written": written, "read": read, "norm": float(report.grad_norm), "losses": losses, "after": again.state(),
        "straight": engine.state(), "straight_norm": float(straight.grad_norm), "path": str(loaded.directory),
    }


def save(engine: Engine, *, folder: Path) -> Path:
    """A checkpoint of all ranks in `folder`."""
    contents = Contents(
        tuple(engine.slices()), engine.updates, engine.magnitudes,
        RunState(step=engine.updates, tokens=0, data={}, rng={}), "train: {}\n", "fp32", {}, engine.rank,
        engine.world_size,
    )
    saver = Saver(folder, config=CheckpointConfig(), engine=engine)
    saver.start(contents)
    saver.settle(wait=True)
    saver.result()
    return find_checkpoint(folder)


class Kept:
    """Counts the bytes that autograd keeps for backward, parameters left out. most: at one time."""

    def __init__(self) -> None:
        self.most = self._now = 0

    def watch(self) -> saved_tensors_hooks:
        """Count what is saved within."""
        return saved_tensors_hooks(self._pack, lambda holder: holder[0])

    def _pack(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        holder = _Holder([tensor])
        size = 0 if isinstance(tensor, torch.nn.Parameter) else tensor.numel() * tensor.element_size()
        self._now += size
        self.most = max(self.most, self._now)
        weakref.finalize(holder, self._drop, size)
        return holder

    def _drop(self, size: int) -> None:
        self._now -= size


class _Holder(list):
    """A list that can be referred to weakly."""


def count_pairs(engine: GridEngine, *, ranks: int) -> list[int]:
    """A list that grows by the (token, remote rank) pairs of every layer that routes, in bytes of hidden states."""
    found: list[int] = []
    own = engine.rank % ranks

    def count(_module: torch.nn.Module, inputs: tuple, routing: Routing) -> None:
        held = routing.num_experts // ranks
        wanted = torch.zeros(len(routing.choices), ranks, dtype=torch.bool)
        wanted.scatter_(1, routing.choices // held, True)
        wanted[:, own] = False
        found.append(int(wanted.sum()) * inputs[0].shape[1] * inputs[0].element_size())

    for router in engine.model.routers():
        router.register_forward_hook(count)
    return found


def add_bytes(engine: GridEngine, *, pairs: list[int]) -> dict[str, object]:
    """What the collectives counted and what had to travel, summed over ranks."""
    everyone = engine.gather({"unique": sum(pairs), "sent": dict(engine.traffic.sent_bytes)})
    sent = {what: sum(one["sent"].get(what, 0) for one in everyone) for what in everyone[0]["sent"]}
    return {"unique_bytes": sum(one["unique"] for one in everyone), "sent": sent}


def end_with_parent() -> None:
    """Have this process killed when its parent is gone, however that ended (Linux): no ranks are left behind."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def run_rank(job: dict, *, rank: int, port: int) -> None:
    """Run the job's rows; rank 0 writes OUT/NAME.pt for each."""
    end_with_parent()
    shared = {"WORLD_SIZE": job["ranks"], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
    out = Path(job["out"])
    for name, reference in zip(job["rows"], job["references"], strict=True):
        recorded = None if reference is None else torch.load(reference, weights_only=False)["noted"]
        row = find_row(name)
        # Muon iterates in the type of the row: what bf16 rounds, it would raise to whole steps, and hide wrong ones
        newton_schulz.iteration_dtype = NATIVE if row.precision == "bf16" else lambda matrix: matrix.dtype
        result = run_row(row, steps=job["steps"], recorded=recorded, out=out)
        if rank == 0:
            torch.save(result, out / f"{name}.part")
            (out / f"{name}.part").rename(out / f"{name}.pt")


def main(path: str) -> int:
    """Fork the ranks, which share what was imported, and end all of them with the first that fails."""
    end_with_parent()
    torch.set_num_threads(1)
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=run_rank, args=(job,), kwargs={"rank": rank, "port": port}, daemon=True)
             for rank in range(job["ranks"])]
    for rank in ranks:
        rank.start()
    waiting = set(ranks)
    while waiting:
        multiprocessing.connection.wait([rank.sentinel for rank in waiting])
        waiting = {rank for rank in waiting if rank.exitcode is None}
        if any(rank.exitcode for rank in ranks):
            return 1  # the others are daemons and end with this process
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
