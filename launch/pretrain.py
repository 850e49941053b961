"""`ernie5 train` under a launcher: `deepspeed launch/pretrain.py CONFIG [a.b=c ...]`, or torchrun, srun, mpirun.

The launcher tells each process its rank through the environment (variables.py). A launcher that dies would leave its
ranks running, as DeepSpeed's runner does after SIGINT: here they get SIGTERM then, so that they save and end.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

from variables import adopt_launcher

from ernie5.__main__ import main
from ernie5.errors import EXIT_PEER

PR_SET_PDEATHSIG = 1
WATCH_SECONDS = 0.5


def end_with_the_launcher() -> None:
    """Have SIGTERM sent to this process when its parent dies (Linux; prctl(2), PR_SET_PDEATHSIG). Only under a
    launcher: a run that was started by hand may outlive its shell."""
    if "RANK" not in os.environ or not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it died before the kernel knew
        os.kill(os.getpid(), signal.SIGTERM)
    # The parent under DeepSpeed is a middleman that outlives its runner, so the runner is watched through it.
    if b"deepspeed.launcher.launch" in Path(f"/proc/{parent}/cmdline").read_bytes():
        threading.Thread(target=_watch, args=(parent, parent_of(parent)), daemon=True).start()


def parent_of(process: int) -> int:
    """The parent of a process, from /proc; 0 when the process is gone."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _watch(middleman: int, runner: int) -> None:
    while parent_of(middleman) == runner:
        time.sleep(WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    arguments = adopt_launcher(sys.argv[1:])
    end_with_the_launcher()
    code = main(["train", *arguments])
    if code == EXIT_PEER:  # everything is written; libraries would wait at their end for the peer that is gone
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
