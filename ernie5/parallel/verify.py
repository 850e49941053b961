"""Proof at start-up that the ranks hold what the layout says: equal copies where it copies, other values where it cuts.

An engine that broadcasts one rank's experts over all of them trains on, with a plausible loss; this stops it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
import torch.distributed as dist

from ernie5.errors import EnvironmentFault
from ernie5.parallel.apply import Layout


def check_copies(parts: Iterable[tuple[str, torch.Tensor]], *, layout: Layout) -> None:
    """Compare digests of every parameter's part over all ranks; collective. For seeded weights or marks, not for loaded
    ones: two experts of a checkpoint may be equal by intent. Of `parts`, by name, one is held at a time.

    Raises EnvironmentFault naming the parameter and two ranks, on every rank.
    """
    state = layout.state
    if state.world.size == 1:
        return
    own = {name: (_places(name, layout=layout), _digest(part)) for name, part in parts}
    found: list = [None] * state.world.size
    dist.all_gather_object(found, own)
    for name in layout.shards:
        seen: dict[tuple[int, ...], tuple[int, str]] = {}
        for rank, digests in enumerate(found):
            if name not in digests:
                continue
            places, digest = digests[name]
            first, expected = seen.setdefault(places, (rank, digest))
            if digest != expected:
                raise EnvironmentFault(
                    f"ranks {first} and {rank} hold different values of {name}, and the layout "
                    f"{state.dims.describe()} says that they hold the same part. Training would not be that of one "
                    "process. Check that all hosts run the same version, and report it"
                )
        _check_parts(name, seen=seen, layout=layout)


def _check_parts(name: str, *, seen: dict[tuple[int, ...], tuple[int, str]], layout: Layout) -> None:
    by_digest: dict[str, int] = {}
    for rank, digest in seen.values():
        other = by_digest.setdefault(digest, rank)
        if other != rank:
            raise EnvironmentFault(
                f"ranks {other} and {rank} hold the same values of {name}, and the layout "
                f"{layout.state.dims.describe()} gives them different parts. One rank's part was copied over "
                "another's. Report it"
            )


def _places(name: str, *, layout: Layout) -> tuple[int, ...]:
    return tuple(layout.state.axis(cut.axis).coordinate for cut in layout.shards[name].cuts)


def _digest(part: torch.Tensor) -> str:
    data = part.detach().to("cpu").contiguous().view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()
