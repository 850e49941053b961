"""The codec loop with a task of one linear layer: budget, resume, best export, averaged weights."""

import json
import math

import pytest
import torch
from torch import nn

from ernie5.data.samples import Sample, SampleMeta
from ernie5.data.shards import ShardWriter
from ernie5.errors import CheckpointError, DataError, EnvironmentFault, NumericsError
from ernie5.tokenizers.config import CodecTrainConfig
from ernie5.train import codec
from ernie5.train.codec import learning_rate_at, train_codec
from ernie5.train.codec_command import main
from ernie5.train.codec_task import CodecClock, CodecLosses, CodecTask


class LineTask(CodecTask):
    """Fits y = 2 x; `broken_at` makes the loss NaN at that step."""

    def __init__(self, *, broken_at: int = -1) -> None:
        torch.manual_seed(0)
        self._codec, self._critic = nn.Linear(4, 4), nn.Linear(4, 1)
        self.broken_at, self.exports = broken_at, []

    @property
    def codec(self):
        return self._codec

    @property
    def discriminator(self):
        return self._critic

    @property
    def score(self):
        return "closeness"

    def draw(self, clock, *, generator):
        return torch.randn(8, 4, generator=generator)

    def codec_losses(self, batch, *, clock, generator):
        output = self._codec(batch)
        total = (output - 2 * batch).square().mean()
        if clock.step == self.broken_at:
            total = total * math.nan
        return CodecLosses(total, {"twice": 2 * total.detach()}, reconstruction=output, target=2 * batch)

    def discriminator_loss(self, losses, *, clock):
        return self._critic(losses.reconstruction.detach()).square().mean()

    def validate(self, codec):
        return {"closeness": -float((codec.weight - 2 * torch.eye(4)).square().mean())}

    def export(self, codec, directory, *, facts):
        self.exports.append(facts.steps)


def config_of(**changes) -> CodecTrainConfig:
    values = {"steps": 12, "precision": "fp32", "log_every_steps": 1, "validate_every_steps": 4, "warmup_steps": 2}
    return CodecTrainConfig(**{**values, "learning_rate": 0.05, **changes})


def losses_in(path):
    lines = [json.loads(line) for line in (path / "curves.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_run_learns_and_writes_curves_state_and_export(tmp_path):
    task = LineTask()
    facts = train_codec(task, config=config_of(steps=60), out=tmp_path, progress=False)
    losses = losses_in(tmp_path)
    assert list(losses) == list(range(1, 61)) and losses[60] < 0.3 * losses[1]
    assert facts.steps == 60 and task.exports[0] == 4 and (tmp_path / "state.pt").exists()


def test_bf16_is_fp32_where_the_processor_does_not_multiply_it(tmp_path, monkeypatch):
    """On a CPU with AVX2 alone the visual codec took ten times as long in bf16."""
    monkeypatch.setattr(codec, "multiplies_bf16", lambda device: False)
    for precision in ("fp32", "bf16"):
        train_codec(LineTask(), config=config_of(precision=precision), out=tmp_path / precision, progress=False)
    assert losses_in(tmp_path / "bf16") == losses_in(tmp_path / "fp32")


def test_a_stopped_run_continues_with_the_very_same_losses(tmp_path):
    train_codec(LineTask(), config=config_of(), out=tmp_path / "whole", progress=False)
    with pytest.raises(NumericsError):
        train_codec(LineTask(broken_at=6), config=config_of(), out=tmp_path / "parts", progress=False)
    train_codec(LineTask(), config=config_of(), out=tmp_path / "parts", progress=False)
    assert losses_in(tmp_path / "parts") == losses_in(tmp_path / "whole")
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "curves.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and len(steps) == 12 + 3  # one line per step and per validation, none twice


def test_a_finished_run_is_only_measured_again(tmp_path):
    first = train_codec(LineTask(), config=config_of(), out=tmp_path, progress=False)
    again = train_codec(LineTask(), config=config_of(), out=tmp_path, progress=False)
    assert again.quality == first.quality and again.steps == 12


def test_a_loss_that_is_not_a_number_stops_the_run_by_name(tmp_path):
    with pytest.raises(NumericsError, match="step 4 "):
        train_codec(LineTask(broken_at=3), config=config_of(), out=tmp_path, progress=False)


def test_a_budget_in_minutes_ends_the_run(tmp_path):
    facts = train_codec(LineTask(), config=config_of(steps=None, minutes=0.01), out=tmp_path, progress=False)
    assert facts.steps > 3 and facts.minutes >= 0.01


def test_the_learning_rate_warms_up_and_ends_at_its_final_share():
    config = config_of(learning_rate=1.0, warmup_steps=10, final_rate=0.1)
    assert learning_rate_at(CodecClock(0, 0.0), config=config) == pytest.approx(0.1)
    assert learning_rate_at(CodecClock(20, 0.0), config=config) == pytest.approx(1.0)
    assert learning_rate_at(CodecClock(20, 1.0), config=config) == pytest.approx(0.1)


class WideTask(LineTask):
    """Of another shape than LineTask."""

    def __init__(self):
        super().__init__()
        self._codec = nn.Linear(5, 5)


def test_a_state_that_is_damaged_or_of_another_codec_is_refused_by_its_path(tmp_path):
    train_codec(LineTask(), config=config_of(steps=4), out=tmp_path, progress=False)
    with pytest.raises(CheckpointError, match=r"state\.pt is of another tokenizer .*another --out"):
        train_codec(WideTask(), config=config_of(), out=tmp_path, progress=False)
    whole = (tmp_path / "state.pt").read_bytes()
    for damaged in (b"", b"rubbish", whole[: len(whole) // 2], whole.replace(b"best_score", b"best_scare")):
        (tmp_path / "state.pt").write_bytes(damaged)  # empty, none of ours, torn, and one that a disk changed
        with pytest.raises(CheckpointError, match=r"state\.pt is damaged.*remove it"):
            train_codec(LineTask(), config=config_of(), out=tmp_path, progress=False)
    torch.save({"some": "thing"}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="of another tokenizer"):
        train_codec(LineTask(), config=config_of(), out=tmp_path, progress=False)


def test_torn_lines_of_the_curves_do_not_stop_a_run_that_goes_on(tmp_path):
    train_codec(LineTask(), config=config_of(steps=4), out=tmp_path, progress=False)
    with (tmp_path / "curves.jsonl").open("a") as file:
        file.write('{"step": 4, "lo\n\n[]\n')
    train_codec(LineTask(), config=config_of(steps=8), out=tmp_path, progress=False)
    assert list(losses_in(tmp_path)) == list(range(1, 9))


@pytest.mark.parametrize("kind", ["text", "visual_debug"])
def test_an_out_that_takes_no_files_is_told_before_the_work(repository, tmp_path, monkeypatch, kind):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr("ernie5.train.text_vocabulary.train_text_vocabulary", None)
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(EnvironmentFault, match=r"Cannot write .*file.* another --out"):
            main(["train", str(repository / f"configs/tokenizer/{kind}.yaml"), "--out", str(out)])


def test_a_vocabulary_without_held_out_text_is_refused_before_it_is_trained(tmp_path, repository, monkeypatch):
    with ShardWriter(tmp_path, prefix="t", max_bytes=1 << 20) as writer:
        writer.write(Sample("t", SampleMeta(task="text", text="some words", split="train")))
    monkeypatch.setattr("ernie5.train.text_vocabulary.train_text_tokenizer", None)
    with pytest.raises(DataError, match="no sample for validation"):
        main(["train", str(repository / "configs/tokenizer/text.yaml"), f"data.shards=[{tmp_path}]",
              "--out", str(tmp_path / "out")])
