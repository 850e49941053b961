"""`ernie5 evaluate CKPT --logits IDS.pt --out LOGITS.pt`: the text logits of given ids, to compare with anyone's.

Computed in fp32 whatever the checkpoint stores, because a comparison should show what differs and not how it rounds.
"""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path

import torch

from ernie5.checkpoint.load import load_model
from ernie5.errors import DataError, EnvironmentFault
from ernie5.model.backbone import UnifiedModel
from ernie5.observe.faults import refusal_of


def write_logits(checkpoint: Path, *, ids: Path, out: Path, device: torch.device | str) -> torch.Tensor:
    """Read ids [B, T] int64 from `ids`, write logits [B, T, V] fp32 to `out` (both torch.save), and return them.

    Raises DataError for anything but such ids, CheckpointError, EnvironmentFault when the disk refuses.
    """
    given = read_ids(ids)
    loaded = load_model(checkpoint, device=device, dtype=torch.float32)
    size = loaded.model.config.vocab_size
    low, high = int(given.min()), int(given.max())
    if low < 0 or high >= size:
        raise DataError(f"{ids} has ids from {low} to {high}; the model knows 0 to {size - 1} (model.vocab_size)")
    logits = text_logits(loaded.model, ids=given)
    save_logits(out, logits=logits)
    return logits


def save_logits(out: Path, *, logits: torch.Tensor) -> None:
    """Write a tensor to `out` as torch.save does, whole or not at all. Raises EnvironmentFault."""
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:  # by its path, torch keeps the system's reason to itself
            torch.save(logits, file)
        temporary.replace(out)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        refusal = refusal_of(error, place="another --out")
        if refusal is None:
            raise
        raise EnvironmentFault(f"{out} cannot be written: {refusal}") from error


def read_ids(path: Path) -> torch.Tensor:
    """The ids [B, T] int64 in a file of torch.save; no pickle is executed. Raises DataError."""
    rule = "Expected a LongTensor [B, T], written by torch.save(ids, path)"
    try:
        ids = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"there is no file {path}. {rule}") from None
    except pickle.UnpicklingError:  # torch's own advice here is to execute whatever the file holds
        raise DataError(f"{path} is no file of tensors alone, and nothing else in it is executed. {rule}") from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} cannot be read ({reason}). {rule}") from None
    if not isinstance(ids, torch.Tensor):
        raise DataError(f"{path} holds a {type(ids).__name__}, no tensor. {rule}")
    if ids.dtype != torch.int64 or ids.dim() != 2 or not ids.numel():
        raise DataError(f"{path} holds {str(ids.dtype).removeprefix('torch.')} {list(ids.shape)}. {rule}, not empty")
    return ids.contiguous()


@torch.no_grad()
def text_logits(model: UnifiedModel, *, ids: torch.Tensor) -> torch.Tensor:
    """ids [B, T] int64, one text document per row -> logits [B, T, V] fp32 on the CPU, row by row to save memory."""
    rows, tokens = ids.shape
    device = model.final_norm.weight.device
    positions = torch.arange(tokens, dtype=torch.float32, device=device)[None, :, None].expand(1, -1, 3)
    columns = torch.arange(tokens, dtype=torch.int32, device=device)
    hidden_never = torch.zeros_like(columns)
    intervals = torch.stack((columns, hidden_never, hidden_never, torch.full_like(columns, tokens)), dim=-1)[None]
    logits = torch.empty(rows, tokens, model.config.vocab_size, dtype=torch.float32)
    for row in range(rows):
        hidden = model.embedding.text(ids[row : row + 1].to(device))
        hidden = model.run_layers(hidden, positions=positions, intervals=intervals)
        logits[row] = model.text_logits(hidden)[0]
    return logits
