"""A router as one operator: product, scores, choice and weights (SPEC section 1), at least fp32 throughout."""

from __future__ import annotations

import dataclasses

import torch

from ernie5.errors import KernelError

from ..checks import require, require_beside, require_fractions, require_shape, require_within
from ..dispatch import choose_backend
from ..linear import linear
from ..native.library import runs_native
from ..router_topk import router_topk, weigh
from .logits import router_logits
from .native import route_native

OFFERED = ("native", "triton", "torch", "reference")
OP = "route"


@dataclasses.dataclass(frozen=True)
class Route:
    """choices [N, K] int64; weights [N, K] at least fp32. scores and logits [N, E], for losses of balance, where they
    were asked for, else None."""

    choices: torch.Tensor
    weights: torch.Tensor
    scores: torch.Tensor | None
    logits: torch.Tensor | None


def route(
    hidden: torch.Tensor,
    *,
    weight: torch.Tensor,
    bias: torch.Tensor,
    top_k: int,
    uses_sigmoid: bool = True,
    scale: float = 1.0,
    active: torch.Tensor | None = None,
    choices: torch.Tensor | None = None,
    keeps_scores: bool = False,
    backend: str = "auto",
) -> Route:
    """Choose top-k(score + bias) with score = sigmoid or softmax of W x, and weigh as `router_topk` does.

    hidden [N, D]; weight [E, D]; bias [E] fp32; active [E] bool leaves experts out; choices [N, K] int64 are weighed as
    they are instead of being made. bf16 hidden and weight are multiplied exactly and summed in fp32.

    Without `keeps_scores` the C++ of the CPU keeps no [N, E] tensor, and its gradient visits the chosen experts alone:
    weights do not depend on the others. (They do by softmax where the chosen scores sum to less than 1e-12; that part
    is left out.) Raises KernelError for a backend that cannot run, ValueError for shapes.
    """
    _require(hidden, weight=weight, bias=bias, top_k=top_k, active=active, choices=choices)
    if keeps_scores and backend == "native":
        raise KernelError("route: native keeps no scores of all experts, which keeps_scores asks for. Use backend auto")
    has_fp32 = bias.dtype == torch.float32
    rule = "native takes float32; use auto or torch"
    require(has_fp32 or backend != "native", op=OP, name="bias", tensor=bias, rule=rule)
    native = runs_native(hidden, weight) and has_fp32 and not keeps_scores
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    chosen = choose_backend(backend, op=OP, offered=OFFERED, device=hidden.device, dtype=dtype, native=native)
    if chosen == "native":
        return Route(*route_native(hidden, weight, bias, active, choices, top_k, uses_sigmoid, scale), None, None)
    if chosen == "reference":
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logits = linear(hidden.to(wide), weight=weight.to(wide), backend="reference")
    else:
        logits = router_logits(hidden, weight=weight)
    if active is not None:
        logits = logits.masked_fill(~active, float("-inf"))
    if choices is not None:
        scores = torch.sigmoid(logits) if uses_sigmoid else torch.softmax(logits, dim=-1)
        return Route(choices, weigh(scores, choices=choices, scale=scale), scores, logits)
    made = router_topk(
        logits, bias=bias, top_k=top_k, uses_sigmoid=uses_sigmoid, scale=scale, active=active, backend=chosen
    )
    return Route(made.choices, made.weights, made.scores, logits)


def _require(
    hidden: torch.Tensor, *, weight: torch.Tensor, bias: torch.Tensor, top_k: int, active: torch.Tensor | None,
    choices: torch.Tensor | None,
) -> None:
    require(hidden.ndim == 2, op=OP, name="hidden", tensor=hidden, rule="it must be [tokens, width]")
    require_fractions(hidden, op=OP, name="hidden")
    fits = weight.ndim == 2 and weight.shape[1] == hidden.shape[1]
    require(fits, op=OP, name="weight", tensor=weight, rule=f"it must be [experts, {hidden.shape[1]}]")
    require_fractions(weight, op=OP, name="weight")
    require_beside(weight, first=hidden, op=OP, name="weight")
    experts = weight.shape[0]
    if not 1 <= top_k <= experts:
        raise ValueError(f"route: top_k is {top_k}; it must be between 1 and the {experts} experts")
    require_shape(bias, shape=(experts,), op=OP, name="bias", meaning="one per expert")
    require_fractions(bias, op=OP, name="bias")
    require_beside(bias, first=hidden, op=OP, name="bias")
    if active is not None:
        require_shape(active, shape=(experts,), op=OP, name="active", meaning="one per expert")
        require(active.dtype == torch.bool, op=OP, name="active", tensor=active, rule="it must be bool")
        require_beside(active, first=hidden, op=OP, name="active")
    if choices is not None:
        require_shape(choices, shape=(hidden.shape[0], top_k), op=OP, name="choices", meaning="top_k per token")
        require(choices.dtype == torch.int64, op=OP, name="choices", tensor=choices, rule="it must be int64")
        require_beside(choices, first=hidden, op=OP, name="choices")
        require_within(choices, limit=experts, op=OP, name="choices")
