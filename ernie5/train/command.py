"""`ernie5 train CONFIG [a.b=c ...]`. torch is imported only after the configuration is accepted."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
from pathlib import Path

from ernie5.checkpoint.names import find_checkpoint, latest_checkpoint
from ernie5.checkpoint.retention import clear_checkpoints
from ernie5.config.arguments import CommandParser, add_overrides
from ernie5.config.base import Config
from ernie5.config.load import config_to_yaml, load_config, peek_keys
from ernie5.errors import ConfigError, PeerError
from ernie5.model.config import num_active_params, num_params
from ernie5.observe.faults import classify, keep_tracebacks
from ernie5.observe.log import get_log, open_log
from ernie5.observe.watchdog import Watchdog
from ernie5.train.config import RootConfig
from ernie5.train.recover import StopRequest, clear_exit, done_record, fault_record, write_exit

CONFIG_FILE = "config.yaml"
RUN_FILES = ("metrics.jsonl", "routing.jsonl", "exit.json", "evaluation.json", "report.html", CONFIG_FILE)
RUN_FOLDERS = ("checkpoints", "tensorboard", "samples", "errors")
PEER_SIGNS = (
    "Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe", "gloo/transport",
    "NCCL communicator was aborted",
)


@dataclasses.dataclass
class _Reached:
    """The last step that a run finished, for exit.json."""

    step: int = 0


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code, raises Ernie5Error for `__main__` to print."""
    arguments = _parse(argv)
    if "tokenizer" in peek_keys(arguments.config):
        raise ConfigError(
            f"{arguments.config} configures a tokenizer. Train it with `ernie5 tokenizer train {arguments.config}`"
        )
    config = load_config(arguments.config, schema=RootConfig, overrides=arguments.overrides)
    if arguments.validate:
        total, active = num_params(config.model), num_active_params(config.model)
        print(f"{arguments.config} is valid: {total:,} parameters, {active:,} active per text token")
        return 0
    return run_training(config, fresh=arguments.fresh, resume=arguments.resume)


def run_training(config: RootConfig, *, fresh: bool = False, resume: str | None = None) -> int:
    """Train `config` in its run directory and leave exit.json there, whatever happens."""
    run_dir, is_main = Path(config.train.run_dir), int(os.environ.get("RANK", "0")) == 0
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        config.fail("train.run_dir", "a file stands in its place. Name another directory or move the file away")
    folder = Path(config.checkpoint.dir) if config.checkpoint.dir else run_dir / "checkpoints"
    if is_main:
        clear_exit(run_dir)
        if fresh:
            _clear_run(run_dir, folder=folder)
    open_log(run_dir, rank=0 if is_main else int(os.environ["RANK"]))
    reached = _Reached()
    try:
        watched = _watchdog(config, run_dir=run_dir, folder=folder)
        with keep_tracebacks(run_dir), StopRequest() as stop, watched as watchdog:
            source = None if fresh else _resume_source(folder, resume=resume)
            if is_main:
                _note_changes(config, run_dir=run_dir)
            _train(config, run_dir=run_dir, source=source, stop=stop, reached=reached, watchdog=watchdog)
    except (Exception, KeyboardInterrupt) as error:
        fault = classify(_as_peer_error(error))
        newest = latest_checkpoint(folder)
        if is_main or not (run_dir / "exit.json").exists():
            write_exit(run_dir, record=fault_record(fault, step=reached.step, checkpoint=str(newest or "")))
        if fault.is_bug or classify(error).exit_code == fault.exit_code:
            raise
        raise _as_peer_error(error) from error
    if is_main:
        newest = str(latest_checkpoint(folder) or "")
        write_exit(run_dir, record=done_record(step=reached.step, checkpoint=newest))
        get_log().info("done: %d steps, %s. Look at it: ernie5 report %s", reached.step, newest or "not saved", run_dir)
    return 0


def _train(
    config: RootConfig, *, run_dir: Path, source: Path | None, stop: StopRequest, reached: _Reached,
    watchdog: Watchdog,
) -> None:
    """Build and run; notes the last step also when an error ends the run."""
    from ernie5.train.build import build_run
    from ernie5.train.hooks import BeatHook
    from ernie5.train.loop import LoopSettings, run_steps

    run = build_run(config, run_dir=run_dir, resume_from=source)
    try:
        if run.engine.is_main:  # only now: a start that is refused must not describe a run that it never was
            (run_dir / CONFIG_FILE).write_text(config_to_yaml(config), encoding="utf-8")
        if run.progression.step >= config.train.steps:
            get_log().info("nothing to do: %s has %d of %d steps", source, run.progression.step, config.train.steps)
        run_steps(
            run.engine,
            data=run.loader,
            progression=run.progression,
            hooks=(*run.hooks, BeatHook(watchdog)),
            settings=LoopSettings(
                steps=config.train.steps, optim=config.optim, progress=config.observe.progress, title=run_dir.name
            ),
            stop=stop,
            rewind=run.rewind,
        )
    finally:
        reached.step = run.progression.step
        run.loader.close()
        run.engine.close()


def _watchdog(config: RootConfig, *, run_dir: Path, folder: Path) -> Watchdog:
    """Ends a start that hangs; exit.json says so, unless another rank was first."""

    def report(message: str) -> None:
        if not (run_dir / "exit.json").exists():
            newest = latest_checkpoint(folder)
            fault = classify(PeerError(message))
            write_exit(run_dir, record=fault_record(fault, step=0, checkpoint=str(newest or "")))

    rank = int(os.environ.get("RANK", "0"))
    return Watchdog(run_dir, rank=rank, limit_seconds=config.train.hang_seconds, report=report)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser(
        prog="ernie5 train",
        description="Pretrain a model; a run directory that holds a checkpoint is resumed.",
    )
    parser.add_argument("config", help="YAML file")
    add_overrides(parser)
    parser.add_argument("--validate", action="store_true", help="check the configuration and stop; no torch needed")
    parser.add_argument("--fresh", action="store_true", help="start over: clears the run directory's own files")
    parser.add_argument("--resume", metavar="CKPT", help="continue from this checkpoint instead of the latest")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args(argv)
    if arguments.fresh and arguments.resume:
        raise ConfigError("--fresh starts over and --resume continues. Give one of them")
    return arguments


def _resume_source(folder: Path, *, resume: str | None) -> Path | None:
    return find_checkpoint(resume) if resume is not None else latest_checkpoint(folder)


def _clear_run(run_dir: Path, *, folder: Path) -> None:
    """Remove what a run writes, by name; other files of the user stay."""
    for name in RUN_FILES:
        (run_dir / name).unlink(missing_ok=True)
    clear_checkpoints(folder)
    for name in RUN_FOLDERS:
        shutil.rmtree(run_dir / name, ignore_errors=True)


def _note_changes(config: RootConfig, *, run_dir: Path) -> None:
    """Say once which settings differ from the last start in this directory."""
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        return
    try:
        before = _flatten(load_config(path, schema=RootConfig))
    except ConfigError as error:
        get_log().warning("the previous %s cannot be compared: %s", path, error)
        return
    for key, value in _flatten(config).items():
        if key in before and before[key] != value:
            get_log().info("changed since the last start: %s was %s, is %s", key, before[key], value)


def _flatten(config: Config) -> dict[str, object]:
    from ernie5.checkpoint.command import flatten

    return flatten(config)


def _as_peer_error(error: BaseException) -> BaseException:
    """Collectives and the store where ranks meet say in many words that somebody is gone; a port in use is another
    matter."""
    from_store = any(kind.__name__ == "DistError" for kind in type(error).__mro__) and "EADDRINUSE" not in str(error)
    if isinstance(error, RuntimeError) and (from_store or any(sign in str(error) for sign in PEER_SIGNS)):
        return PeerError(
            "another process of this run is gone. Its own message stands beside this one, unless it was "
            "killed; start the run again to resume"
        )
    return error
