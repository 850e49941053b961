"""What stands beside the tensors of a converted model: configs, index, manifest, tokenizer files."""

from __future__ import annotations

import dataclasses
import json
import shutil
from importlib import resources
from pathlib import Path

from ernie5.checkpoint.convert.copying import CopiedTensor, PlannedFile
from ernie5.checkpoint.convert.ernie45_config import CONFIG_NAME, SPECIAL_IDS, SpecialIds, config_values
from ernie5.checkpoint.convert.source import INDEX_NAME, STASH, Source
from ernie5.checkpoint.convert.tokenizer_files import (
    KeptTokenizer,
    copy_side_files,
    identify_foreign,
    keep_foreign,
    restore_code,
    save_own,
)
from ernie5.checkpoint.load import kept_folders
from ernie5.checkpoint.manifest import FileEntry, Manifest, SliceEntry, TensorEntry
from ernie5.checkpoint.names import CONFIG_FILE, MANIFEST_FILE
from ernie5.checkpoint.tensor_file import file_hash
from ernie5.config.base import Config
from ernie5.config.load import config_from_dict, config_to_dict, config_to_yaml
from ernie5.config.registry import resolve
from ernie5.data.config import MixtureConfig
from ernie5.tokenizers.kept import KEPT_FOLDER, bring_kept

TORCH_NAMES = (("F32", "float32"), ("BF16", "bfloat16"), ("F16", "float16"), ("F64", "float64"))
GENERATION_NAME = "generation_config.json"
REMOTE_FILES = ("configuration_ernie5.py", "modeling_ernie5.py")


@dataclasses.dataclass(frozen=True)
class Finished:
    """A conversion whose tensors are written: the folder, where they came from, the plan, and what was copied."""

    folder: Path
    source: Source
    files: tuple[PlannedFile, ...]
    copied: dict[str, CopiedTensor]

    @property
    def dtype(self) -> str:
        """The dtype of most bytes, as safetensors names it."""
        totals: dict[str, int] = {}
        for tensor in self.copied.values():
            totals[tensor.place.dtype] = totals.get(tensor.place.dtype, 0) + tensor.place.num_bytes
        return max(totals, key=lambda name: totals[name])


def write_hub_files(finished: Finished, *, for_paddle: bool) -> tuple[str, ...]:
    """config.json, generation_config.json, the index of shards, tokenizer files; returns notes for people."""
    source, notes = finished.source, []
    tokenizer = _own_tokenizer(finished)
    ids = tokenizer.ids if tokenizer else SpecialIds(None, None, None)
    if tokenizer is not None and tokenizer.note:
        notes.append(tokenizer.note)
    dtype = dict(TORCH_NAMES)[finished.dtype]
    values = config_values(source.model, base=source.hub_config, ids=ids, dtype=dtype, for_paddle=for_paddle)
    _write_json(finished.folder / CONFIG_NAME, values)
    _write_generation(finished.folder, values=values)
    write_index(finished)
    if source.model.mtp.depth and not for_paddle:
        notes.append(f"{source.model.mtp.depth} MTP modules kept; transformers ignores them and drops them on saving")
    return tuple(notes)


def _own_tokenizer(finished: Finished) -> KeptTokenizer | None:
    """Bring the tokenizer's files along: those that the model once came with, or our own text tokenizer."""
    source = finished.source
    stash = source.directory / STASH if source.manifest is not None else source.directory
    copied = copy_side_files(stash, target=finished.folder) if stash.is_dir() else []
    if copied or source.root is None or source.manifest is None:
        restore_code(finished.folder)
        return None
    return save_own(source, folder=finished.folder)


def _write_generation(folder: Path, *, values: dict[str, object]) -> None:
    path = folder / GENERATION_NAME
    if not path.is_file():
        ids = {key: values.get(key) for key in SPECIAL_IDS}
        _write_json(path, {"_from_model_config": True, **{k: v for k, v in ids.items() if v is not None}})


def write_index(finished: Finished) -> None:
    """The index of shards, where there is more than one file."""
    if len(finished.files) > 1:
        total = sum(tensor.place.num_bytes for tensor in finished.copied.values())
        weight_map = {name: tensor.file for name, tensor in finished.copied.items()}
        _write_json(finished.folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_own_files(finished: Finished) -> tuple[str, ...]:
    """config.yaml, manifest.json, and in `huggingface/` the side files of a foreign source; returns notes."""
    source, folder = finished.source, finished.folder
    precision = "bf16" if finished.dtype == "BF16" else "fp32"
    identities, notes = _bring_tokenizers(finished)
    (folder / CONFIG_FILE).write_text(config_to_yaml(_root_config(source, precision=precision)), encoding="utf-8")
    tensors = {
        name: TensorEntry(
            shape=tensor.place.shape, dtype=tensor.place.dtype, num_bytes=tensor.place.num_bytes,
            slices=(SliceEntry(tensor.file, (0,) * len(tensor.place.shape), tensor.place.shape, tensor.crc32),),
        )
        for name, tensor in finished.copied.items()
    }
    names = [CONFIG_FILE, *(planned.name for planned in finished.files)]
    files = {name: FileEntry((folder / name).stat().st_size, file_hash(folder / name)) for name in names}
    past = source.manifest
    manifest = Manifest(
        step=past.step if past else 0, tokens=past.tokens if past else 0, precision=precision,
        tokenizers=identities, files=files, tensors=tensors,
    )
    (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return notes


def _bring_tokenizers(finished: Finished) -> tuple[dict[str, str], tuple[str, ...]]:
    """The identities for the manifest; the tokenizers of our run, or the files of a foreign one, come along."""
    source, folder = finished.source, finished.folder
    if source.manifest is not None:
        if (source.directory / STASH).is_dir():
            shutil.copytree(source.directory / STASH, folder / STASH, dirs_exist_ok=True)
        identities = source.manifest.tokenizers
        bring_kept(folder / KEPT_FOLDER, identities=identities, folders=kept_folders(source.directory))
        return dict(identities), ()
    (folder / STASH).mkdir(exist_ok=True)
    copy_side_files(source.directory, target=folder / STASH)
    _write_json(folder / STASH / CONFIG_NAME, source.hub_config)
    kept = keep_foreign(folder / STASH, checkpoint=folder)
    identity = kept or identify_foreign(folder / STASH)
    notes = () if kept else (
        "no text tokenizer that ernie5 can use came with the model: evaluate it by ids (ernie5 evaluate --logits)",
    )
    return {"text": identity}, notes


def _root_config(source: Source, *, precision: str) -> Config:
    """The training config to put beside the weights; for a foreign model, text alone and everything else by default."""
    schema = resolve("root", name="train")
    if source.root is not None:
        values = config_to_dict(source.root)
        values["model"] = config_to_dict(source.model)
        return config_from_dict(values, schema=schema, name="the converted config")
    shares = {key: 1.0 if key == "text" else 0.0 for key in config_to_dict(MixtureConfig())}
    values = {
        "train": {"steps": 1, "run_dir": f"runs/{source.directory.resolve().name or 'imported'}"},
        "data": {"mixture": shares}, "model": config_to_dict(source.model), "engine": {"precision": precision},
        "tokenizers": {"audio_levels": source.model.audio.levels},
    }
    return config_from_dict(values, schema=schema, name="the imported config")


def write_remote_files(finished: Finished) -> tuple[str, ...]:
    """A directory that needs no ernie5: config.json, our modelling code as files of its own, the index of shards."""
    source, folder = finished.source, finished.folder
    tokenizer = _own_tokenizer(finished)
    ids = tokenizer.ids if tokenizer else SpecialIds(*(source.hub_config.get(key) for key in SPECIAL_IDS))
    values: dict[str, object] = {
        "architectures": ["Ernie5ForCausalLM"], "model_type": "ernie5",
        "auto_map": {
            "AutoConfig": "configuration_ernie5.Ernie5Config",
            "AutoModelForCausalLM": "modeling_ernie5.Ernie5ForCausalLM",
        },
        "model": config_to_dict(source.model),
        "media_tensors": {name: list(place.shape) for name, place in source.extra.items()},
        "torch_dtype": dict(TORCH_NAMES)[finished.dtype],
        "tie_word_embeddings": source.model.tie_embeddings, "vocab_size": source.model.vocab_size,
        "hidden_size": source.model.width, "num_hidden_layers": source.model.layers,
        "num_attention_heads": source.model.query_heads,
        "pad_token_id": ids.pad, "bos_token_id": ids.bos, "eos_token_id": ids.eos,
    }
    _write_json(folder / CONFIG_NAME, values)
    _write_generation(folder, values=values)
    write_index(finished)
    package = resources.files("ernie5.checkpoint.remote")
    for name in REMOTE_FILES:
        (folder / name).write_text(package.joinpath(name).read_text("utf-8"), encoding="utf-8")
    return (tokenizer.note,) if tokenizer is not None and tokenizer.note else ()


def _write_json(path: Path, values: dict[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
