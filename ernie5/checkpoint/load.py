"""Reading a checkpoint: strict, checksummed, and with every mismatch named."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from ernie5.checkpoint.manifest import Manifest, RunState, read_manifest
from ernie5.checkpoint.names import (
    CONFIG_FILE,
    MASTER_PREFIX,
    STATE_FILE,
    find_checkpoint,
    is_optimizer_file,
    list_checkpoints,
)
from ernie5.checkpoint.places import written_setting
from ernie5.checkpoint.stored import StoredTensors
from ernie5.checkpoint.verify import find_damage, find_missing, is_whole
from ernie5.config.base import Config
from ernie5.config.load import load_config
from ernie5.config.registry import resolve
from ernie5.engine.interface import BUFFER, KINDS, MOMENT, PARAMETER, Engine, check_names
from ernie5.errors import CheckpointError, EnvironmentFault, TokenizerError
from ernie5.model.backbone import UnifiedModel
from ernie5.parallel.boxes import Box
from ernie5.tokenizers.config import TokenizersConfig
from ernie5.tokenizers.kept import KEPT_FOLDER, prefer_kept


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """What resuming needs of a checkpoint, found in `directory`; the tensors of `engine` are still on disk."""

    directory: Path
    manifest: Manifest
    engine: SavedState
    run: RunState


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready to evaluate or generate, its training configuration (RootConfig), the manifest, and where they were
    found."""

    model: UnifiedModel
    config: Config
    manifest: Manifest
    directory: Path


class SavedState:
    """The state of an engine in a checkpoint, as a StateSource: an engine reads the boxes that it holds."""

    def __init__(self, tensors: StoredTensors, *, precision: str, updates: int, magnitudes: torch.Tensor) -> None:
        self._tensors, self._prefix = tensors, MASTER_PREFIX if precision == "bf16" else ""
        self.updates, self.magnitudes = updates, magnitudes
        shapes = {key: entry.shape for key, entry in tensors.entries.items()}
        trained = {key.split("/", 1)[1] for key in shapes if "/" in key}
        self._shapes = {
            PARAMETER: {key: shapes[self._prefix + key] for key in sorted(trained) if self._prefix + key in shapes},
            BUFFER: {key: shape for key, shape in shapes.items() if "/" not in key and key not in trained},
            MOMENT: {k: shape for k, shape in shapes.items() if "/" in k and not k.startswith(MASTER_PREFIX)},
        }

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """As StateSource."""
        return self._shapes[kind]

    def read(self, key: str, *, box: Box, into: torch.Tensor) -> None:
        """As StateSource. Raises CheckpointError where a file is not what the manifest says."""
        self._tensors.read(self._stored(key), box=box, into=into)

    def holds(self, key: str, *, box: Box) -> bool:
        """Whether exactly this box is stored: all that can be read of a host's part."""
        entry = self._tensors.entries.get(self._stored(key))
        return entry is not None and any(part.box == box for part in entry.slices)

    def join_shapes(self, others: Iterable[Mapping[str, Mapping[str, tuple[int, ...]]]]) -> None:
        """Of a host's part: take what the parts of other hosts hold for known, by kind and key."""
        for shapes in others:
            for kind in KINDS:
                self._shapes[kind] |= {key: tuple(shape) for key, shape in shapes[kind].items()}

    def _stored(self, key: str) -> str:
        return self._prefix + key if key in self._shapes[PARAMETER] else key


def load_run(path: Path | str) -> LoadedRun:
    """Open everything that resuming needs, after checking the checksums of all files.

    Raises CheckpointError naming the damaged file and tensor.
    """
    loaded = open_run(path)
    refuse_damage(find_damage(loaded.directory, manifest=loaded.manifest), directory=loaded.directory)
    return loaded


def open_run(path: Path | str, *, may_be_part: bool = False) -> LoadedRun:
    """Open a checkpoint to resume from, after checking that its files are there in full; `check_together` looks at
    their bytes once the ranks know each other. may_be_part: of a host's part only what its ranks hold can be read.
    Raises CheckpointError."""
    directory = find_checkpoint(path)
    manifest = open_manifest(directory, may_be_part=may_be_part)
    if not any(map(is_optimizer_file, manifest.files)) and not any("/" in key for key in manifest.tensors):
        raise CheckpointError(
            f"{directory} has no optimizer state, so no run goes on from it. Start a new run from its weights: "
            f"train.init_from={directory}"
        )
    refuse_damage(find_missing(directory, manifest=manifest, needed=(STATE_FILE, CONFIG_FILE)), directory=directory)
    run, updates, magnitudes = _read_state(directory)
    tensors = StoredTensors(directory, manifest=manifest)
    engine = SavedState(tensors, precision=manifest.precision, updates=updates, magnitudes=magnitudes)
    return LoadedRun(directory=directory, manifest=manifest, engine=engine, run=run)


def check_together(directory: Path, *, manifest: Manifest, engine: Engine) -> None:
    """Compare all files with their checksums, each rank a share of them; collective.

    Raises, on every rank, EnvironmentFault where ranks mean different checkpoints, else a CheckpointError that names
    what is damaged and the way out.
    """
    check_same(directory, engine=engine)
    own = find_damage(directory, manifest=manifest, share=(engine.rank, engine.world_size))
    damage = [line for found in engine.gather({"damage": own}) for line in found["damage"]]
    if damage:
        way = engine.gather({"way": _way_out(directory) if engine.is_main else ""})[0]["way"]
        raise CheckpointError(f"{'; '.join(damage)}. {way}")


def check_same(directory: Path | None, *, engine: Engine) -> None:
    """Raise EnvironmentFault, on every rank, unless all mean the same checkpoint, or none; collective. Ranks that went
    on from different ones would wait for each other, or train different models as one."""
    found = [one["name"] for one in engine.gather({"name": "none" if directory is None else directory.name})]
    other = next((rank for rank, name in enumerate(found) if name != found[0]), None)
    if other is not None:
        raise EnvironmentFault(
            f"the ranks would go on from different checkpoints (rank 0: {found[0]}, rank {other}: {found[other]}). All "
            "hosts need the same run directory on shared storage. Mount it there, or start again in a minute: a host "
            "may have seen an old state of it"
        )


def load_model(
    path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> LoadedModel:
    """Read the model of the checkpoint at `path` (checkpoint, checkpoint folder or run directory), in eval mode.

    dtype: of the parameters, by default as stored; buffers stay fp32. Raises CheckpointError.
    """
    directory = find_checkpoint(path)
    manifest = open_manifest(directory)
    refuse_damage(find_damage(directory, manifest=manifest, with_optimizer=False), directory=directory)
    config = load_config(directory / CONFIG_FILE, schema=resolve("root", name="train"))
    model = UnifiedModel.outline(config.model, seed=0)  # strict: every parameter is read
    tensors = StoredTensors(directory, manifest=manifest)
    parameters = dict(model.named_parameters())
    own = {name: value for name, value in model.state_dict(keep_vars=True).items() if name in parameters}
    own.update({name: value for name, value in model.named_buffers() if name in model.state_dict()})
    found = {key: entry.shape for key, entry in tensors.entries.items() if "/" not in key}
    check_names(found, expected={name: tuple(value.shape) for name, value in own.items()}, what="tensors")
    with torch.no_grad():
        for name, tensor in own.items():
            values = tensors.read_whole(name)
            if name in parameters:
                model.hold(name, values=values.to(dtype or values.dtype))
            else:
                tensor.copy_(values)
    return LoadedModel(model=model.to(device).eval(), config=config, manifest=manifest, directory=directory)


def check_tokenizers(manifest: Manifest, *, identities: dict[str, str]) -> None:
    """Raise TokenizerError unless every tokenizer is the one that the checkpoint was trained with."""
    wrong = [name for name, identity in identities.items() if manifest.tokenizers.get(name, identity) != identity]
    if wrong:
        texts = ", ".join(f"{n}: {manifest.tokenizers[n][:12]} trained, {identities[n][:12]} given" for n in wrong)
        raise TokenizerError(
            f"this checkpoint was trained with other tokenizers ({texts}). Ids would mean other things. "
            f"`embedded` is the set of the installed version. Put the run's own, RUN_DIR/{KEPT_FOLDER}, beside the "
            "folder of its checkpoints, or use the version of ernie5 that trained it, or start over with --fresh"
        )


def own_tokenizers(
    config: TokenizersConfig, *, directory: Path, identities: Mapping[str, str], first: Sequence[Path] = ()
) -> TokenizersConfig:
    """`config` with the tokenizers that the checkpoint `directory` was trained with, as far as they were kept: in the
    folders `first`, or where the checkpoint leads to."""
    return prefer_kept(config, identities=dict(identities), folders=(*first, *kept_folders(directory)))


def kept_folders(directory: Path) -> tuple[Path, ...]:
    """Where the tokenizers of the checkpoint `directory` may be: beside the folder of checkpoints, where its run keeps
    them; in the checkpoint, where `convert` and `reshard` put them; with its run, where checkpoint.dir is elsewhere: a
    relative train.run_dir, as runs used to write it there too, starts here or somewhere above the checkpoint."""
    run_dir, here = written_setting(directory / CONFIG_FILE, section="train", key="run_dir"), directory.absolute()
    near = (here.parent.parent / KEPT_FOLDER, here / KEPT_FOLDER)
    of_run = dict.fromkeys(start / run_dir / KEPT_FOLDER for start in (Path.cwd(), *here.parents)) if run_dir else ()
    return (*near, *of_run)


def open_manifest(directory: Path, *, may_be_part: bool = False) -> Manifest:
    """The manifest of a checkpoint. Raises CheckpointError with the way out."""
    try:
        manifest = read_manifest(directory)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {_way_out(directory)}") from error
    if manifest.part_of and not may_be_part:
        raise CheckpointError(
            f"{directory} is the part of a run's state that one of its hosts keeps in memory, and no checkpoint. Use "
            "one of RUN_DIR/checkpoints"
        )
    return manifest


def refuse_damage(damage: list[str], *, directory: Path) -> None:
    """Raise CheckpointError with the way out where there is damage."""
    if damage:
        raise CheckpointError(f"{'; '.join(damage)}. {_way_out(directory)}")


def _way_out(directory: Path) -> str:
    """The newest other checkpoint of the folder that is whole, and the command that resumes from it."""
    directory = directory.absolute()
    for other in reversed(list_checkpoints(directory.parent)):
        if other.name == directory.name:
            continue
        if not is_whole(other):
            continue
        config = directory.parent.parent / CONFIG_FILE
        command = f"ernie5 train {config if config.is_file() else 'CONFIG'} --resume {other}"
        return f"The newest other checkpoint that is whole is {other}. Resume from it: {command}"
    return f"No other checkpoint of {directory.parent} is whole: bring one back, or start over with --fresh"


def _read_state(directory: Path) -> tuple[RunState, int, torch.Tensor]:
    values = json.loads((directory / STATE_FILE).read_text(encoding="utf-8"))
    engine = values["engine"]
    magnitudes = torch.tensor(engine["magnitudes"], dtype=torch.float64)
    return RunState(**values["run"]), int(engine["updates"]), magnitudes
