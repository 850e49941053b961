"""`ernie5 train` from outside: mistakes are one line and exit code 2, and --validate needs no torch."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ernie5.config.load import load_config
from ernie5.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    EnvironmentFault,
    LayoutError,
    NumericsError,
    TokenizerError,
)
from ernie5.generate.load import load_generation
from ernie5.tokenizers.visual.tokenizer import load_visual_tokenizer, save_visual_tokenizer
from ernie5.train.build import describe_start
from ernie5.train.command import main
from ernie5.train.config import RootConfig


def test_validate_imports_no_torch(world: Path) -> None:
    code = (
        "import sys; from ernie5.__main__ import main; code = main(['train', sys.argv[1], '--validate']);"
        "sys.exit(code or ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(world / "run.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "is valid" in done.stdout


def test_a_mistyped_key_is_one_line_with_the_closest_key(run_ernie5: Callable, world: Path) -> None:
    done = run_ernie5("train", world / "run.yaml", "--validate", "train.stepz=3")
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and "train.steps" in done.stderr


@pytest.mark.parametrize("place", ["notes", "notes/run"])
def test_a_file_in_place_of_the_run_directory_is_the_users_mistake(world: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "notes").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"train\.run_dir = .*notes.*: a file stands in its place"):
        main([str(world / "run.yaml"), f"train.run_dir={tmp_path / place}"])
    assert (tmp_path / "notes").read_text(encoding="utf-8") == "mine"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which nobody makes folders")
def test_a_run_directory_that_cannot_be_made_is_no_bug(world: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"train\.run_dir = /proc/none/run: the folder is not there.*=runs/mine"):
        main([str(world / "run.yaml"), "train.run_dir=/proc/none/run"])


def test_validate_already_refuses_streams_that_do_not_divide_the_rows(world: Path) -> None:
    with pytest.raises(LayoutError, match=r"global_sequences = 4: is not a multiple of data.streams = 3"):
        main([str(world / "run.yaml"), "--validate", "data.streams=3"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("objectives.z_weight=0.1", "z_loss"),
        ("objectives.orthogonality_weight=0.1", "whole fp32 weights"),
    ],
)
def test_validate_already_refuses_what_this_version_cannot_do(override: str, words: str, world: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        main([str(world / "run.yaml"), "--validate", "engine.precision=bf16", override])


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        ("parallel.tp=2", LayoutError, "parallel.tp"),
        ("parallel.dp=2", LayoutError, "parallel.dp"),
        ("batch.global_sequences=5", LayoutError, "streams|multiple"),
        ("batch.ramp=[{steps: 1, global_sequences: 3}]", LayoutError, r"ramp\[0\].global_sequences = 3.*works: 2"),
        ("batch.ramp=[{steps: 1, global_sequences: 4}]", ConfigError, r"ramp\[0\].global_sequences = 4.*4 rows.*Lower"),
        ("batch.ramp=[{steps: 0, global_sequences: 2}]", ConfigError, r"ramp\[0\].steps = 0.*positive"),
        ("data.shards=[/nowhere/*.tar]", DataError, "nowhere"),
        ("model.vocab_size=640", ConfigError, "model.vocab_size"),
        ("model.visual.bits=8", ConfigError, "model.visual.bits"),
        ("model.visual.num_scales=3", ConfigError, "model.visual.num_scales.*need 4"),
        ("model.visual.num_scales=9", ConfigError, "model.visual.num_scales.*need 4"),
        ("model.visual.image_merge=16", ConfigError, "model.visual.image_merge.*need 4"),
        ("model.visual.video_merge=4", ConfigError, "model.visual.video_merge.*need 16"),
        ("model.audio.speaker_features=8", ConfigError, "model.audio.speaker_features.*need 160"),
        ("model.modalities=[text,image,audio]", ConfigError, "needs video.*: 0, text_to_video: 0; or add video"),
        ("data.image_pixels=40", ConfigError, "data.image_pixels.*multiple of 16.*works: 32"),
        ("data.sequence_tokens=32", ConfigError, "data.sequence_tokens = 32.*text_to_image takes 50.*works: 50"),
        ("tokenizers.text=/nowhere", TokenizerError, "nowhere"),
        ("observe.alarms.on_spike=forget", ConfigError, "on_spike"),
        ("objectives.z_weight=0.1", ConfigError, "z_loss"),
        ("data.shards=[]", ConfigError, "data.shards.*sample"),
        ("model.moe.top_k=9", ConfigError, "9 exceeds num_experts = 8.*at most 8, or raise num_experts"),
        ("checkpoint.keep=0", ConfigError, "checkpoint.keep"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(
    override: str, error: type[Exception], words: str, world: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        main([str(world / "run.yaml"), f"train.run_dir={tmp_path / 'run'}", override])


def test_an_error_is_recorded_in_exit_json_and_the_run_directory_stays_usable(world: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(CheckpointError):
        main([str(world / "run.yaml"), f"train.run_dir={run_dir}", "--resume", str(tmp_path / "nothing")])
    record = json.loads((run_dir / "exit.json").read_text())
    assert record["exit_code"] == 2 and record["error"] == "CheckpointError"
    assert main([str(world / "run.yaml"), f"train.run_dir={run_dir}", "train.steps=1"]) == 0
    assert json.loads((run_dir / "exit.json").read_text())["exit_code"] == 0


def test_a_disk_that_takes_no_record_of_the_end_does_not_hide_the_error(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        if path.name.startswith(".exit.json"):
            path.touch()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(CheckpointError, match="nothing"):
        main([str(world / "run.yaml"), f"train.run_dir={tmp_path / 'run'}", "--resume", str(tmp_path / "nothing")])
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".train.lock", "log.txt"]


def test_a_folder_in_place_of_the_latest_pointer_is_no_bug(world: Path, tmp_path: Path) -> None:
    arguments = [str(world / "run.yaml"), f"train.run_dir={tmp_path / 'run'}"]
    main([*arguments, "train.steps=1"])
    latest = tmp_path / "run" / "checkpoints" / "latest"
    latest.unlink()
    latest.mkdir()
    with pytest.raises(EnvironmentFault, match=r"a folder stands where the file should \(.*latest\).*Move it away"):
        main([*arguments, "train.steps=2"])
    assert not list(latest.parent.glob(".latest-*"))


def test_a_checkpoint_of_another_architecture_names_the_first_mismatches(world: Path, tmp_path: Path) -> None:
    arguments = [str(world / "run.yaml"), f"train.run_dir={tmp_path / 'run'}"]
    main([*arguments, "train.steps=1"])
    before = (tmp_path / "run" / "config.yaml").read_text("utf-8")
    with pytest.raises(CheckpointError, match=r"shape \[8, .*the model wants \[4, ") as caught:
        main([*arguments, "model.moe.num_experts=4"])
    assert "experts" in str(caught.value) and str(caught.value).count("the model wants") <= 6
    assert (tmp_path / "run" / "config.yaml").read_text("utf-8") == before


def test_weights_that_explode_end_in_exit_code_four(world: Path, tmp_path: Path) -> None:
    arguments = [str(world / "run.yaml"), f"train.run_dir={tmp_path / 'run'}", "train.spike_retries=0"]
    with pytest.raises(NumericsError, match="not finite"):
        main([*arguments, "optim.learning_rate=1e30", "optim.schedule.warmup_steps=0", "train.steps=20"])
    record = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert record["exit_code"] == 4 and record["step"] > 0


def test_fresh_leaves_other_files_of_a_checkpoint_folder_of_the_users_own(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    arguments = [str(world / "run.yaml"), f"train.run_dir={tmp_path / 'run'}", f"checkpoint.dir={folder}"]
    main([*arguments, "train.steps=1"])
    (folder / "thesis.txt").write_text("mine", encoding="utf-8")
    main([*arguments, "train.steps=1", "--fresh"])
    assert (folder / "thesis.txt").read_text(encoding="utf-8") == "mine"


def test_a_run_with_its_checkpoints_elsewhere_is_found_by_its_directory(
    world: Path, tmp_path: Path, run_ernie5: Callable
) -> None:
    run_dir, other, folder, mine = tmp_path / "run", tmp_path / "other", tmp_path / "far" / "mine", tmp_path / "text"
    shutil.copytree(world / "text", mine)
    arguments = [str(world / "run.yaml"), "checkpoint.keep=1"]
    main([*arguments, f"train.run_dir={run_dir}", f"checkpoint.dir={folder}", "train.steps=1",
          f"tokenizers.text={mine}"])
    shutil.rmtree(mine)  # the run keeps its own
    assert not (run_dir / "checkpoints").exists()
    for verb in ("inspect", "verify"):
        result = run_ernie5(verb, run_dir)
        assert result.exit_code == 0 and str(folder / "step-00000001") in result.stdout, result
    main([*arguments, f"train.run_dir={other}", "train.steps=2", "tokenizers.text=embedded", "--resume", str(run_dir)])
    assert (other / "checkpoints" / "step-00000002").is_dir()
    (folder / "step-00000001" / "manifest.json").unlink()
    assert run_ernie5("inspect", folder / "step-00000001").exit_code == 2  # never another one in its place


def test_the_start_of_many_ranks_says_their_layout(repository: Path) -> None:
    wanted = ["engine.kind=grid", "parallel.tp=2", "parallel.ep=4", "batch.global_sequences=8"]
    config = load_config(repository / "configs/pretrain/debug.yaml", schema=RootConfig, overrides=wanted)
    assert describe_start(config, world_size=4, device=torch.device("cpu")) == (
        "4 processes, dp2 cp1 tp2 pp1 | edp1 ep4 etp1: grid engine, fp32 on cpu; "
        "a step is 8 rows = dp 2 x micro-batches 2 x rows 2"
    )


def test_a_fragment_says_what_it_is_a_fragment_for(world: Path, tmp_path: Path) -> None:
    (tmp_path / "part.yaml").write_text("model:\n  layers: 5\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"train\.steps is missing.*fragments.*`base:`.*part\.yaml"):
        main([str(tmp_path / "part.yaml"), "--validate"])


def test_configs_of_the_other_kind_are_sent_to_the_right_verb(run_ernie5: Callable, repository: Path) -> None:
    for verb, config, way_out in (
        (("tokenizer", "train"), "pretrain/debug.yaml", "ernie5 train "),
        (("train",), "tokenizer/visual.yaml", "ernie5 tokenizer train "),
    ):
        result = run_ernie5(*verb, repository / "configs" / config)
        assert result.exit_code == 2 and f"`{way_out}{repository / 'configs' / config}`" in result.stderr, result


def test_a_run_goes_on_with_the_tokenizers_it_kept_and_fresh_replaces_them(world: Path, tmp_path: Path) -> None:
    run_dir, mine = tmp_path / "run", tmp_path / "visual"
    shutil.copytree(world / "visual", mine)
    arguments = [str(world / "run.yaml"), f"train.run_dir={run_dir}", f"tokenizers.visual={mine}"]
    main([*arguments, "train.steps=1"])
    kept = run_dir / "tokenizers" / "visual" / "weights.safetensors"
    before = kept.read_bytes()
    stored = load_visual_tokenizer(mine)
    with torch.no_grad():
        next(iter(stored.parameters())).add_(1.0)
    save_visual_tokenizer(stored, mine)
    main([*arguments, "train.steps=2"])
    assert "is not the tokenizer of this run; using its own" in (run_dir / "log.txt").read_text("utf-8")
    assert kept.read_bytes() == before
    assert load_generation(run_dir).step == 2
    moved = run_dir.rename(tmp_path / "moved")
    assert load_generation(moved / "checkpoints").step == 2
    (moved / "tokenizers").rename(tmp_path / "away")
    with pytest.raises(TokenizerError, match="visual: .*RUN_DIR/tokenizers, beside"):
        load_generation(moved)
    (tmp_path / "away").rename(moved / "tokenizers")
    moved.rename(run_dir)
    main([*arguments, "train.steps=1", "--fresh"])
    assert kept.read_bytes() == (mine / "weights.safetensors").read_bytes() != before
    assert {path.name for path in (run_dir / "tokenizers").rglob("*.*")} == {"text.json", "weights.safetensors"}


def test_no_worker_of_the_data_outlives_a_run(world: Path, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    changes = ["train.steps=1", "train.eval_every_steps=1", "data.workers=1"]
    main([str(world / "run.yaml"), f"train.run_dir={tmp_path / 'run'}", *changes])
    assert not [t for t in set(threading.enumerate()) - before if "_work" in t.name]


def test_deepspeed_writes_a_checkpoint_that_the_local_engine_continues(
    world: Path, tmp_path: Path, read_rows: Callable
) -> None:
    same = [str(world / "run.yaml"), "optim.schedule.warmup_steps=1", "model.moe.balance.speed=0.01"]
    main([*same, f"train.run_dir={tmp_path / 'run'}", "engine.kind=deepspeed", "train.steps=2"])
    main([*same, f"train.run_dir={tmp_path / 'run'}", "engine.kind=local", "train.steps=3"])
    main([*same, f"train.run_dir={tmp_path / 'alone'}", "train.steps=3"])
    log = (tmp_path / "run" / "log.txt").read_text("utf-8")
    assert log.index("1 process: deepspeed engine with zero_stage 1, fp32") < log.index("1 process: local engine, fp32")
    mixed, whole = read_rows(tmp_path / "run"), read_rows(tmp_path / "alone")
    assert [row["tokens"] for row in mixed] == [row["tokens"] for row in whole]
    for ours, theirs in zip(mixed, whole, strict=True):
        # two engines, fp32: sums in another order
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_a_start_with_the_wrong_number_of_processes_clears_nothing_and_leaves_its_record(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text("{}\n", "utf-8")
    (run_dir / "exit.json").write_text('{"exit_code": 75}', "utf-8")
    command = [str(world / "run.yaml"), f"train.run_dir={run_dir}", "engine.kind=grid", "parallel.tp=2"]
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(LayoutError, match="tp = 2 .*does not divide the 3 processes"):
        main([*command, "--validate"])
    assert json.loads((run_dir / "exit.json").read_text("utf-8")) == {"exit_code": 75}
    with pytest.raises(LayoutError, match="does not divide the 3 processes"):
        main([*command, "--fresh"])
    assert json.loads((run_dir / "exit.json").read_text("utf-8"))["exit_code"] == 2
    assert (run_dir / "metrics.jsonl").read_text("utf-8") == "{}\n"
    with pytest.raises(LayoutError, match="does not divide the 3 processes"):
        main([*command, f"train.run_dir={tmp_path / 'new'}"])
    assert not (tmp_path / "new").exists()
    monkeypatch.setenv("WORLD_SIZE", "abc")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 'abc' in the environment.* Unset it"):
        main(command)


@pytest.mark.parametrize(("told", "said"), [
    ({"WORLD_SIZE": "2"}, "RANK and MASTER_ADDR and MASTER_PORT not set"),
    ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ""}, "and MASTER_PORT not set"),
    ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "RANK is '2' .* from 0 to 1"),
    ({"RANK": "1"}, "RANK is '1' .* from 0 to 0; WORLD_SIZE is not set"),
    ({"RANK": "abc"}, "RANK is 'abc'"),
    ({"RANK": ""}, "RANK is ''"),
    ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "h", "MASTER_PORT": "abc"}, "MASTER_PORT is 'abc'"),
    ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0' in the environment.* Unset it"),
])
def test_a_process_that_was_told_its_place_by_halves_does_not_train_alone(
    told: dict[str, str], said: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that knew of two processes and not its rank trained on half of every batch and called itself both."""
    monkeypatch.setattr("ernie5.train.recover.time.sleep", lambda _: None)  # other ranks than 0 let it speak first
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        main([str(world / "run.yaml"), f"train.run_dir={tmp_path / 'run'}", "engine.kind=grid", "train.steps=1"])
    assert not (tmp_path / "run").exists()


def test_a_start_that_is_refused_says_where_the_run_stands(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the number of processes, by a typing error under an agent, by the tokenizer: the run stands at step 2."""
    run_dir = tmp_path / "run"
    command = [str(world / "run.yaml"), f"train.run_dir={run_dir}", f"checkpoint.dir={tmp_path / 'far'}"]
    main([*command, "train.steps=2"])
    monkeypatch.setenv("ERNIE5_RUN_DIR", str(run_dir))
    for error, setting, processes in (
        (LayoutError, "parallel.tp=2", "3"), (ConfigError, "train.stepz=3", "1"),
        (CheckpointError, "model.moe.num_experts=4", "1"),
    ):
        (run_dir / "exit.json").unlink()
        with monkeypatch.context() as launcher, pytest.raises(error):
            launcher.setenv("WORLD_SIZE", processes)
            main([*command, setting, "engine.kind=grid", "train.steps=3"])
        record = json.loads((run_dir / "exit.json").read_text("utf-8"))
        assert (record["exit_code"], record["step"]) == (2, 2), setting
        assert record["checkpoint"] == str(tmp_path / "far" / "step-00000002"), setting
