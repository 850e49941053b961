"""What DeepSpeed's own scripts make of the files that `checkpoint.format: deepspeed` writes, beside our checkpoint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ernie5.checkpoint.manifest import read_manifest
from ernie5.checkpoint.names import find_checkpoint
from ernie5.checkpoint.stored import StoredTensors

ROOT = Path(__file__).resolve().parents[2]
UNIVERSAL = {"master": "fp32.pt", "exp_avg": "exp_avg.pt", "exp_avg_sq": "exp_avg_sq.pt"}

pytestmark = pytest.mark.slow


def run(*words: object) -> None:
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deepspeeds_universal_format_holds_our_masters_and_moments_bit_for_bit(precision: str, tmp_path: Path) -> None:
    run("launch/spawn.py", 2, "tools/chaos/chaos.yaml", f"train.run_dir={tmp_path}/run", "train.steps=2",
        f"engine.precision={precision}", "checkpoint.format=deepspeed")
    native = tmp_path / "run" / "checkpoints" / "deepspeed"
    run("-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", native / "step-00000002", "--output_folder",
        tmp_path / "universal", "--num_extract_workers", 1, "--num_merge_workers", 1)
    path = find_checkpoint(tmp_path / "run")
    manifest = read_manifest(path)
    ours = StoredTensors(path, manifest=manifest)
    trained = {key.split("/", 1)[1] for key in manifest.tensors if "/" in key}
    masters = {f"master/{name}": name if precision == "fp32" else f"master/{name}" for name in trained}
    places = masters | {key: key for key in manifest.tensors if key.startswith("exp_avg")}
    assert len(places) == 3 * len(trained) > 100
    for key, stored in places.items():
        kind, name = key.split("/", 1)
        values = torch.load(tmp_path / "universal" / "zero" / f"model.{name}" / UNIVERSAL[kind], weights_only=True)
        assert torch.equal(values["param"].view(-1), ours.read_whole(stored).view(-1)), key
    if precision == "fp32":
        run(native / "zero_to_fp32.py", native, tmp_path / "theirs", "--safe_serialization")
        theirs = load_file(tmp_path / "theirs" / "model.safetensors")
        assert all(torch.equal(theirs[f"model.{name}"], ours.read_whole(name)) for name in trained)
