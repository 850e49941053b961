"""Where a thread stands, for messages about lost peers: which collective it waits in, over which ranks, called where.

Read from the stack, so that it costs nothing before it is needed and covers every library's collectives. Torch-free.
"""

from __future__ import annotations

import dataclasses
import sys
import traceback
import types
from collections.abc import Sequence

COLLECTIVES = "torch.distributed.distributed_c10d"
OWN_COLLECTIVES = "ernie5.parallel.collectives"
PACKAGE = "ernie5"


@dataclasses.dataclass(frozen=True)
class Standing:
    """collective: `all_reduce` or "" outside of one; ranks: its members, () where unknown; place: `file.py:12 (name)`
    of the innermost frame of ernie5."""

    collective: str
    ranks: tuple[int, ...]
    place: str

    def __str__(self) -> str:
        if not self.collective:
            return self.place
        members = f" over ranks {list_ranks(self.ranks)}" if self.ranks else ""
        return f"{self.collective}{members} in {self.place}"


def standing_of_thread(thread: int) -> Standing:
    """Where the running thread with this identity stands."""
    frame = sys._current_frames().get(thread)
    return _standing([found for found, _ in traceback.walk_stack(frame)][::-1] if frame else [], lines={})


def standing_of_error(error: BaseException) -> Standing:
    """Where `error` was raised."""
    steps = list(traceback.walk_tb(error.__traceback__))
    return _standing([frame for frame, _ in steps], lines={id(frame): line for frame, line in steps})


def list_ranks(ranks: Sequence[int]) -> str:
    """`0-3, 8`: runs of successive ranks are shortened."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _standing(frames: Sequence[types.FrameType], *, lines: dict[int, int]) -> Standing:
    """frames: outermost first; lines: where the frames of a traceback were left, by identity."""
    collective, ranks, place = "", (), "an unknown place"
    for frame in frames:
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if module == COLLECTIVES and not name.startswith("_") and not collective:
            collective, ranks = name, _members(frame.f_locals)
        elif module.split(".")[0] == PACKAGE:
            place = f"{module.replace('.', '/')}.py:{lines.get(id(frame), frame.f_lineno)} ({name})"
            is_ours = module == OWN_COLLECTIVES and "axis" in frame.f_locals  # also while it waits for one it began
            collective, ranks = (name, frame.f_locals["axis"].ranks) if is_ours else ("", ())
    return Standing(collective, ranks, place)


def _members(local: dict[str, object]) -> tuple[int, ...]:
    """Global ranks of the group that a collective was called with; every rank where it named none."""
    distributed = sys.modules["torch.distributed"]
    try:
        return tuple(distributed.get_process_group_ranks(local.get("group") or distributed.group.WORLD))
    except (RuntimeError, ValueError, KeyError, TypeError):  # the group is gone already
        return ()
