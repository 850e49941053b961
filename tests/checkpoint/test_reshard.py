"""`ernie5 reshard`: other files, the same bytes of every tensor; and what a user gets wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ernie5.checkpoint import reshard as reshard_module
from ernie5.checkpoint.config import CheckpointConfig
from ernie5.checkpoint.load import load_run
from ernie5.checkpoint.manifest import RunState, read_manifest
from ernie5.checkpoint.save import Contents, save_checkpoint
from ernie5.checkpoint.stored import StoredTensors
from ernie5.checkpoint.tensor_file import dtype_name
from ernie5.config.load import config_from_dict, config_to_dict, config_to_yaml
from ernie5.engine.interface import EngineState
from ernie5.errors import CheckpointError
from ernie5.model.backbone import build_model
from ernie5.model.config import ModelConfig, MoEConfig
from ernie5.tokenizers.text import load_text_tokenizer, train_text_tokenizer
from ernie5.train.config import RootConfig

MODEL = ModelConfig(
    layers=2, width=16, query_heads=4, kv_heads=2, head_width=4, vocab_size=37, dense_width=24, modalities=("text",),
    moe=MoEConfig(num_experts=4, top_k=2, expert_width=8),
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A run's checkpoint in one file each, with random moments and bf16 weights under fp32 masters."""
    torch.manual_seed(0)
    model = build_model(MODEL, seed=1)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = {f"{kind}/{n}": torch.randn_like(p) for kind in ("exp_avg", "exp_avg_sq") for n, p in parameters.items()}
    buffers = {name: torch.randn_like(b) for name, b in model.named_buffers()}
    state = EngineState(parameters, buffers, moments, 3, torch.ones(4, dtype=torch.float64))
    tasks = ("image_to_text", "text_to_image", "video_to_text", "text_to_video", "audio_to_text", "text_to_audio",
             "page")
    config = config_from_dict(
        {"train": {"steps": 9, "run_dir": "x"}, "model": config_to_dict(MODEL), "tokenizers": {"audio_levels": 2},
         "data": {"mixture": {"text": 1.0, **dict.fromkeys(tasks, 0.0)}}}, schema=RootConfig,
    )
    run = RunState(step=3, tokens=70, data={}, rng={})
    tokenizer = train_text_tokenizer(["red green blue"] * 4, vocab_size=290)
    tokenizer.save(tmp_path / "run" / "tokenizers" / "text")
    contents = Contents(
        tuple(state.slices()), 3, state.magnitudes, run, config_to_yaml(config), "bf16", {"text": tokenizer.identity}
    )
    return save_checkpoint(tmp_path / "run" / "checkpoints", contents=contents, config=CheckpointConfig())


def same_files(left: Path, right: Path) -> bool:
    names = sorted(path.name for path in left.iterdir() if path.is_file())
    assert names == sorted(path.name for path in right.iterdir() if path.is_file())
    return all((left / name).read_bytes() == (right / name).read_bytes() for name in names)


@pytest.mark.parametrize("options", [("--files", "3"), ("--layout", "tp=2,ep=2,dp=2"), ("--layout", "tp=2,etp=2"),
                                     ("--layout", "pp=2,tp=2")])
def test_there_and_back_gives_the_same_bytes(
    options: tuple[str, ...], checkpoint: Path, tmp_path: Path, verb: Callable, read_state: Callable
) -> None:
    before = read_state(load_run(checkpoint).engine)
    code, out, err = verb("reshard", tmp_path / "run", tmp_path / "there", *options)
    assert code == 0 and "tensors of step 3" in out, err
    after = read_state(load_run(tmp_path / "there").engine)
    for kind in ("parameters", "buffers", "moments"):
        assert all(torch.equal(vars(after)[kind][key], value) for key, value in vars(before)[kind].items())
    ranks = 3 if options[0] == "--files" else 2 if options[1] == "tp=2,etp=2" else 4
    assert len(list((tmp_path / "there").glob("optimizer-*.safetensors"))) == ranks
    kept = read_manifest(checkpoint).tokenizers["text"]
    assert load_text_tokenizer(tmp_path / "there" / "tokenizers" / "text").identity == kept
    assert verb("reshard", tmp_path / "there", tmp_path / "back")[0] == 0
    assert same_files(tmp_path / "back", checkpoint)
    assert verb("verify", tmp_path / "there")[0] == 0
    code, out, _ = verb("inspect", tmp_path / "there")
    assert code == 0 and ("in 2 slices" in out or options[0] == "--files")


def test_an_equal_number_of_files_has_about_equal_bytes(checkpoint: Path, tmp_path: Path, verb: Callable) -> None:
    assert verb("reshard", checkpoint, tmp_path / "there", "--files", "4")[0] == 0
    files = read_manifest(tmp_path / "there").files
    sizes = [sum(e.num_bytes for n, e in files.items() if f"-{rank:05d}" in n) for rank in range(4)]
    assert max(sizes) < 1.1 * min(sizes)


def test_half_precision_comes_through_under_its_name_and_unknown_dtypes_are_refused(
    checkpoint: Path, tmp_path: Path, convert: Callable, verb: Callable
) -> None:
    convert(checkpoint, tmp_path / "half", "ernie5", "--dtype", "fp16")
    code, _, err = verb("reshard", tmp_path / "half", tmp_path / "there", "--files", "2")
    assert code == 0, err
    tensors = read_manifest(tmp_path / "there").tensors
    assert tensors["final_norm.weight"].dtype == "F16"
    before, after = (StoredTensors(tmp_path / name, manifest=read_manifest(tmp_path / name)).read_whole
                     for name in ("half", "there"))
    assert all(torch.equal(before(name), after(name)) for name in tensors)
    assert verb("verify", tmp_path / "there")[0] == 0
    with pytest.raises(CheckpointError, match=r"torch.complex64 cannot be stored.*F16"):
        dtype_name(torch.complex64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layout", "xp=2"), "'xp=2' is no degree"),
        (("--layout", "pp=3"), "Nearest degrees that work: pp 2"),
        (("--layout", "tp"), "'tp' is no degree"),
        (("--layout", "tp=3"), "does not share out model.query_heads = 4 and model.kv_heads = 2"),
        (("--layout", "ep=3,dp=3"), "does not divide model.moe.num_experts = 4"),
        (("--layout", "ep=4"), "ep x etp = 4 x 1 does not divide dp x cp x tp = 1"),
        (("--layout", "tp=3"), "--layout tp = 3"),
        (("--layout", "vpp=2"), "--layout pp = 1 has one. Set --layout vpp: 1"),
        (("--files", "0"), "at least one file"),
        (("--files", "1000000000"), "--files 150 or fewer"),
        (("--files", "2", "--layout", "tp=2"), "not allowed with argument"),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_byte_is_written(
    options: tuple[str, ...], message: str, checkpoint: Path, tmp_path: Path, verb: Callable
) -> None:
    code, _, err = verb("reshard", checkpoint, tmp_path / "there", *options)
    assert code == 2 and message in err, err
    assert not (tmp_path / "there").exists()


def test_nothing_is_overwritten_and_damage_is_not_carried_on(
    checkpoint: Path, tmp_path: Path, verb: Callable
) -> None:
    target = tmp_path / "there"
    target.mkdir()
    (target / "thesis.txt").write_text("mine", encoding="utf-8")
    assert verb("reshard", checkpoint, target)[0] == 2
    code, _, err = verb("reshard", checkpoint, target, "--force")
    assert code == 2 and "it is no model" in err and (target / "thesis.txt").is_file()
    assert verb("reshard", checkpoint, tmp_path / "once")[0] == 0
    code, _, err = verb("reshard", checkpoint, tmp_path / "once", "--files", "2")
    assert code == 2 and "--force" in err and (tmp_path / "once" / "model.safetensors").is_file()
    assert verb("reshard", checkpoint, tmp_path / "once", "--files", "2", "--force")[0] == 0
    assert verb("reshard", checkpoint, checkpoint)[0] == 2
    content = bytearray((checkpoint / "optimizer.safetensors").read_bytes())
    content[-1] ^= 1
    (checkpoint / "optimizer.safetensors").write_bytes(content)
    code, _, err = verb("reshard", checkpoint, tmp_path / "never")
    assert code == 2 and "does not match its checksum" in err and not (tmp_path / "never").exists()


def test_a_full_disk_is_the_machines_fault_and_leaves_nothing(
    checkpoint: Path, tmp_path: Path, verb: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reshard_module, "join_records", full)
    code, _, err = verb("reshard", checkpoint, tmp_path / "there")
    assert code == 3 and "the disk is full" in err and "What was written is removed" in err and "kept" not in err
    assert not list(tmp_path.glob("*there*"))


def test_a_call_killed_in_the_middle_leaves_nothing_under_the_name_and_is_repeated(
    checkpoint: Path, tmp_path: Path, verb: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """What no handler of errors catches, as SIGKILL."""

    def die(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(reshard_module, "join_records", die)
        with pytest.raises(Killed):
            reshard_module.reshard(checkpoint, target=tmp_path / "there", ranks=3)
    assert not (tmp_path / "there").exists()
    assert verb("reshard", checkpoint, tmp_path / "there", "--files", "2")[0] == 0
    assert len(list((tmp_path / "there").glob("model-*"))) == 2 and not list(tmp_path.glob(".there*"))
