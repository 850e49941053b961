"""Dense to sparse: cut every feed-forward into fine-grained experts so that the first step computes what it did.

With F the dense width and m the expert width, g = F / m experts hold the slices of one feed-forward:

    dense(x) = W_d (silu(W_g x) * (W_u x)) = sum over s < g of D_s (silu(G_s x) * (U_s x))                (1)

where G_s, U_s are rows [s m, (s+1) m) of gate and up, D_s the same columns of down. E = c g experts are c copies of the
slices. Router weights are zero, so that every score is equal and a choice of g experts weighs each by 1/g; the scale g
undoes that. The balance bias prefers copy 0 by `PREFERENCE`, so that the choice is each slice once: equation (1).
Training moves the router at once, because each expert answers differently; the balance update brings the copies in.
"""

from __future__ import annotations

import dataclasses
import re

import torch

from ernie5.checkpoint.convert.layouts import Piece, own_layout
from ernie5.checkpoint.convert.source import Location, Source
from ernie5.errors import CheckpointError
from ernie5.model.config import MoEConfig

# A few steps of the balance update, which moves by 1e-4 and more, undo it; any positive number decides a tie.
PREFERENCE = 1e-3
EXPERT = re.compile(r"(.*\.mlp)\.experts\.(\d+)\.(gate|up|down)_proj\.weight")


@dataclasses.dataclass(frozen=True)
class Upcycling:
    """expert_width m divides the dense width; copies c of every slice; dense_layers stay dense at the beginning."""

    expert_width: int
    copies: int = 1
    dense_layers: int = 0


def upcycle(source: Source, *, settings: Upcycling | None) -> Source:
    """The sparse model that a dense `source` becomes. Raises CheckpointError where widths do not fit."""
    model = source.model
    if settings is None:
        raise CheckpointError("--to upcycle needs --expert-width, the SwiGLU width of one expert")
    if model.moe_layers:
        raise CheckpointError(f"{source.directory} has experts in {len(model.moe_layers)} layers already: only dense "
                              "models are upcycled")
    width, copies = settings.expert_width, settings.copies
    if width < 1 or copies < 1 or model.dense_width % width or model.dense_width == width:
        raise CheckpointError(
            f"--expert-width {width}, --copies {copies}: the width must be a proper divisor of the dense width "
            f"{model.dense_width}, and there must be one copy or more"
        )
    if not 0 <= settings.dense_layers < model.layers:
        raise CheckpointError(f"--dense-layers {settings.dense_layers} leaves none of {model.layers} layers to upcycle")
    slices = model.dense_width // width
    moe = MoEConfig(
        num_experts=slices * copies, top_k=slices, expert_width=width, score="softmax", scale=float(slices)
    )
    sparse = dataclasses.replace(model, dense_layers=settings.dense_layers, moe=moe)
    pieces = dict(source.pieces)
    for stored in own_layout(sparse):
        for piece in stored.pieces:
            if piece.name not in source.pieces:
                pieces[piece.name] = _made(piece, source=source, slices=slices, width=width)
    return dataclasses.replace(source, model=sparse, pieces=pieces, hub_config={})


def _made(piece: Piece, *, source: Source, slices: int, width: int) -> Location | torch.Tensor:
    """A slice of a dense feed-forward, or the router's first values."""
    found = EXPERT.fullmatch(piece.name)
    if found is None:
        values = torch.zeros(piece.shape)
        if piece.name.endswith("e_score_correction_bias"):
            values[:, :slices] = PREFERENCE
        return values
    first = int(found[2]) % slices * width
    dense = source.pieces[f"{found[1]}.{found[3]}_proj.weight"]
    if found[3] != "down":
        return dataclasses.replace(dense, row=dense.row + first)
    if dense.flipped:  # [in, out] on disk: a slice of the inputs is a range of rows there
        raise CheckpointError(f"{source.directory}: convert the Paddle layout to ernie5 first, then upcycle")
    return dataclasses.replace(dense, column=first)
