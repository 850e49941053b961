"""`convert`: open the source, plan the target, copy, write what stands beside the tensors, publish."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import torch

from ernie5.checkpoint.convert.copying import copy_tensors, describe_plan, file_stamps, plan_files, total_bytes
from ernie5.checkpoint.convert.ernie45_config import refuse_inexpressible
from ernie5.checkpoint.convert.finish import Finished, write_hub_files, write_index, write_own_files, write_remote_files
from ernie5.checkpoint.convert.layouts import Piece, Stored, hub_layout, own_layout, paddle_layout
from ernie5.checkpoint.convert.source import VL_FORMAT, Location, Source, open_source
from ernie5.checkpoint.convert.upcycle import Upcycling, upcycle
from ernie5.checkpoint.convert.vision_language import insert_text, write_vl_side_files
from ernie5.checkpoint.convert.workspace import Workspace, check_target, growing, publish
from ernie5.checkpoint.manifest import Manifest
from ernie5.checkpoint.verify import find_damage
from ernie5.errors import CheckpointError

HUB, PADDLE, OWN, REMOTE, UPCYCLE = "ernie45-hf", "ernie45-paddle", "ernie5", "ernie5-hf", "upcycle"
FORMATS = (HUB, PADDLE, VL_FORMAT, OWN, REMOTE, UPCYCLE)
ALIASES = (("paddle", PADDLE),)


@dataclasses.dataclass(frozen=True)
class Request:
    """One conversion. dtype: BF16 | F16 | F32 or None to keep; shard_bytes: of foreign files; masters: take the fp32
    masters; text_only: leave media embeddings and heads out; upcycling: the experts to make of a dense model; into: the
    Ernie4_5_VLMoe whose text part is replaced."""

    source: Path
    target: Path
    format: str
    dtype: str | None = None
    shard_bytes: int = 5 * 10**9
    masters: bool = False
    text_only: bool = False
    force: bool = False
    upcycling: Upcycling | None = None
    into: Path | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """What a conversion did: tensors and bytes written, tensors found finished from a killed run, notes for people."""

    source_format: str
    num_tensors: int
    num_bytes: int
    resumed_tensors: int
    notes: tuple[str, ...]


def convert(request: Request) -> Report:
    """Write `request.target` from `request.source`; a killed call is continued by the same call.

    Raises CheckpointError for everything that does not fit, by name, before a byte is written.
    """
    if not request.source.exists():
        raise CheckpointError(f"{request.source} does not exist. Give a checkpoint, a run or a model directory")
    source = open_source(request.source, masters=request.masters)
    check_target(request.target, source=source.directory, force=request.force)
    _check_bytes(source.directory, manifest=source.manifest, with_optimizer=request.masters)
    source = _chosen_part(source, request=request)
    if request.into is not None and request.format != VL_FORMAT:
        raise CheckpointError(f"--into belongs to --to {VL_FORMAT}")
    if request.format == UPCYCLE:
        source = upcycle(source, settings=request.upcycling)
    base = source
    if request.format == VL_FORMAT:
        layout, pieces, base = insert_text(source, into=request.into)
    else:
        layout, pieces = _target(source, name=request.format)
    single = request.format in (OWN, UPCYCLE)
    files = plan_files(
        layout, pieces=pieces, dtype=request.dtype, keep_fp32=request.format in (HUB, PADDLE, VL_FORMAT),
        shard_bytes=None if single else request.shard_bytes,
    )
    stamps = file_stamps([p for item in pieces.values() if isinstance(item, Location) for p in item.place.paths])
    described = [request.format, request.masters, describe_plan(files), stamps, repr(source.model)]
    fingerprint = hashlib.sha256(json.dumps(described).encode()).hexdigest()
    with growing(request.target) as folder:
        workspace = Workspace(folder, fingerprint=fingerprint)
        copied = copy_tensors(files, pieces=pieces, workspace=workspace)
        finished = Finished(folder, source, tuple(files), copied)
        if single:
            notes = write_own_files(finished)
        elif request.format == REMOTE:
            notes = write_remote_files(finished)
        elif request.format == VL_FORMAT:
            notes = ()
            write_index(finished)
            write_vl_side_files(folder, base=base)
        else:
            notes = write_hub_files(finished, for_paddle=request.format == PADDLE)
        publish(folder, target=request.target)
    return Report(source.format, len(copied), total_bytes(files), workspace.resumed, (*source.notes, *notes))


def _check_bytes(directory: Path, *, manifest: Manifest | None, with_optimizer: bool) -> None:
    """A flipped byte must not become a good-looking export: compare our own checkpoints with their checksums first."""
    if manifest is not None:
        damage = find_damage(directory, manifest=manifest, with_optimizer=with_optimizer)
        if damage:
            raise CheckpointError(f"{'; '.join(damage)}. Take another checkpoint")


def _chosen_part(source: Source, *, request: Request) -> Source:
    """Leave media out where asked to, and refuse to lose them in silence."""
    if request.text_only:
        model = dataclasses.replace(source.model, modalities=("text",))
        notes = (*source.notes, f"text only: {len(source.extra)} tensors of other modalities are left out")
        return dataclasses.replace(source, model=model, extra={}, notes=notes if source.extra else source.notes)
    if source.extra and request.format in (HUB, PADDLE, VL_FORMAT):
        media = f"{len(source.extra)} tensors of other modalities, first: {min(source.extra)}"
        refuse_inexpressible(source.model, media=media)
    return source


def _target(source: Source, *, name: str) -> tuple[tuple[Stored, ...], dict[str, Location | torch.Tensor]]:
    """The tensors of the target, and where their pieces come from."""
    pieces: dict[str, Location | torch.Tensor] = dict(source.pieces)
    if name in (HUB, PADDLE):
        refuse_inexpressible(source.model)
        return (paddle_layout if name == PADDLE else hub_layout)(source.model), pieces
    extra = []
    for key, place in source.extra.items():
        piece = Piece(f"own {key}", place.shape)
        pieces[piece.name] = Location(place, 0, False)
        extra.append(Stored(key, place.shape, (piece,)))
    return (*own_layout(source.model), *extra), pieces
