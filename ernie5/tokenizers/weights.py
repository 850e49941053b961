"""Weights of the learned tokenizers on disk: one safetensors file with JSON metadata, its hash the identity.

The one home of safetensors below `checkpoint/`. A directory of a visual or audio tokenizer holds `weights.safetensors`;
the metadata key `ernie5` is a JSON object with `kind` and `config`, so that the file alone rebuilds the module.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ernie5.errors import EnvironmentFault, TokenizerError
from ernie5.observe.faults import refusal_of

FILE_NAME = "weights.safetensors"
EMBEDDED = Path(__file__).parent / "embedded"


@dataclass(frozen=True)
class StoredTokenizer:
    """A read weights file. tensors: by parameter name, as stored; config_json: its config as a JSON object; identity:
    sha256 hex of the file's bytes."""

    kind: str
    config_json: str
    tensors: tuple[tuple[str, torch.Tensor], ...]
    identity: str
    path: Path

    def fill(self, module: nn.Module) -> None:
        """Copy the tensors into `module` in its own dtypes. Raises TokenizerError unless names and shapes agree."""
        own = module.state_dict()
        stored = dict(self.tensors)
        wrong = sorted(set(own) ^ set(stored)) + sorted(
            name for name in set(own) & set(stored) if own[name].shape != stored[name].shape
        )
        if wrong:
            raise TokenizerError(
                f"{self.path} does not fit the {self.kind} tokenizer of this version: {len(wrong)} tensors differ in "
                f"name or shape, the first is {wrong[0]}. Train it again, or use the version that wrote it."
            )
        module.load_state_dict(stored)


def save_weights(
    module: nn.Module, *, kind: str, config_json: str, directory: Path, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Write parameters and buffers (floating ones as `dtype`) to `directory`, atomically; returns the file's path.

    Raises EnvironmentFault when the disk refuses.
    """
    tensors = {
        name: (value.to(dtype) if value.is_floating_point() else value).detach().contiguous().cpu()
        for name, value in module.state_dict().items()
    }
    path = Path(directory) / FILE_NAME
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        header = json.dumps({"kind": kind, "config": json.loads(config_json)})
        save_file(tensors, temporary, metadata={"ernie5": header})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise EnvironmentFault(f"Cannot write {path}: {refusal_of(error, place='another --out')}.") from error
    return path


def load_weights(place: str | Path, *, kind: str) -> StoredTokenizer:
    """Read the tokenizer of `kind` from a directory, a .safetensors file, or the word `embedded`.

    Raises TokenizerError when the file is missing, damaged or of another kind.
    """
    path = EMBEDDED / kind if str(place) == "embedded" else Path(place)
    path = path / FILE_NAME if path.suffix != ".safetensors" else path
    if not path.is_file():
        raise TokenizerError(
            f"There is no {kind} tokenizer at {path}. Name a directory written by `ernie5 tokenizer train`, or "
            f"`embedded`. (tokenizers.{kind})"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("ernie5", "{}"))
            tensors = tuple((name, file.get_tensor(name)) for name in file.keys())
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}. It is damaged or not a safetensors file.") from error
    if metadata.get("kind") != kind:
        found = metadata.get("kind", "no ernie5 tokenizer")
        raise TokenizerError(f"{path} holds {found}, not a {kind} tokenizer. Name another one. (tokenizers.{kind})")
    identity = hashlib.sha256(path.read_bytes()).hexdigest()
    return StoredTokenizer(kind, json.dumps(metadata["config"]), tensors, identity, path)
