"""The dispatcher of every name; a library behind one is looked for here and never replaced by another."""

from __future__ import annotations

from ernie5.parallel.deepep import DeepEPDispatcher, SharedBuffer, make_buffer, require_deepep
from ernie5.parallel.expert import AllGatherDispatcher, AllToAllDispatcher, StagedDispatcher
from ernie5.parallel.routes import routes_of
from ernie5.parallel.state import ParallelState


def make_dispatcher(
    name: str, *, state: ParallelState, is_replicated: bool = True, overlaps: bool = False
) -> StagedDispatcher:
    """The dispatcher that parallel.dispatcher names, for all layers; `auto` is alltoall. Raises LayoutError where its
    library cannot run here."""
    if name == "allgather":
        return AllGatherDispatcher(state, is_replicated=is_replicated)
    if name == "deepep":
        require_deepep()
        return DeepEPDispatcher(state, is_replicated=is_replicated, shared=SharedBuffer(state.ep, make=make_buffer))
    routes = routes_of(state.ep, crosses_once=name == "hierarchical")
    return AllToAllDispatcher(state, is_replicated=is_replicated, routes=routes, overlaps=overlaps)
