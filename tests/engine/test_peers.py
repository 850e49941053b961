"""The groups that ZeRO's stage 3 steps at a time are the same on all ranks, however unevenly they hold matrices."""

from __future__ import annotations

import pytest
import torch

from ernie5.engine.peers import cut_groups
from ernie5.optim.groups import ParameterGroup
from ernie5.optim.spread import Peers, Spread, Team

ROWS = (5, 4, 7, 64, 1, 2, 9, 3)  # of matrices eight wide; three ranks have unequal parts of all but one


def held_by(rank: int, *, ranks: int, copies: int) -> dict[str, Spread]:
    """The spreads of one rank of a team that cuts rows as evenly as it can."""
    peers = [Peers(place, size, gather=lambda part, sizes: part) for place, size in ((rank, ranks), (0, copies))]
    spreads = {}
    for index, rows in enumerate(ROWS):
        sizes = [rows // ranks + (place < rows % ranks) for place in range(ranks)]
        spans = tuple((sum(sizes[:place]), size) for place, size in enumerate(sizes))
        spreads[f"m{index}"] = Spread(torch.Size((rows, 8)), Team(*peers), spans=spans)
    return spreads


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("most", [1, 16, 24, 40, 64, 10_000])
def test_every_rank_cuts_at_the_same_matrices_and_has_no_more_than_it_may(most: int, copies: int) -> None:
    parameters = tuple(torch.nn.Parameter(torch.zeros(1)) for _ in ROWS)
    names = tuple(f"m{index}" for index in range(len(ROWS)))
    matrices = ParameterGroup("matrix", names, parameters, 0.1, is_matrix=True)
    others = ParameterGroup("plain", ("norm",), parameters[:1], 0.0, is_matrix=False)
    found = []
    for rank in range(3):
        spreads = held_by(rank, ranks=3, copies=copies)
        *cut, kept = cut_groups([matrices, others], spreads=spreads, most_elements=most)
        assert kept is others
        assert sum((group.names for group in cut), ()) == names
        assert [one for group in cut for one in group.parameters] == list(parameters)
        for group in cut:
            pieces = [-(-spreads[name].numel // copies) for name in group.names]
            assert sum(pieces) <= most or len(pieces) == 1  # DeepSpeed cuts such a group no further
        found.append([group.names for group in cut])
    assert found[0] == found[1] == found[2]
    assert (len(found[0]) == 1) == (most == 10_000)
