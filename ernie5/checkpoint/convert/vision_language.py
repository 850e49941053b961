"""The text part of Ernie4_5_VLMoe back into a whole model: text tensors replaced, everything else as it was."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch

from ernie5.checkpoint.convert.ernie45_config import CONFIG_NAME, SpecialIds, config_values
from ernie5.checkpoint.convert.layouts import Piece, Stored, is_vision, vl_hub_layout, vl_memory_layout
from ernie5.checkpoint.convert.source import VL_FORMAT, Location, Source, open_source, read_shards
from ernie5.checkpoint.convert.tokenizer_files import copy_side_files
from ernie5.errors import CheckpointError
from ernie5.model.config import ModelConfig, MTPConfig

PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def insert_text(
    source: Source, *, into: Path | None
) -> tuple[tuple[Stored, ...], dict[str, Location | torch.Tensor], Source]:
    """The tensors of the model `into` with the text pieces of `source`; returns layout, pieces, and the opened base.

    Raises CheckpointError where the two text models differ in shape or function.
    """
    if into is None:
        raise CheckpointError(f"--to {VL_FORMAT} needs --into VL_DIR, the model whose text part is to be replaced")
    base = open_source(into)
    if base.format != VL_FORMAT:
        raise CheckpointError(f"--into {into} is {base.format}, not the hub layout of Ernie4_5_VLMoe")
    ours, theirs = (_described(opened.model) for opened in (source, base))
    keys = [key for key, value in theirs.items() if ours.get(key) != value]
    differing = [f"{key}: {ours.get(key)} here, {theirs[key]} there" for key in keys]
    if differing:
        raise CheckpointError(f"the text model does not fit into {into}: {'; '.join(differing)}")
    table = {s.name: s for layout in (vl_hub_layout(base.model), vl_memory_layout(base.model)) for s in layout}
    layout, pieces = [], dict(source.pieces)
    for name, place in read_shards(into).items():
        stored = table.get(name)
        if stored is None or is_vision(name, num_experts=base.model.moe.num_experts):
            piece = Piece(f"vision {name}", place.shape)
            stored, pieces[piece.name] = Stored(name, place.shape, (piece,)), Location(place, 0, False)
        layout.append(stored)
    pieces |= {name: found for name, found in base.pieces.items() if name not in pieces}
    return tuple(layout), pieces, base


def _described(model: ModelConfig) -> dict[str, object]:
    """Everything of a text model that decides shapes and function; MTP modules have no place in the base."""
    plain = dataclasses.replace(model, mtp=MTPConfig(depth=0))
    return config_values(plain, base={}, ids=SpecialIds(None, None, None), dtype="")


def write_vl_side_files(folder: Path, *, base: Source) -> None:
    """Config, tokenizer and processor files are those of the base."""
    copy_side_files(base.directory, target=folder)
    for name in (CONFIG_NAME, *PROCESSORS):
        if (base.directory / name).is_file():
            shutil.copyfile(base.directory / name, folder / name)
