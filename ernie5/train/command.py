"""`ernie5 train CONFIG [a.b=c ...]`. torch is imported only after the configuration is accepted."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from ernie5.checkpoint.names import find_checkpoint, latest_checkpoint
from ernie5.checkpoint.places import folder_of_run
from ernie5.config.arguments import CommandParser, add_overrides
from ernie5.config.base import Config, with_value
from ernie5.config.home import in_home
from ernie5.config.load import config_to_yaml, load_config, peek_keys
from ernie5.errors import ConfigError, EnvironmentFault, Ernie5Error, PeerError
from ernie5.model.config import num_active_params, num_params
from ernie5.observe.faults import classify, keep_tracebacks, refusal_of
from ernie5.observe.files import replace_file
from ernie5.observe.log import get_log, open_log
from ernie5.observe.watchdog import Watchdog
from ernie5.train.config import RootConfig
from ernie5.train.lost_peer import as_peer_error, meet_peers
from ernie5.train.recover import (
    Standing,
    StopRequest,
    await_turn,
    clear_exit,
    leave_exit,
    leave_refusal,
    refusal_record,
    write_exit,
)
from ernie5.train.run_dir import CONFIG_FILE, METRICS_FILE, held, held_folder


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code, raises Ernie5Error for `__main__` to print."""
    try:
        arguments = _parse(argv)
        config = _load(arguments)
        _check_processes(config, is_start=not arguments.validate)
    except ConfigError as error:
        leave_refusal(error)
        await_turn()
        raise
    if arguments.validate:
        total, active = num_params(config.model), num_active_params(config.model)
        print(f"{arguments.config} is valid: {total:,} parameters, {active:,} active per text token")
        return 0
    if arguments.preflight or config.train.preflight:
        _check_hosts(config, goes_on=not arguments.preflight)
    if arguments.preflight:
        return 0
    return run_training(config, fresh=arguments.fresh, resume=arguments.resume)


def run_training(config: RootConfig, *, fresh: bool = False, resume: str | None = None) -> int:
    """Train `config` in its run directory and leave exit.json there, whatever happens: unless another run is there."""
    run_dir, rank = Path(config.train.run_dir), int(os.environ.get("RANK", "0"))
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        config.fail("train.run_dir", "a file stands in its place. Name another directory or move the file away")
    except OSError as error:
        raise EnvironmentFault(f"train.run_dir = {run_dir}: {refusal_of(error)}.") from error
    with held(run_dir) if rank == 0 else contextlib.nullcontext():
        return _run_in(run_dir, config=config, fresh=fresh, resume=resume, rank=rank)


def _run_in(run_dir: Path, *, config: RootConfig, fresh: bool, resume: str | None, rank: int) -> int:
    is_main = rank == 0
    given, config = config.checkpoint.dir, _with_whole_paths(config, fresh=fresh)
    folder = folder_of_run(run_dir, setting=config.checkpoint.dir)
    if is_main:
        clear_exit(run_dir)
    open_log(run_dir, rank=rank)
    if given is not None and is_main and folder != Path(os.path.abspath(given)):
        get_log().info("checkpoint.dir = %s is %s here, where this run has its checkpoints", given, folder)
    standing, source = Standing(folder), None
    try:
        watched = _watchdog(config, run_dir=run_dir, standing=standing)
        with keep_tracebacks(run_dir), StopRequest() as stop, watched as watchdog:
            source = None if fresh else _resume_source(folder, resume=resume)
            with held_folder(config, run_dir=run_dir, folder=folder) if is_main else contextlib.nullcontext():
                if is_main and not fresh:
                    _note_changes(config, run_dir=run_dir)
                _train(
                    config, run_dir=run_dir, source=source, fresh=fresh, stop=stop, standing=standing, watchdog=watchdog
                )
    except (Exception, KeyboardInterrupt) as error:
        lost = as_peer_error(error, peers=None, can_resume=lambda: _can_resume(folder, source=source))
        fault = classify(lost or error)
        if not leave_exit(run_dir, record=standing.fault(fault, rank=rank)):
            raise SystemExit(fault.exit_code) from error
        if lost is None:
            raise
        raise lost from error
    if is_main:
        record = standing.done()
        write_exit(run_dir, record=record)
        saved = record.checkpoint or "not saved"
        get_log().info("done: %d steps, %s. Look at it: ernie5 report %s", record.step, saved, run_dir)
    return 0


def _train(
    config: RootConfig, *, run_dir: Path, source: Path | None, fresh: bool, stop: StopRequest, standing: Standing,
    watchdog: Watchdog,
) -> None:
    """Build and run; `standing` is told of the run as soon as there is one."""
    from ernie5.train.build import build_run
    from ernie5.train.hooks import BeatHook
    from ernie5.train.loop import LoopSettings, run_steps

    run = build_run(config, run_dir=run_dir, resume_from=source, fresh=fresh)
    standing.progression, peers = run.progression, None
    try:
        peers = meet_peers(run.engine)
        if peers is not None:
            watchdog.look_after(peers)
        if run.progression.step >= config.train.steps:  # config.yaml stays: these settings have trained nothing
            get_log().info(
                "nothing to do: %s has %d of %d steps, and no setting of this start is used. Go on with more "
                "train.steps, or start over with --fresh", source, run.progression.step, config.train.steps,
            )
        elif run.engine.is_main:  # only now: a start that is refused must not describe a run that it never was
            replace_file(run_dir / CONFIG_FILE, content=config_to_yaml(config).encode())
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
    except RuntimeError as error:  # asked now, while the group and its members are still known
        folder = folder_of_run(run_dir, setting=config.checkpoint.dir)
        lost = as_peer_error(
            error, peers=peers, can_resume=lambda: _can_resume(folder, source=source), step=run.progression.step
        )
        if lost is None:
            raise
        raise lost from error
    finally:
        run.loader.close()
        run.engine.close()
        if peers is not None:
            peers.close()


def _watchdog(config: RootConfig, *, run_dir: Path, standing: Standing) -> Watchdog:
    """Ends a start that hangs; exit.json says so, unless another rank was first."""

    def report(message: str) -> None:
        write_exit(run_dir, record=standing.fault(classify(PeerError(message)), rank=rank), replace=False)

    rank, train = int(os.environ.get("RANK", "0")), config.train
    return Watchdog(
        run_dir, rank=rank, limit_seconds=train.hang_seconds, peer_seconds=train.peer_seconds, report=report
    )


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser(
        prog="ernie5 train",
        description="Pretrain a model; a run directory that holds a checkpoint is resumed.",
    )
    parser.add_argument("config", type=in_home, help="YAML file")
    add_overrides(parser)
    parser.add_argument("--validate", action="store_true", help="check the configuration and stop; no torch needed")
    parser.add_argument("--preflight", action="store_true", help="under a launcher: check the hosts, then stop")
    parser.add_argument("--fresh", action="store_true", help="start over: clears the run directory's own files")
    parser.add_argument(
        "--resume", type=in_home, metavar="CKPT", help="continue from this checkpoint instead of the latest"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args(argv)
    if arguments.fresh and arguments.resume:
        raise ConfigError("--fresh starts over and --resume continues. Give one of them")
    return arguments


def _check_hosts(config: RootConfig, *, goes_on: bool) -> None:
    """The preflight; what it ends in is left in exit.json, where the storage allows it, for whoever starts runs."""
    from ernie5.train.preflight import Preflight, leave

    try:
        Preflight(config).run()
        if not goes_on:
            leave()
    except Ernie5Error as error:
        run_dir, rank = Path(config.train.run_dir), int(os.environ.get("RANK", "0"))
        with contextlib.suppress(OSError):
            run_dir.mkdir(parents=True, exist_ok=True)
            if rank == 0:
                write_exit(run_dir, record=refusal_record(error, run_dir=run_dir))
        await_turn()
        raise


def _load(arguments: argparse.Namespace) -> RootConfig:
    if "tokenizer" in peek_keys(arguments.config):
        raise ConfigError(
            f"{arguments.config} configures a tokenizer. Train it with `ernie5 tokenizer train {arguments.config}`"
        )
    config = load_config(arguments.config, schema=RootConfig, overrides=arguments.overrides)
    return _in_its_place(config, file=Path(arguments.config), overrides=arguments.overrides)


def _check_processes(config: RootConfig, *, is_start: bool) -> None:
    """Refuse a layout that the launcher's processes do not make up: before torch is imported, and before --fresh clears
    anything. Without a launcher a start is one process, and a validation says nothing about their number."""
    told = os.environ.get("WORLD_SIZE")
    if told is None and not is_start:
        return
    if told is not None and not (told.isdecimal() and int(told)):
        raise ConfigError(
            f"WORLD_SIZE is {told!r} in the environment, where a launcher writes the number of processes. Unset it to "
            "start one"
        )
    try:
        config.derive_dp(int(told or "1"))
    except ConfigError as error:
        run_dir = Path(config.train.run_dir)
        if is_start and run_dir.is_dir() and os.environ.get("RANK", "0") == "0":  # else the last start's would stand
            with contextlib.suppress(OSError):
                write_exit(run_dir, record=refusal_record(error, run_dir=run_dir))
        raise
    if is_start:
        _check_rank(world_size=int(told or "1"))


def _check_rank(*, world_size: int) -> None:
    """Refuse a process that was told its place by halves: it would train alone on its share of every batch and call
    itself all of them, or train without writing anything down."""
    needed = ("RANK", "MASTER_ADDR", "MASTER_PORT") if world_size > 1 else ()
    missing = [name for name in needed if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {world_size} in the environment and {' and '.join(missing)} not set: a launcher sets all, "
            "so that the processes find each other. Start them with one (launch/README.md), or unset WORLD_SIZE"
        )
    for name, above in (("RANK", world_size), ("LOCAL_RANK", world_size), ("MASTER_PORT", 65536)):
        number = os.environ.get(name, "0")
        if not (number.isdecimal() and int(number) < above):
            raise ConfigError(
                f"{name} is {number!r} in the environment, where a launcher writes a number from 0 to {above - 1}; "
                f"WORLD_SIZE is {os.environ.get('WORLD_SIZE', 'not set: one process')}. Start the processes with a "
                f"launcher (launch/README.md), or unset {name} to start one"
            )


def _in_its_place(config: RootConfig, *, file: Path, overrides: Sequence[str]) -> RootConfig:
    """RUN/config.yaml, what a run wrote down of itself, means RUN: from any working directory, and after RUN moved."""
    folder = file.absolute().parent
    is_record = file.name == CONFIG_FILE and (folder / METRICS_FILE).is_file()
    is_named = any(override.startswith("train.run_dir=") for override in overrides)
    if not is_record or is_named or folder == Path(config.train.run_dir).absolute():
        return config
    return with_value(config, key="train.run_dir", value=str(folder))


def _with_whole_paths(config: RootConfig, *, fresh: bool) -> RootConfig:
    """Where checkpoint.dir is set, run and checkpoints lie apart and are written down so that each leads to the other
    from any working directory."""
    if config.checkpoint.dir is None:
        return config
    run_dir, setting = os.path.abspath(config.train.run_dir), config.checkpoint.dir
    folder = os.path.abspath(setting) if fresh else folder_of_run(Path(run_dir), setting=setting)
    return with_value(with_value(config, key="checkpoint.dir", value=str(folder)), key="train.run_dir", value=run_dir)


def _resume_source(folder: Path, *, resume: str | None) -> Path | None:
    return find_checkpoint(resume) if resume is not None else latest_checkpoint(folder)


def _can_resume(folder: Path, *, source: Path | None) -> bool:
    """Whether the same command would go on from something: a checkpoint, or the last step in memory."""
    from ernie5.train.replica import replica_folder

    places = (folder, replica_folder())
    return source is not None or any(place is not None and latest_checkpoint(place) is not None for place in places)


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
            weighs = key.startswith("model.") and not key.endswith("_backend")  # the same weights mean something else
            say = get_log().warning if weighs else get_log().info
            say("changed since the last start: %s was %s, is %s", key, before[key], value)


def _flatten(config: Config) -> dict[str, object]:
    from ernie5.checkpoint.command import flatten

    return flatten(config)
