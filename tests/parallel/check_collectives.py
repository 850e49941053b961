"""One of three ranks: every collective against what it must be, forward and backward (run by test_collectives.py)."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ernie5.errors import EnvironmentFault, KernelError, LayoutError
from ernie5.parallel import collectives as c
from ernie5.parallel.apply import Layout, Shard
from ernie5.parallel.context import ShiftAhead
from ernie5.parallel.dims import GridDims
from ernie5.parallel.exchange import start_exchange
from ernie5.parallel.state import Axis, build_state, join_processes
from ernie5.parallel.token_split import TokenSplit
from ernie5.parallel.ulysses import _HeadsForTokens, _TokensForHeads
from ernie5.parallel.verify import check_copies

SIZES = (2, 0, 3)
TOTAL = sum(SIZES)


def whole(seed: int) -> torch.Tensor:
    """The same [TOTAL, 2] on every rank."""
    return torch.randn(TOTAL, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def own(x: torch.Tensor, *, axis: Axis) -> torch.Tensor:
    return c.own_part(x, axis=axis, sizes=SIZES).clone()


def run(function: object, x: torch.Tensor, *, cotangent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    out = function(x)
    out.backward(cotangent)
    return out.detach(), x.grad


def check_replicated(axis: Axis) -> None:
    """Functions between replicated and cut tensors; cotangents that differ by rank are `whole(10 + rank)`."""
    rank, mine, parts = axis.coordinate, whole(10 + axis.coordinate), [whole(10 + i) for i in range(3)]
    total = sum(parts)
    out, grad = run(lambda x: c.copy_to(x, axis=axis), whole(0), cotangent=mine)
    assert torch.equal(out, whole(0)) and torch.allclose(grad, total)
    out, grad = run(lambda x: c.reduce_from(x, axis=axis), mine, cotangent=whole(0))
    assert torch.allclose(out, total) and torch.equal(grad, whole(0))
    out, grad = run(lambda x: c.split(x, axis=axis, sizes=SIZES), whole(0), cotangent=own(whole(1), axis=axis))
    assert torch.equal(out, own(whole(0), axis=axis)) and torch.equal(grad, whole(1))
    out, grad = run(lambda x: c.gather(x, axis=axis, sizes=SIZES), own(whole(0), axis=axis), cotangent=whole(1))
    assert torch.equal(out, whole(0)) and torch.equal(grad, own(whole(1), axis=axis))
    out, grad = run(
        lambda x: c.gather_for_work(x, axis=axis, sizes=SIZES), own(whole(0), axis=axis), cotangent=mine
    )
    assert torch.equal(out, whole(0)) and torch.allclose(grad, own(total, axis=axis))
    out, grad = run(
        lambda x: c.reduce_scatter(x, axis=axis, sizes=SIZES), mine, cotangent=own(whole(1), axis=axis)
    )
    assert torch.allclose(out, own(total, axis=axis)) and torch.equal(grad, whole(1))
    columns = whole(0).T.contiguous()
    out = c.all_gather(c.own_part(columns, axis=axis, sizes=SIZES, dim=1), axis=axis, sizes=SIZES, dim=1)
    assert torch.equal(out, columns) and rank < 3


def check_exchange(axis: Axis) -> None:
    """Rank i sends i + j rows to rank j, none of them to itself when i = j = 0."""
    rank = axis.coordinate
    send, receive = [rank + j for j in range(3)], [j + rank for j in range(3)]
    rows = torch.arange(sum(send), dtype=torch.float64).add(100 * rank).unsqueeze(1).repeat(1, 2)
    starts = [100 * j + sum(j + k for k in range(rank)) for j in range(3)]
    expected = [start + i for start, count in zip(starts, receive, strict=True) for i in range(count)]

    def travel(x: torch.Tensor, *, is_async: bool) -> torch.Tensor:
        travelling = start_exchange(x, weights=x[:, :1], axis=axis, send=send, receive=receive, is_async=is_async)
        return travelling.wait()[0]

    for is_async in (False, True):
        out, grad = run(
            lambda x, is_async=is_async: travel(x, is_async=is_async), rows,
            cotangent=torch.full((sum(receive), 2), float(rank), dtype=torch.float64),
        )
        assert out[:, 0].tolist() == expected
        assert grad[:, 0].tolist() == [float(j) for j, count in enumerate(send) for _ in range(count)]
    nothing = torch.empty(0, 2, requires_grad=True)
    c.exchange_rows(nothing, axis=axis, send=[0] * 3, receive=[0] * 3).sum().backward()
    assert nothing.grad.shape == (0, 2)


def check_second(function: object, x: torch.Tensor, *, over: torch.Tensor, weight: float = 1.0) -> None:
    """The gradient of (gradient . over) for a loss of weight * y^3, y = function(x) linear: the adjoint of 6 weight y
    function(over). weight: of this rank, where each rank goes on with y in its own way."""
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(function(leaf).pow(3).sum() * weight, leaf, create_graph=True)
    (second,) = torch.autograd.grad((first * over).sum(), leaf)
    _, expected = run(function, x, cotangent=6 * weight * function(x) * function(over))
    assert torch.allclose(second, expected), (second, expected)


def check_second_derivatives(axis: Axis) -> None:
    """Of everything that is linear; rows that travel beside other work refuse them."""
    rank = axis.coordinate
    mine, part = whole(10 + rank), own(whole(0), axis=axis)
    other, other_part = whole(20 + rank), own(whole(1), axis=axis)
    check_second(lambda x: c.copy_to(x, axis=axis), whole(0), over=whole(1), weight=rank + 1.0)
    check_second(lambda x: c.reduce_from(x, axis=axis), mine, over=other)
    check_second(lambda x: c.split(x, axis=axis, sizes=SIZES), whole(0), over=whole(1), weight=rank + 1.0)
    check_second(lambda x: c.gather(x, axis=axis, sizes=SIZES), part, over=other_part)
    check_second(lambda x: c.gather_for_work(x, axis=axis, sizes=SIZES), part, over=other_part, weight=rank + 1.0)
    check_second(lambda x: c.reduce_scatter(x, axis=axis, sizes=SIZES), mine, over=other, weight=rank + 1.0)
    ways = {"send": [rank + j for j in range(3)], "receive": [j + rank for j in range(3)]}
    rows = torch.arange(2.0 * sum(ways["send"]), dtype=torch.float64).view(-1, 2) + rank
    check_second(lambda x: c.exchange_rows(x, axis=axis, **ways), rows, over=rows.flip(0), weight=rank + 1.0)
    split = TokenSplit(ranks=3, chunk=2, has_sinks=True)
    tokens, others = (torch.randn(1, 5, 2, dtype=torch.float64) for _ in range(2))
    check_second(lambda x: ShiftAhead.apply(x, 1, axis, split), tokens, over=others, weight=rank + 1.0)
    heads, more = (torch.randn(1, 6, 6, 4, dtype=torch.float64) for _ in range(2))
    check_second(lambda x: _HeadsForTokens.apply(x, axis), heads, over=more, weight=rank + 1.0)
    check_second(lambda x: _TokensForHeads.apply(x, axis), heads, over=more, weight=rank + 1.0)
    leaf = rows.clone().requires_grad_()
    (out,) = start_exchange(leaf, axis=axis, is_async=False, **ways).wait()
    try:
        torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    except KernelError as error:
        assert "create_graph=True, and has no second derivative. Set parallel.ep: 1" in str(error)
    else:
        raise AssertionError("a second derivative that would be wrong")


def check_hashes(state: object) -> None:
    """The start-up check accepts what the layout says and names what contradicts it."""
    layout = Layout(state, shards={"w": Shard("w", (3,), (), ("dp_cp",), ("dp_cp",), stages=(0,))})
    check_copies([("w", torch.ones(3))], layout=layout)
    try:
        check_copies([("w", torch.full((3,), float(state.rank == 2)))], layout=layout)
    except EnvironmentFault as error:
        assert "ranks 0 and 2 hold different values of w" in str(error)
    else:
        raise AssertionError("different copies went unnoticed")


def main() -> None:
    """Run all checks; a failed one ends the process with a traceback."""
    torch.set_num_threads(1)
    join_processes(torch.device("cpu"))
    state = build_state(GridDims(dp=3))
    assert state.dp.group is state.dp_cp.group and state.tp.group is None
    check_replicated(state.dp)
    check_exchange(state.dp)
    check_second_derivatives(state.dp)
    check_hashes(state)
    try:
        build_state(GridDims(dp=2))
    except LayoutError as error:
        assert "needs 2 processes, and 3 run" in str(error)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
