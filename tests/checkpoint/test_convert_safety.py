"""Conversions that must not happen, that are killed, and that name what does not fit."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ernie5.checkpoint.convert import copying
from ernie5.checkpoint.convert.ernie45_config import SpecialIds, config_values
from ernie5.checkpoint.convert.layouts import hub_layout
from ernie5.checkpoint.convert.request import Request, convert
from ernie5.checkpoint.convert.workspace import partial_folder
from ernie5.checkpoint.tensor_slices import NewTensor, create_file
from ernie5.model.config import ModelConfig, MoEConfig, MTPConfig

MODEL = ModelConfig(
    layers=3, width=12, query_heads=2, kv_heads=1, head_width=6, vocab_size=67, dense_layers=1, dense_width=20,
    qk_norm=False, modalities=("text",), moe=MoEConfig(num_experts=4, top_k=2, expert_width=6, score="softmax"),
    mtp=MTPConfig(depth=1),
)


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A random hub directory in two shards."""
    folder = tmp_path / "hub"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {stored.name: torch.randn(stored.shape, generator=generator) for stored in hub_layout(MODEL)}
    names = list(tensors)
    halves = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, held in halves.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in halves.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    values = config_values(MODEL, base={}, ids=SpecialIds(0, 1, 2), dtype="float32")
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def change(folder: Path, file: str, edit: Callable[[dict[str, torch.Tensor]], object], *, index: bool = True) -> None:
    """Edit the tensors of one shard; the index follows unless told not to."""
    tensors = load_file(folder / file)
    edit(tensors)
    save_file(tensors, folder / file)
    if index:
        path = folder / "model.safetensors.index.json"
        held = {n: f.name for f in folder.glob("*.safetensors") for n in load_file(f)}
        path.write_text(json.dumps({"weight_map": held}))


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


NORM = "model.layers.0.input_layernorm.weight"
GATE = "model.layers.1.mlp.experts.2.gate_proj.weight"
COMPLAINTS = {
    "missing": (lambda hub: change(hub, "a.safetensors", lambda t: t.pop(GATE)), rf"{GATE} is missing"),
    "unknown": (
        lambda hub: change(hub, "a.safetensors", lambda t: t.update({"model.layers.9.x": torch.ones(1)})),
        r"model\.layers\.9\.x is unknown",
    ),
    "shape": (
        lambda hub: change(hub, "a.safetensors", lambda t: t.update({GATE: torch.ones(6, 13)})),
        rf"{GATE} has shape \[6, 13\], the config gives \[6, 12\]",
    ),
    "transposed": (
        lambda hub: change(hub, "a.safetensors", lambda t: t.update({GATE: t[GATE].T.contiguous()})),
        rf"{GATE} has shape \[12, 6\]",
    ),
    "two at once": (
        lambda hub: change(hub, "a.safetensors", lambda t: (t.pop(NORM), t.update(extra=torch.ones(1)))),
        rf"{NORM} is missing; extra is unknown",
    ),
    "twice": (
        lambda hub: change(hub, "b.safetensors", lambda t: t.update({NORM: torch.ones(12)}), index=False),
        rf"{NORM} is in .*a\.safetensors and in .*b\.safetensors",
    ),
    "index": (
        lambda hub: change(hub, "a.safetensors", lambda t: t.pop(NORM), index=False),
        rf"disagree about 1 tensors: {NORM} is in no shard, the index says a\.safetensors",
    ),
    "escape": (
        lambda hub: (hub / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../x.safetensors"}}'),
        "outside of the directory",
    ),
    "index damaged": (lambda hub: (hub / "model.safetensors.index.json").write_text("[]"), "is damaged"),
    "shard gone": (lambda hub: (hub / "b.safetensors").unlink(), r"b\.safetensors is missing"),
    "cut off": (
        lambda hub: (hub / "b.safetensors").write_bytes((hub / "b.safetensors").read_bytes()[:-9]),
        r"b\.safetensors is cut off after \d+ bytes: \d+ tensors are not whole \(first: ",
    ),
    "no header": (lambda hub: (hub / "b.safetensors").write_bytes(b"\xff" * 64), "cut off or no safetensors file"),
    "not json": (lambda hub: (hub / "b.safetensors").write_bytes(b"\x04" + b"\0" * 7 + b"nope"), "is not JSON"),
    "lying header": (
        lambda hub: (hub / "b.safetensors").write_bytes(
            (lambda h: len(h).to_bytes(8, "little") + h + bytes(4))(
                b'{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}'
            )
        ),
        r"tensor x of shape \[9\] F32 cannot fill bytes 0\.\.4",
    ),
    "quantised": (
        lambda hub: change(hub, "a.safetensors", lambda t: t.update({GATE: torch.ones(6, 12, dtype=torch.int8)})),
        rf"tensor {GATE} has dtype I8",
    ),
    "whole numbers": (
        lambda hub: change(hub, "a.safetensors", lambda t: t.update({GATE: torch.ones(6, 12, dtype=torch.int64)})),
        "holds whole numbers",
    ),
    "no config": (lambda hub: (hub / "config.json").write_text("{"), r"config\.json is no JSON"),
    "other family": (lambda hub: change_config(hub, model_type="llama"), 'model_type = "llama": only the ERNIE 4.5'),
    "export": (lambda hub: change_config(hub, model_type="ernie5"), "--to ernie5-hf writes has the sections model and"),
    "bias": (lambda hub: change_config(hub, use_bias=True), "use_bias = true"),
    "activation": (lambda hub: change_config(hub, hidden_act="gelu"), 'hidden_act = "gelu"'),
    "yarn": (lambda hub: change_config(hub, rope_parameters={"rope_type": "yarn"}), "rope_type 'yarn' is not supp"),
    "scaled, as it was called before": (
        lambda hub: change_config(hub, rope_parameters={"type": "linear", "factor": 2.0}), "rope_type 'linear' is not"
    ),
    "two names": (lambda hub: change_config(hub, num_experts_per_tok=3), "num_experts_per_tok = 3: moe_k = 2 means"),
    "endless": (lambda hub: change_config(hub, num_hidden_layers=math.inf), "num_hidden_layers = Infinity: expected a"),
    "alternating": (lambda hub: change_config(hub, moe_layer_end_index=1), r"layers \[1\] of 3 have experts"),
    "norm": (lambda hub: change_config(hub, moe_norm_min=1e-3), r"moe_norm_min = 0\.001"),
    "text": (lambda hub: change_config(hub, hidden_size="12"), 'hidden_size = "12": expected a number'),
    "nothing": (lambda hub: change_config(hub, num_hidden_layers=None), "num_hidden_layers = null"),
    "no heads": (lambda hub: change_config(hub, num_attention_heads=0), "config.json"),
    "tied twice": (
        lambda hub: change(hub, "b.safetensors", lambda t: t.update({"lm_head.weight": torch.ones(67, 12)})),
        r"tie_word_embeddings is true, but lm_head\.weight differs",
    ),
}


@pytest.mark.parametrize("case", COMPLAINTS)
def test_what_does_not_fit_is_named_in_one_line_and_nothing_is_written(
    case: str, hub: Path, verb: Callable, tmp_path: Path
) -> None:
    damage, message = COMPLAINTS[case]
    damage(hub)
    code, out, err = verb("convert", hub, tmp_path / "own", "--to", "ernie5")
    assert code == 2 and not out and err.count("\n") == 1, err
    assert re.search(message, err), err
    assert not (tmp_path / "own").exists()


def test_a_tied_head_that_is_stored_all_the_same_is_taken_for_the_embedding(
    hub: Path, convert: Callable, verb: Callable, tmp_path: Path
) -> None:
    table = load_file(hub / "a.safetensors")["model.embed_tokens.weight"]
    change(hub, "b.safetensors", lambda t: t.update({"lm_head.weight": table.clone()}))
    convert(hub, tmp_path / "own", "ernie5")
    code, _, err = verb("convert", tmp_path / "own", tmp_path / "fp32", "--to", "ernie5", "--masters")
    assert code == 2 and "it holds weights alone" in err and "leave --masters out" in err
    assert "text_head.weight" not in load_file(tmp_path / "own" / "model.safetensors")


def test_force_on_a_symbolic_link_works_twice_and_leaves_the_place_that_it_named(
    hub: Path, tmp_path: Path, verb: Callable
) -> None:
    """The link was left aside under a hidden name for good, and the second call ended at it."""
    link, real = tmp_path / "link", tmp_path / "real"
    assert verb("convert", hub, real, "--to", "ernie5")[0] == 0
    link.symlink_to(real)
    assert verb("convert", hub, link, "--to", "ernie5", "--force")[0] == 0
    assert not list(tmp_path.glob(".link*"))
    assert verb("convert", hub, link, "--to", "ernie5", "--force")[0] == 0
    assert (real / "manifest.json").is_file() and (link / "manifest.json").is_file()


def test_nothing_is_overwritten_without_force_and_force_spares_what_is_no_model(
    hub: Path, verb: Callable, tmp_path: Path
) -> None:
    own, thesis = tmp_path / "own", tmp_path / "thesis"
    assert verb("convert", hub, own, "--to", "ernie5")[0] == 0
    stamp = (own / "manifest.json").stat().st_mtime_ns
    code, _, err = verb("convert", hub, own, "--to", "ernie5")
    assert code == 2 and "nothing is overwritten" in err and (own / "manifest.json").stat().st_mtime_ns == stamp
    assert verb("convert", hub, own, "--to", "ernie5", "--force")[0] == 0
    assert (own / "manifest.json").stat().st_mtime_ns != stamp
    thesis.mkdir()
    (thesis / "chapter.tex").write_text("mine")
    code, _, err = verb("convert", hub, thesis, "--to", "ernie5", "--force")
    assert code == 2 and "it is no model" in err and (thesis / "chapter.tex").read_text() == "mine"
    # Shards have a manifest.json too, and programs a config.json: neither makes a model.
    for name, content in (("manifest.json", '{"format": 1, "shards": []}'), ("config.json", '{"debug": true}'),
                          ("config.json", "[1]"), ("manifest.json", "{")):
        (thesis / name).write_text(content)
        code, _, err = verb("convert", hub, thesis, "--to", "ernie5", "--force")
        assert code == 2 and "it is no model" in err and (thesis / "chapter.tex").read_text() == "mine"
    for target in (hub, hub / "inside", tmp_path):
        code, _, err = verb("convert", hub, target, "--to", "ernie5", "--force")
        assert code == 2 and "Choose another DST" in err
    assert (hub / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "own", "thesis"]


def test_force_spares_a_model_folder_that_holds_more_than_a_model(
    hub: Path, convert: Callable, verb: Callable, tmp_path: Path
) -> None:
    """Fine-tuning with transformers writes its model into a folder, and its own checkpoints into folders below."""
    trained, own = tmp_path / "trained", tmp_path / "own"
    convert(hub, trained, "ernie45-hf")
    convert(hub, own, "ernie5")  # has a folder huggingface, which is ours
    (trained / "checkpoint-10").mkdir()
    (trained / "checkpoint-10" / "optimizer.pt").write_text("mine")
    for command in (["convert", hub, trained, "--to", "ernie45-hf"], ["reshard", own, trained]):
        code, _, err = verb(*command, "--force")
        assert code == 2 and "no conversion writes (checkpoint-10)" in err and err.count("\n") == 1, err
        assert (trained / "checkpoint-10" / "optimizer.pt").read_text() == "mine"
    assert verb("convert", hub, own, "--to", "ernie5", "--force")[0] == 0


def test_mistakes_on_the_command_line_are_one_line(hub: Path, verb: Callable, tmp_path: Path) -> None:
    for arguments, message in (
        (["nowhere", "x", "--to", "ernie5"], "nowhere does not exist"),
        ([hub, "x", "--to", "gguf"], "invalid choice"),
        ([hub, tmp_path / "x", "--to", "ernie5", "--shard-size", "much"], "--shard-size 'much'"),
        ([hub, tmp_path / "x", "--to", "ernie5", "--masters"], "has no optimizer state"),
        ([hub, tmp_path / "x", "--to", "ernie5", "--expert-width", "3"], "--expert-width belongs to --to upcycle"),
        ([hub, tmp_path / "x", "--to", "ernie5", "--copies", "3"], "--copies belongs to --to upcycle, not to"),
        ([hub, tmp_path / "x", "--to", "ernie5", "--dense-layers", "0"], "--dense-layers belongs to --to upcycle"),
        ([hub, tmp_path / "x", "--to", "ernie5", "--shard-size", "1GB"], "--shard-size belongs to --to ernie45-hf or"),
        ([hub, tmp_path / "x", "--to", "upcycle"], "needs --expert-width"),
        ([tmp_path, tmp_path.parent / "x", "--to", "ernie5"], "holds no checkpoint"),
    ):
        code, _, err = verb("convert", *arguments)
        assert code == 2 and message in err and err.count("\n") == 1, err


@pytest.mark.parametrize("killed_at", [1, 9, 30])
@pytest.mark.parametrize("to", ["ernie5", "ernie45-paddle"])
def test_a_killed_conversion_goes_on_where_it_was(killed_at: int, to: str, hub: Path, tmp_path: Path) -> None:
    target, undisturbed = tmp_path / "target", tmp_path / "undisturbed"
    child = os.fork()
    if child == 0:  # a child that dies by SIGKILL in the middle, as the machine's own out-of-memory killer would do it
        copy, count = copying._copy_one, [0]

        def dying(*arguments: object, **options: object) -> int:
            count[0] += 1
            if count[0] == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return copy(*arguments, **options)

        copying.SYNC_BYTES, copying._copy_one = 0, dying
        convert(Request(hub, target, to, shard_bytes=2000))
        os._exit(9)
    status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert not target.exists() and partial_folder(target).is_dir()
    report = convert(Request(hub, target, to, shard_bytes=2000))
    convert(Request(hub, undisturbed, to, shard_bytes=2000))
    assert report.resumed_tensors == killed_at - 1
    assert not partial_folder(target).exists()
    names = sorted(path.relative_to(target) for path in target.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(undisturbed) for path in undisturbed.rglob("*") if path.is_file())
    assert all((target / name).read_bytes() == (undisturbed / name).read_bytes() for name in names)


def test_a_killed_conversion_of_a_source_that_changed_starts_over(hub: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    folder = partial_folder(target)
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half")
    (folder / ".journal.jsonl").write_text('{"fingerprint": "of another source"}\n{"file": "model.safe')
    report = convert(Request(hub, target, "ernie5"))
    assert report.resumed_tensors == 0 and report.num_tensors > 10
    back = tmp_path / "back"
    convert(Request(target, back, "ernie45-hf"))
    wanted = load_file(hub / "a.safetensors") | load_file(hub / "b.safetensors")
    found = load_file(back / "model.safetensors")
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_two_conversions_to_one_place_do_not_mix(hub: Path, verb: Callable, tmp_path: Path) -> None:
    folder = partial_folder(tmp_path / "own")
    folder.mkdir()
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = verb("convert", hub, tmp_path / "own", "--to", "ernie5")
    assert code == 2 and "another process converts" in err
    assert verb("convert", hub, tmp_path / "own", "--to", "ernie5")[0] == 0


def test_a_full_disk_is_the_machines_fault_and_the_next_call_goes_on(
    hub: Path, verb: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, count = copying.write_span, [0]

    def full(*arguments: object, **options: object) -> memoryview:
        count[0] += 1
        if count[0] == 5:
            raise OSError(28, "No space left on device")
        return write(*arguments, **options)

    monkeypatch.setattr(copying, "SYNC_BYTES", 0)
    monkeypatch.setattr(copying, "write_span", full)
    code, _, err = verb("convert", hub, tmp_path / "own", "--to", "ernie5")
    assert code == 3 and "run the same command again" in err and not (tmp_path / "own").exists()
    code, out, _ = verb("convert", hub, tmp_path / "own", "--to", "ernie5")
    assert code == 0 and "4 of them already there" in out


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """0.6 GB pass through blocks of 16 MiB, a transposed one held twice; the rest of the allowance is the allocator's.

    tools/convert_memory/main.py measures the same on random weights of any size.
    """
    moe = MoEConfig(num_experts=3, top_k=2, expert_width=1536, score="softmax")
    model = dataclasses.replace(MODEL, width=2560, vocab_size=20000, dense_width=12288, moe=moe)
    hub = tmp_path / "hub"
    hub.mkdir()
    tensors = [NewTensor(stored.name, "BF16", stored.shape) for stored in hub_layout(model)]
    create_file(hub / "model.safetensors", tensors=tensors)  # holes: zeros that take no disk
    (hub / "config.json").write_text(json.dumps(config_values(model, base={}, ids=SpecialIds(0, 1, 2), dtype="bf16")))
    code = (
        "import resource; from pathlib import Path\n"
        "from ernie5.checkpoint.convert.request import Request, convert\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        f"before, folder = peak(), Path({str(tmp_path)!r})\n"
        "report = convert(Request(folder / 'hub', folder / 'paddle', 'ernie45-paddle'))\n"
        "convert(Request(folder / 'paddle', folder / 'own', 'ernie5'))\n"
        "print(report.num_bytes >> 20, peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    mebibytes, growth = map(int, done.stdout.split())
    assert mebibytes > 550 and growth < 120, done.stdout
