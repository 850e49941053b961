"""The checkpoint whose weights a new run starts from (`train.init_from`): weights alone, from whatever wrote them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path

import torch

from ernie5.checkpoint.command import flatten
from ernie5.checkpoint.load import check_together, open_manifest, refuse_damage
from ernie5.checkpoint.manifest import Manifest
from ernie5.checkpoint.names import CONFIG_FILE, MASTER_PREFIX, find_checkpoint
from ernie5.checkpoint.stored import StoredTensors
from ernie5.checkpoint.verify import find_missing
from ernie5.config.base import Config
from ernie5.config.load import load_config
from ernie5.config.registry import resolve
from ernie5.engine.interface import BUFFER, PARAMETER, Engine
from ernie5.model.config import ModelConfig
from ernie5.observe.log import get_log
from ernie5.parallel.boxes import Box


@dataclasses.dataclass(frozen=True)
class Origin:
    """A checkpoint to take weights from, where it lies, and its manifest."""

    directory: Path
    manifest: Manifest


class SavedWeights:
    """The weights and buffers of a checkpoint, as a StateSource for a run that starts from them alone: fp32 masters
    where there are some, else the weights as stored. buffers: the names of the model's buffers."""

    def __init__(self, tensors: StoredTensors, *, buffers: Collection[str]) -> None:
        self._tensors, self.updates, self.magnitudes = tensors, 0, torch.zeros(0)
        stored = {key: entry.shape for key, entry in tensors.entries.items() if "/" not in key}
        self._shapes = {
            PARAMETER: {key: shape for key, shape in stored.items() if key not in buffers},
            BUFFER: {key: shape for key, shape in stored.items() if key in buffers},
        }

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """As StateSource."""
        return self._shapes[kind]

    def read(self, key: str, *, box: Box, into: torch.Tensor) -> None:
        """As StateSource."""
        master = MASTER_PREFIX + key
        self._tensors.read(master if master in self._tensors.entries else key, box=box, into=into)


def open_origin(path: Path | str) -> Origin:
    """Open a checkpoint, folder of checkpoints or run for its weights, after checking that its files are there in full.

    Raises CheckpointError; a directory of another format names the command that imports it.
    """
    directory = find_checkpoint(path)
    manifest = open_manifest(directory)
    refuse_damage(find_missing(directory, manifest=manifest, needed=(CONFIG_FILE,)), directory=directory)
    return Origin(directory, manifest)


def start_from(origin: Origin, *, config: Config, engine: Engine) -> None:
    """Give the engine the weights of `origin`; each rank reads what it holds. config: the new run's (RootConfig).

    Raises CheckpointError, on every rank, for damage and for every tensor that does not fit. Settings of the
    architecture that leave all shapes as they are (top_k, rotary base) may differ and are said once.
    """
    check_together(origin.directory, manifest=origin.manifest, engine=engine)
    found = engine.gather({"buffers": sorted({part.key for part in engine.slices() if part.kind == BUFFER})})
    buffers = {name for one in found for name in one["buffers"]}
    tensors = StoredTensors(origin.directory, manifest=origin.manifest)
    engine.load_weights(SavedWeights(tensors, buffers=buffers))
    if engine.is_main:
        get_log().info("weights of %s (step %d), new optimizer", origin.directory, origin.manifest.step)
        _say_differences(origin.directory, config=config, model=engine.model.config)


def _say_differences(directory: Path, *, config: Config, model: ModelConfig) -> None:
    """Settings of a modality that the model lacks describe no weights, and an import from a text model made them up."""
    then = flatten(load_config(directory / CONFIG_FILE, schema=resolve("root", name="train")))
    parts = (("model.visual.", model.has_visual), ("model.audio.", model.has_audio))
    absent = tuple(prefix for prefix, is_there in parts if not is_there)
    for key, value in flatten(config).items():
        if key.startswith("model.") and not key.startswith(absent) and then.get(key) != value:
            get_log().warning(
                "%s was %s when these weights were trained, is %s", key, json.dumps(then.get(key)), json.dumps(value)
            )
