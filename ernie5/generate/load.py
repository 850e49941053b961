"""From a checkpoint to a `Generation`: the one place where generation meets checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from ernie5.checkpoint.load import check_tokenizers, load_model, own_tokenizers
from ernie5.config.arguments import replace_settings
from ernie5.config.base import Config
from ernie5.errors import TokenizerError
from ernie5.generate.config import GenerateConfig
from ernie5.generate.interleave import Generation
from ernie5.tokenizers.bundle import load_tokenizers


@dataclasses.dataclass(frozen=True)
class LoadedGeneration:
    """A model ready to answer; config: the RootConfig it was trained with; step: its optimizer steps."""

    generation: Generation
    config: Config
    step: int


def load_generation(
    path: Path | str, *, changes: dict[str, float | int] | None = None, device: torch.device | str | None = None,
    batch_rows: int = 32,
) -> LoadedGeneration:
    """Load model and tokenizers of the checkpoint at `path` on `device` (default: a GPU where there is one).

    changes: fields of GenerateConfig to replace. Raises CheckpointError and TokenizerError.
    """
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(path, device=place)
    places = own_tokenizers(
        loaded.config.tokenizers, directory=loaded.directory, identities=loaded.manifest.tokenizers
    )
    tokenizers = load_tokenizers(places)
    check_tokenizers(loaded.manifest, identities=dataclasses.asdict(tokenizers.identities))
    rows = loaded.model.config.vocab_size
    if rows != tokenizers.vocab.size_head:
        raise TokenizerError(
            f"model.vocab_size = {rows}, and the tokenizers at hand span {tokenizers.vocab.size_head} ids. An imported "
            "model answers ids of its own vocabulary: ernie5 evaluate CKPT --logits IDS.pt --out LOGITS.pt"
        )
    config: GenerateConfig = replace_settings(
        loaded.config.generate, changes=changes or {}, section="generate"
    )
    generation = Generation(
        loaded.model, tokenizers=tokenizers, data=loaded.config.data, config=config, batch_rows=batch_rows
    )
    return LoadedGeneration(generation, loaded.config, loaded.manifest.step)
