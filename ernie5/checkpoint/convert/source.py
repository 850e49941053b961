"""Where the pieces of a model lie: a checkpoint of ours, or a directory of any known foreign format."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path

from ernie5.checkpoint.convert.ernie45_config import (
    CONFIG_NAME,
    EXPORT,
    SPECIAL_IDS,
    VISION,
    ConfigFile,
    model_config_of,
    model_type_of,
    read_config_file,
)
from ernie5.checkpoint.convert.layouts import (
    Stored,
    hub_layout,
    is_vision,
    memory_layout,
    own_layout,
    paddle_layout,
    vl_hub_layout,
    vl_memory_layout,
)
from ernie5.checkpoint.manifest import Manifest, read_manifest
from ernie5.checkpoint.names import (
    CONFIG_FILE,
    MANIFEST_FILE,
    MASTER_PREFIX,
    OPTIMIZER_FILE,
    find_checkpoint,
    is_optimizer_file,
)
from ernie5.checkpoint.stored import StoredTensors
from ernie5.checkpoint.tensor_slices import TensorPlace, read_header
from ernie5.config.base import Config
from ernie5.config.load import config_from_dict, load_config
from ernie5.config.registry import resolve
from ernie5.errors import CheckpointError
from ernie5.model.config import ModelConfig

VL_FORMAT, EXPORT_FORMAT = "ernie45-vl", "ernie5-hf"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
LISTED_PROBLEMS = 6
MTP_KEY = re.compile(r"\bmtp_(?:emb_norm|hidden_norm|linear_proj|block)\.(\d+)\.")


@dataclasses.dataclass(frozen=True)
class Location:
    """Where a piece lies: in tensor `place`, from row `row` of the pieces' common first dim; flipped: as `[in, out]`;
    column: first of the piece's columns in a wider matrix that is not flipped, None where it has them all."""

    place: TensorPlace
    row: int
    flipped: bool
    column: int | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """A model on disk. pieces: by name on the hub; extra: own tensors without pieces (media), by own name; root: its
    training config, None for a foreign one; hub_config: the config.json it came with; notes: what the user should know.
    """

    directory: Path
    format: str
    model: ModelConfig
    pieces: dict[str, Location]
    extra: dict[str, TensorPlace]
    root: Config | None
    manifest: Manifest | None
    hub_config: dict[str, object]
    notes: tuple[str, ...]


def open_source(path: Path, *, masters: bool = False) -> Source:
    """Find out what `path` holds and locate every piece. masters: take the fp32 masters beside bf16 weights.

    Raises CheckpointError naming unknown, missing and wrong-shaped tensors, damaged files, unsupported settings.
    """
    if (path / CONFIG_NAME).is_file() and not (path / MANIFEST_FILE).is_file():
        if masters:
            raise CheckpointError(f"--masters: {path} has no optimizer state. Only checkpoints of ernie5 have masters")
        return _open_foreign(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    return _open_own(find_checkpoint(path), masters=masters)


def _open_own(directory: Path, *, masters: bool) -> Source:
    manifest = read_manifest(directory)
    root = load_config(directory / CONFIG_FILE, schema=resolve("root", name="train"))
    tensors = StoredTensors(directory, manifest=manifest)
    places = {key: tensors.place(key) for key in manifest.tensors if "/" not in key}
    if masters:
        if not any(is_optimizer_file(name) for name in manifest.files):
            raise CheckpointError(
                f"--masters: {directory} has no {OPTIMIZER_FILE}: it holds weights alone. Give the checkpoint of the "
                "run that it was made of, or leave --masters out for the weights as they are (--dtype fp32 widens them)"
            )
        held = [key for key in manifest.tensors if key.startswith(MASTER_PREFIX)]
        places |= {key.removeprefix(MASTER_PREFIX): tensors.place(key) for key in held}
    pieces, extra = _own_pieces(directory, places=places, model=root.model)
    stash = directory / STASH / CONFIG_NAME
    hub_config = read_config_file(stash).values if stash.is_file() else {}
    return Source(directory, "ernie5", root.model, pieces, extra, root, manifest, hub_config, ())


def _own_pieces(
    directory: Path, *, places: dict[str, TensorPlace], model: ModelConfig
) -> tuple[dict[str, Location], dict[str, TensorPlace]]:
    """The pieces of a model under our own names, and what belongs to media."""
    table = {stored.name: stored for stored in own_layout(model)}
    extra = {name: place for name, place in places.items() if name not in table}
    foreign = [name for name in extra if not _is_media(name)]
    known = {name: place for name, place in places.items() if name not in extra}
    return _locate(directory, places=known, tables=(table,), unknown=foreign), extra


def _open_export(path: Path, *, file: ConfigFile) -> Source:
    """What --to ernie5-hf wrote, or transformers made of it: our names, the whole model's config, no tokenizers but the
    text's."""
    values, shapes = file.values.get("model"), file.values.get("media_tensors")
    if not isinstance(values, dict) or not isinstance(shapes, dict):
        rule = "what --to ernie5-hf writes has the sections model and media_tensors too"
        raise file.fail("model_type", f"{rule}. Use the checkpoint that it was made from")
    model = config_from_dict(values, schema=ModelConfig, name=str(path / CONFIG_NAME))
    places = read_shards(path)
    pieces, extra = _own_pieces(path, places=places, model=model)
    for name, shape in shapes.items():
        if name not in extra or list(extra[name].shape) != shape:
            found = f"has shape {list(extra[name].shape)}" if name in extra else "is missing"
            raise CheckpointError(f"the tensors of {path} do not fit its config: {name} {found}, wanted is {shape}")
    note = "tokenizers of pictures and sound are none of the export's: those of this installation are meant"
    ids = {key: file.values.get(key) for key in SPECIAL_IDS}
    return Source(path, EXPORT_FORMAT, model, pieces, extra, None, None, ids, (note,) if extra else ())


# Where a converted checkpoint keeps the files of the directory that it came from.
STASH = "huggingface"


def _is_media(name: str) -> bool:
    return name.startswith(("embedding.vision.", "embedding.cells.", "embedding.audio.", "bit_head.", "audio_head."))


def _open_foreign(path: Path) -> Source:
    file = read_config_file(path / CONFIG_NAME)
    if file.values.get("model_type") == EXPORT:
        return _open_export(path, file=file)
    places = read_shards(path)
    from_paddle = any(name.startswith("ernie.") for name in places)
    depths = [int(found[1]) for name in places if (found := MTP_KEY.search(name))]
    model = model_config_of(file, mtp_depth=max(depths, default=-1) + 1, from_paddle=from_paddle)
    notes: list[str] = []
    if model_type_of(file) in VISION:
        if from_paddle:
            raise CheckpointError(f"{path}: the Paddle layout of Ernie4_5_VLMoe is not supported. Take its -PT release")
        kept = {k: v for k, v in places.items() if not is_vision(k, num_experts=model.moe.num_experts)}
        notes.append(f"text part only: {len(places) - len(kept)} tensors of pictures and their experts are left out")
        name, places, layouts = VL_FORMAT, kept, (vl_hub_layout(model), vl_memory_layout(model))
    elif from_paddle:
        name, layouts = "ernie45-paddle", (paddle_layout(model),)
    else:
        name, layouts = "ernie45-hf", (hub_layout(model), memory_layout(model))
    notes += _mtp_notes(file, depth=model.mtp.depth)
    places = _without_tied_head(path, places=places, model=model)
    tables = tuple({stored.name: stored for stored in layout} for layout in layouts)
    pieces = _locate(path, places=places, tables=tables, unknown=[])
    return Source(path, name, model, pieces, {}, None, None, dict(file.values), tuple(notes))


def _mtp_notes(file: ConfigFile, *, depth: int) -> list[str]:
    promised = file.values.get("num_nextn_predict_layers") or 0
    if promised == depth:
        return []
    return [f"config.json promises {promised} MTP modules, the tensors hold {depth} (transformers drops them)"]


def read_shards(path: Path) -> dict[str, TensorPlace]:
    """All tensors of a directory of safetensors, by the index where there is one.

    Raises CheckpointError for missing shards, names that the index and the shards do not share, and pickles.
    """
    index = path / INDEX_NAME
    if not index.is_file():
        single = path / SINGLE_NAME
        files = [single] if single.is_file() else sorted(path.glob("*.safetensors"))
        if not files:
            hint = " Pickled *.bin files are not read: they can execute code." if list(path.glob("*.bin")) else ""
            raise CheckpointError(f"{path} holds no *.safetensors.{hint} Save the model with safe_serialization=True")
        return _merged(files)
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        names = sorted({str(name) for name in weight_map.values()})
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{index} is damaged ({error!r})") from None
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(f"{index} names {outside[0]!r}, a file outside of the directory")
    places = _merged([path / name for name in names])
    apart = sorted(key for key in {*weight_map, *places} if key not in places or key not in weight_map)
    apart += [key for key, file in weight_map.items() if key in places and places[key].path.name != file]
    if apart:
        key = apart[0]
        where = places[key].path.name if key in places else "no shard"
        raise CheckpointError(
            f"{index} and the shards disagree about {len(apart)} tensors: {key} is in {where}, the index says "
            f"{weight_map.get(key, 'nothing')}. Copy the directory again"
        )
    return places


def _merged(files: list[Path]) -> dict[str, TensorPlace]:
    places: dict[str, TensorPlace] = {}
    for file in files:
        for name, place in read_header(file).items():
            if name in places:
                raise CheckpointError(f"tensor {name} is in {places[name].path} and in {file}. Remove one of them")
            places[name] = place
    return places


def _locate(
    directory: Path, *, places: dict[str, TensorPlace], tables: tuple[dict[str, Stored], ...], unknown: list[str]
) -> dict[str, Location]:
    """The location of every piece; raises CheckpointError with every difference between tensors and config named."""
    problems, pieces = [], {}
    for name, place in places.items():
        stored = next((table[name] for table in tables if name in table), None)
        if stored is None:
            unknown = [*unknown, name]
            continue
        # The MTP projection of the 300B release was shipped the other way round; D x 2D can never be square.
        turned = "linear_proj" in name and place.shape == stored.shape[::-1]
        if place.shape != stored.shape and not turned:
            problems.append(f"{name} has shape {list(place.shape)}, the config gives {list(stored.shape)}")
            continue
        row = 0
        for piece in stored.pieces:
            pieces[piece.name] = Location(place, row, stored.transposed != turned)
            row += piece.shape[0]
    seen = {name for name in places}
    candidates = [
        [s.name for s in table.values() if s.name not in seen and any(p.name not in pieces for p in s.pieces)]
        for table in tables
    ]
    wrong = {problem.split(" ", 1)[0] for problem in problems}
    missing = [name for name in min(candidates, key=len) if name not in wrong]
    problems += [f"{name} is missing" for name in missing]
    problems += [f"{name} is unknown" for name in unknown]
    if problems:
        shown = "; ".join(problems[:LISTED_PROBLEMS])
        more = f"; and {len(problems) - LISTED_PROBLEMS} more" if len(problems) > LISTED_PROBLEMS else ""
        raise CheckpointError(f"the tensors of {directory} do not fit its config: {shown}{more}")
    return pieces


def _without_tied_head(path: Path, *, places: dict[str, TensorPlace], model: ModelConfig) -> dict[str, TensorPlace]:
    """Drop a head that is stored although it is tied, once it is seen to be the embedding."""
    if not model.tie_embeddings or "lm_head.weight" not in places:
        return places
    embedding = next((v for k, v in places.items() if k.endswith("embed_tokens.weight")), None)
    head = places["lm_head.weight"]
    if embedding is not None and not _equal_bytes(head, embedding):
        raise CheckpointError(
            f"{path}: tie_word_embeddings is true, but lm_head.weight differs from the embedding. Set it to false in "
            f"{CONFIG_NAME} if the head was trained apart, or remove lm_head.weight"
        )
    return {name: place for name, place in places.items() if name != "lm_head.weight"}


def _equal_bytes(left: TensorPlace, right: TensorPlace) -> bool:
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return all(a == b for a, b in zip(_blocks(left), _blocks(right), strict=True))


def _blocks(place: TensorPlace) -> Iterable[bytes]:
    with place.path.open("rb") as file:
        file.seek(place.start)
        for start in range(0, place.num_bytes, 1 << 24):
            yield file.read(min(1 << 24, place.num_bytes - start))
