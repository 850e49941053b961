"""Start N training processes on this machine's CPU and end as they do: `python launch/spawn.py N CONFIG [a.b=c ...]`.

Launchers blur exit codes and print a traceback of their own for a user's typing mistake. Here only rank 0 speaks (the
other ranks write to LOGS/rank-K.log, shown if one of them dies alone), a signal reaches every rank once, and the exit
code is the run's own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from ranks import start, wait

from ernie5.errors import ConfigError, EnvironmentFault, Ernie5Error
from ernie5.observe.faults import refusal_of


def read_arguments(words: list[str]) -> tuple[int, list[str]]:
    """The number of processes and what each is given. Raises ConfigError."""
    if len(words) < 2 or not words[0].isdecimal() or int(words[0]) < 1:
        raise ConfigError(
            f"{' '.join(words)!r}: expected a number of processes and a CONFIG. Example: python launch/spawn.py 2 "
            "configs/pretrain/quickstart.yaml"
        )
    return int(words[0]), words[1:]


def log_folder() -> Path:
    """RANK_LOGS, else a new folder. Raises ConfigError or EnvironmentFault where nothing can be written there."""
    named = os.environ.get("RANK_LOGS")
    try:
        logs = Path(named or tempfile.mkdtemp(prefix="ernie5-ranks-"))
        logs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=logs):
            return logs
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"RANK_LOGS is {named!r}: a file stands in its place. Name a folder, or unset it") from None
    except OSError as error:
        raise EnvironmentFault(f"the ranks cannot be logged: {refusal_of(error, place='RANK_LOGS=DIR')}.") from error


def main() -> int:
    """Run the ranks; forward SIGINT and SIGTERM to each as they come."""
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return 0
    try:
        num_processes, arguments = read_arguments(sys.argv[1:])
        logs = log_folder()
    except Ernie5Error as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    ranks: list[subprocess.Popen] = []
    early: list[int] = []

    def forward(number: int, _frame: object) -> None:
        if not ranks:
            early.append(number)
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    ranks += start(num_processes, arguments=arguments, logs=logs)
    for number in early:
        forward(number, None)
    return wait(ranks, logs=logs)


if __name__ == "__main__":
    sys.exit(main())
