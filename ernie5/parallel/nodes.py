"""Which ranks are on one node: for traffic that should cross a border of nodes as seldom as it can."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch.distributed as dist

from ernie5.errors import LayoutError


def find_nodes(node_size: int | None) -> tuple[int, ...]:
    """The node of every rank; ranks are numbered node by node, as launchers do. Collective.

    node_size: ranks per node (the last one may hold fewer); None: what the launcher told each process
    (LOCAL_WORLD_SIZE, which may differ by node), and one node where it told none. Raises LayoutError, on every rank,
    where the processes contradict each other.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if node_size is not None or ranks == 1:
        return tuple(place // (node_size or 1) for place in range(ranks))
    told: list = [None] * ranks
    dist.all_gather_object(told, os.environ.get("LOCAL_WORLD_SIZE"))
    sizes = [ranks if size is None else int(size) for size in told]
    return split_into_nodes(sizes)


def split_into_nodes(sizes: Sequence[int]) -> tuple[int, ...]:
    """Nodes out of the size of its node that each rank states, in order of ranks."""
    nodes: list[int] = []
    while len(nodes) < len(sizes):
        size = sizes[len(nodes)]
        stated = sizes[len(nodes) : len(nodes) + size]
        if size < 1 or list(stated) != [size] * size:
            raise LayoutError(
                f"LOCAL_WORLD_SIZE of the ranks is {list(sizes)}, and ranks must be numbered node by node: from rank "
                f"{len(nodes)} on, {size} ranks should state {size}. Set parallel.node_size, or start the processes of "
                "a node with consecutive ranks"
            )
        nodes += [nodes[-1] + 1 if nodes else 0] * size
    return tuple(nodes)
