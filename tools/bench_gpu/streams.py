"""Kernels that memory bounds: rates are bytes that must move over time, beside a copy's bandwidth in the same run."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from contest import Case, Contest, Run, normal, with_gradients, without_gradients
from torch.nn import functional

from ernie5_kernels.adamw import AdamWStep, AdamWTensors, adamw
from ernie5_kernels.adamw_compact import CompactTensors, Moment, adamw_compact, count_blocks
from ernie5_kernels.moe_permute import permute, plan_permutation, unpermute
from ernie5_kernels.quant_cast import quant_cast
from ernie5_kernels.rms_norm import rms_norm
from ernie5_kernels.rope3d import rope3d, rotation_of
from ernie5_kernels.router_topk import router_topk
from ernie5_kernels.swiglu import swiglu

ROUNDED = 2e-2  # 8 bits; the kernels round once, PyTorch after every step
TOKENS, WIDTH, EXPERT_WIDTH, EXPERTS, TOP_K = 8192, 8192, 3584, 384, 8


def cases(*, quick: bool) -> Iterator[Case]:
    """Every element-wise kernel at the flagship's step on one device; quick: an eighth of the tokens and parameters."""
    tokens = TOKENS // 8 if quick else TOKENS
    for backward in (False, True):
        part = "forward + backward" if backward else "forward"
        for op, build in (("swiglu", activation), ("rms_norm", norm), ("rope3d", rotation), ("unpermute", combine)):
            yield Case(op, part, functools.partial(build, tokens, backward=backward))
    yield Case("permute", "forward", functools.partial(spread, tokens))
    yield Case("router_topk", "forward", functools.partial(route, tokens))
    yield Case("plan_permutation", "forward", functools.partial(order, tokens))
    yield Case("quant_cast", "1 x 128", functools.partial(cast_rows, tokens))
    for transposed in (False, True):
        name = "128 x 128, transposed" if transposed else "128 x 128"
        yield Case("quant_cast", name, functools.partial(cast_weights, 1 if quick else 6, transposed=transposed))
    parameters = (1 << 25) if quick else (1 << 28)
    yield Case("adamw", "fp32", functools.partial(optimizer, parameters))
    yield Case("adamw_compact", "bf16 weights, 8-bit moments", functools.partial(compact_optimizer, parameters))


def activation(tokens: int, *, backward: bool) -> Contest:
    """SwiGLU of all chosen rows."""
    gate_up = normal(tokens * TOP_K, 2 * EXPERT_WIDTH)

    def plain(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return functional.silu(gate) * up

    run = with_gradients if backward else without_gradients
    moved = gate_up.nbytes * (1.5 + (2.5 if backward else 0))  # backward: both inputs and dy in, d(gate, up) out
    return Contest(run(lambda x: swiglu(x, backend="triton"), gate_up), run(plain, gate_up), ROUNDED,
                   {"torch": run(plain, gate_up)}, moved_bytes=moved)


def norm(tokens: int, *, backward: bool) -> Contest:
    """RMSNorm of the residual stream."""
    x, weight = normal(tokens, WIDTH), normal(WIDTH, seed=1)
    run = with_gradients if backward else without_gradients
    plain = run(lambda x, w: functional.rms_norm(x, w.shape, w, 1e-5), x, weight)
    return Contest(run(lambda x, w: rms_norm(x, weight=w, eps=1e-5, backend="triton"), x, weight), plain, ROUNDED,
                   {"torch": plain}, moved_bytes=x.nbytes * (5 if backward else 2))


def rotation(tokens: int, *, backward: bool) -> Contest:
    """Rotation of 64 query heads of 128."""
    x, turn = normal(1, tokens, 64, 128), rotation_of(normal(1, tokens, 64, dtype=torch.float32))
    run = with_gradients if backward else without_gradients
    plain = run(lambda x: rope3d(x, rotation=turn, backend="torch"), x)
    return Contest(run(lambda x: rope3d(x, rotation=turn, backend="triton"), x), plain, ROUNDED, {"torch": plain},
                   moved_bytes=(2 * x.nbytes + turn.nbytes) * (2 if backward else 1))


def choices_of(tokens: int) -> torch.Tensor:
    """Top-k of random scores."""
    return normal(tokens, EXPERTS, dtype=torch.float32, seed=3).topk(TOP_K).indices


def combine(tokens: int, *, backward: bool) -> Contest:
    """Weighted sum of each token's rows."""
    plan = plan_permutation(choices_of(tokens), num_experts=EXPERTS)
    rows, weights = normal(tokens * TOP_K, WIDTH), normal(tokens, TOP_K, dtype=torch.float32, seed=1)
    run = with_gradients if backward else without_gradients

    def by(backend: str) -> Run:
        return run(lambda r, w: unpermute(r, permutation=plan, weights=w, backend=backend), rows, weights)

    out = rows.nbytes // TOP_K
    return Contest(by("triton"), by("torch"), ROUNDED, {"torch": by("torch")},
                   moved_bytes=rows.nbytes * (3 if backward else 1) + out * (2 if backward else 1))


def spread(tokens: int) -> Contest:
    """Copies of every token in the experts' order."""
    plan, x = plan_permutation(choices_of(tokens), num_experts=EXPERTS), normal(tokens, WIDTH)

    def by(backend: str) -> Run:
        return without_gradients(lambda x: permute(x, permutation=plan, backend=backend), x)

    return Contest(by("triton"), by("torch"), 0.0, {"torch": by("torch")}, moved_bytes=x.nbytes * (1 + TOP_K))


def route(tokens: int) -> Contest:
    """Scores, choices, weights and counts; a count may differ by one where two experts differ by less than rounding."""
    logits, bias = normal(tokens, EXPERTS, dtype=torch.float32), normal(EXPERTS, dtype=torch.float32, scale=0.1, seed=1)

    def by(backend: str) -> Run:
        def run() -> tuple[torch.Tensor, ...]:
            choice = router_topk(logits, bias=bias, top_k=TOP_K, backend=backend)
            return choice.scores, choice.counts

        return run

    return Contest(by("triton"), by("reference"), 1e-2, {"torch": by("torch")},
                   moved_bytes=2 * logits.nbytes + tokens * TOP_K * 12)


def order(tokens: int) -> Contest:
    """The experts' order of all slots: choices in, sources and places out."""
    choices = choices_of(tokens)

    def by(backend: str) -> Run:
        def run() -> tuple[torch.Tensor, ...]:
            plan = plan_permutation(choices, num_experts=EXPERTS, backend=backend)
            return plan.offsets, plan.sources, plan.places

        return run

    return Contest(by("triton"), by("torch"), 0.0, {"torch": by("torch")}, moved_bytes=3.0 * choices.nbytes)


def cast_rows(tokens: int) -> Contest:
    """Activations of all chosen rows to e4m3."""
    x = normal(tokens * TOP_K, WIDTH // 2)
    return _cast(x, block_rows=1, transposed=False)


def cast_weights(experts: int, *, transposed: bool) -> Contest:
    """One device's experts to e4m3."""
    return _cast(normal(experts, 2 * EXPERT_WIDTH, WIDTH), block_rows=128, transposed=transposed)


def _cast(x: torch.Tensor, *, block_rows: int, transposed: bool) -> Contest:
    def by(backend: str) -> Run:
        def run() -> tuple[torch.Tensor, ...]:
            cast = quant_cast(x, block_rows=block_rows, transposed=transposed, backend=backend)
            return cast.values, cast.scales

        return run

    # a value on the border of two of e4m3's may go either way: a step of 1/8 at most, beside the largest value
    return Contest(by("triton"), by("torch"), 2.0**-3, {"torch": by("torch")}, moved_bytes=1.5 * x.nbytes)


def sizes_of(parameters: int) -> list[int]:
    """Tensors of 4 Mi and a few odd elements."""
    return [(1 << 22) + 3] * (parameters >> 22)


def optimizer(parameters: int) -> Contest:
    """AdamW in fp32 against torch's fused one: 28 bytes a parameter."""
    sizes = sizes_of(parameters)

    def state() -> list[AdamWTensors]:
        return [AdamWTensors(
            normal(n, dtype=torch.float32, seed=i), normal(n, dtype=torch.float32, seed=i + 1),
            torch.zeros(n, device="cuda"), torch.zeros(n, device="cuda"), 0.1,
        ) for i, n in enumerate(sizes)]

    def values(tensors: list[AdamWTensors]) -> list[torch.Tensor]:
        return [one.parameter for one in tensors[:2]]

    ours, theirs = state(), [one.parameter.clone().requires_grad_() for one in state()]
    for one, other in zip(theirs, ours, strict=True):
        one.grad = other.gradient
    fused = torch.optim.AdamW(theirs, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)

    def step() -> list[torch.Tensor]:
        adamw(ours, step=AdamWStep(1e-3, 0.9, 0.95, 1e-8, 1), backend="triton")
        return values(ours)

    def peer() -> list[torch.Tensor]:
        fused.step()
        return [one.detach() for one in theirs[:2]]

    return Contest(step, peer, 1e-5, {"torch fused": peer}, moved_bytes=28.0 * sum(sizes), graph=False)


def compact_optimizer(parameters: int) -> Contest:
    """AdamW without masters and with codes for moments against the same in PyTorch, which must give the same bits, and
    beside AdamW over fp32 masters and moments: 8 1/16 bytes a parameter, theirs 28."""
    sizes = sizes_of(parameters)

    def state() -> list[CompactTensors]:
        def moment(n: int) -> Moment:
            return Moment(
                torch.zeros(n, dtype=torch.uint8, device="cuda"), torch.zeros(count_blocks(n), device="cuda")
            )

        return [CompactTensors(normal(n, seed=i), normal(n, seed=i + 1), moment(n), moment(n), 0.1, seed=i)
                for i, n in enumerate(sizes)]

    full = [AdamWTensors(
        normal(n, dtype=torch.float32, seed=i), normal(n, seed=i + 1), torch.zeros(n, device="cuda"),
        torch.zeros(n, device="cuda"), 0.1, copy=torch.empty(n, dtype=torch.bfloat16, device="cuda"),
    ) for i, n in enumerate(sizes)]
    step = AdamWStep(1e-3, 0.9, 0.95, 1e-8, 1)

    def by(backend: str) -> Run:
        tensors = state()

        def run() -> list[torch.Tensor]:
            adamw_compact(tensors, step=step, backend=backend)
            one = tensors[1]
            return [one.parameter, one.first.values, one.first.scales, one.second.values, one.second.scales]

        return run

    torchs = by("reference")
    peers = {"torch": torchs, "adamw fp32": lambda: adamw(full, step=step, backend="triton")}
    return Contest(by("triton"), torchs, 0.0, peers, moved_bytes=(8 + 1 / 16) * sum(sizes), graph=False)
