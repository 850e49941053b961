"""One rank of the layout table: `python worker.py JOB.json` runs every row of the job and writes what rank 0 saw.

A row is a dict: name, engine (grid | deepspeed | local), parallel (degrees), stage, case, rows (of one step), tasks (of
the data), and what differs from the tiny model and from the default objectives. Rows of one job run one after
another in the same processes, which start once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
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
from ernie5.data.synthetic import TASKS, synthetic_batch
from ernie5.engine.config import EngineConfig
from ernie5.engine.grid import GridEngine
from ernie5.engine.interface import Engine, StepSettings
from ernie5.engine.local import LocalEngine
from ernie5.model.backbone import build_model
from ernie5.model.interfaces import Routing
from ernie5.objectives.config import ObjectivesConfig
from ernie5.objectives.mix import uniform_magnitudes
from ernie5.optim.config import OptimConfig
from ernie5.parallel.config import ParallelConfig
from ernie5.parallel.verify import check_copies
from ernie5.records import Batch

SPEC = importlib.util.spec_from_file_location("tiny_run", Path(__file__).parent.parent / "engine" / "tiny_run.py")
TINY = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(TINY)
SEQUENCE_TOKENS = 157
STEPS = 2
FAR = 1e3


def make_rows(step: int, *, rows: int, tasks: tuple[str, ...] = TASKS) -> list[Batch]:
    """Micro-batches of one row of an odd number of tokens; every other one without images, sound and clips."""
    return [
        synthetic_batch(
            TINY.VOCAB, shapes=TINY.SHAPES, rows=1, sequence_tokens=SEQUENCE_TOKENS, seed=1000 * step + index,
            tasks=("text",) if index % 2 else tasks,
        )
        for index in range(rows)
    ]


def make_engine(row: dict) -> Engine:
    """The engine of a row around the same whole model; `case` shifts the routers' bias."""
    model = build_model(changed(TINY.MODEL, fields=row.get("model", {})), seed=3)
    for router in model.routers():
        if row["case"] == "one_expert":  # the first expert of every token is 5, the second one of the others
            router.balance_bias[5] = FAR
        if row["case"] == "one_rank":  # all choices fall on the experts of the first rank
            router.balance_bias[:2] = FAR
        if row["case"] == "idle_expert":
            router.balance_bias[6] = -FAR
    clip = row.get("clip", 0.05)
    settings = StepSettings(
        objectives=ObjectivesConfig(ema_decay=0.5, **row.get("objectives", {})), clip_norm=clip, balance_speed=0.01,
        magnitudes=uniform_magnitudes(vocab_size=TINY.MODEL.vocab_size, audio_codes=TINY.MODEL.audio.codes),
    )
    optim = OptimConfig(learning_rate=1e-2, clip_norm=clip, name=row.get("optimizer", "adamw"))
    device = torch.device("cpu")
    precision = row.get("precision", "fp32")
    if row["engine"] == "local":
        return LocalEngine(model, optim=optim, settings=settings, precision=precision, device=device)
    engine = EngineConfig(
        kind=row["engine"], zero_stage=row["stage"], precision=precision, **row.get("settings", {})
    )
    degrees = {name: tuple(value) if isinstance(value, list) else value for name, value in row["parallel"].items()}
    parallel = ParallelConfig(**degrees)
    if row["engine"] == "grid":
        return GridEngine(
            model, engine=engine, parallel=parallel, optim=optim, settings=settings, device=device
        )
    from ernie5.engine.deepspeed_engine import DeepSpeedEngine

    dp = int(os.environ.get("WORLD_SIZE", "1")) // parallel.model_ranks
    return DeepSpeedEngine(
        model, engine=engine, parallel=parallel, optim=optim, settings=settings, device=device,
        micro_batches=row["rows"] // dp, micro_sequences=1, log_path=Path(os.devnull),
    )


def changed(config: Config, *, fields: dict) -> Config:
    """`config` with some fields changed, those of nested configurations by nested dicts."""
    new = {
        name: changed(vars(config)[name], fields=value) if isinstance(value, dict) else value
        for name, value in fields.items()
    }
    return dataclasses.replace(config, **new)


def run_row(row: dict, *, out: Path) -> dict[str, object]:
    """Two steps, an evaluation, and the state; the same figures for every engine."""
    engine = make_engine(row)
    result: dict[str, object] = {"losses": [], "norms": [], "loads": []}
    result["start"] = {name: value.clone() for name, value in engine.state().parameters.items()}
    pairs = count_pairs(engine, ranks=row["parallel"].get("ep", 1)) if row.get("count_bytes") else None
    kept = Kept()
    for step in range(STEPS):
        batches = make_rows(step, rows=row["rows"], tasks=tuple(row.get("tasks", TASKS)))
        batches = batches[engine.dp_rank :: engine.dp_size]
        with kept.watch() if row.get("measure") else contextlib.nullcontext():
            sums = engine.accumulate(batches)
        if step == 0:
            if pairs is not None:
                result["bytes"] = add_bytes(engine, pairs=pairs)
            result["gradients"] = engine.gradients()
        report = engine.update(sums, learning_rate=1e-2)
        names = ("text", "image", "video", "audio", "mtp")
        result["losses"].append([float(vars(sums.terms)[name]) for name in names] + [float(sums.objective)])
        result["norms"].append(float(report.grad_norm))
        result["loads"].append(sums.routing.group_loads)
    result["kept_bytes"] = [one["most"] for one in engine.gather({"most": kept.most})]
    result["state"] = engine.state()
    if row["engine"] == "grid":  # copies of one part must not drift apart, those of two stages included
        check_copies(dict(engine.model.named_parameters()), layout=engine.layout)
    batch = make_rows(7, rows=1)[0]
    with engine.whole_model(), torch.no_grad():
        if engine.is_main:  # no other rank runs: no collective may be left in the whole model
            result["by_hand"] = engine.model(batch).text_hidden
    if row.get("third"):
        result["third"] = third_step(row, engine=engine, folder=out / "checkpoints" / row["name"])
    pair = make_rows(8, rows=engine.dp_size)
    result["evaluated"] = float(engine.evaluate_batch(pair[engine.dp_rank]).terms.text)
    return result


def third_step(row: dict, *, engine: Engine, folder: Path) -> dict[str, object]:
    """The state goes to a checkpoint, each rank writing its part, and a new engine continues from there."""
    written, again = engine.state(), make_engine(row)
    loaded = load_run(save(engine, folder=folder))
    again.load_state(loaded.engine)
    read, peers = again.state(), make_rows(2, rows=row["rows"])[again.dp_rank :: again.dp_size]
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
        held = routing.scores.shape[1] // ranks
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


def main(path: str) -> None:
    """Run the job's rows; rank 0 writes OUT/NAME.pt for each."""
    torch.set_num_threads(1)
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    for row in job["rows"]:
        result = run_row(row, out=Path(job["out"]))
        if os.environ.get("RANK", "0") == "0":
            torch.save(result, Path(job["out"]) / f"{row['name']}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
