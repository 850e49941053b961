"""Training loop of the codecs (visual and audio tokenizers): cosine decay over a budget, averaged weights.

The budget is either a number of steps (then the run is a pure function of config and data) or of minutes (for "as good
as this machine can make it in the time I have"); the learning rate follows the share of it that is spent. A run
directory holds `state.pt` (everything needed to go on), `best.pt` (averaged weights of the best validation score),
`curves.jsonl` and, after every validation, the exported codec.
"""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from ernie5_kernels.processor import multiplies_bf16
from torch import nn
from tqdm import tqdm

from ernie5.errors import CheckpointError, NumericsError
from ernie5.observe.files import replace_file
from ernie5.optim.config import OptimConfig
from ernie5.optim.groups import ParameterGroup
from ernie5.optim.muon import Muon
from ernie5.tokenizers.config import CodecTrainConfig
from ernie5.train.codec_task import CodecClock, CodecFacts, CodecTask


@dataclass
class CodecState:
    """What changes during a run, beside the task's networks."""

    step: int
    seconds: float
    best_score: float
    average: nn.Module
    optimizers: tuple[torch.optim.Optimizer, ...]
    generator: torch.Generator

    @property
    def device(self) -> torch.device:
        """Where networks, data and random draws live."""
        return self.generator.device


def train_codec(task: CodecTask, *, config: CodecTrainConfig, out: Path, progress: bool = True) -> CodecFacts:
    """Train `task.codec` within the budget, resuming `out` if it holds a state; returns the last validation.

    Raises NumericsError when a loss is not finite. Files in `out`: see the module docstring; the exported codec of
    the best validation score lies in `out/export`.
    """
    out.mkdir(parents=True, exist_ok=True)
    state = _start(task, config=config)
    if (out / "state.pt").exists():
        _load_state(task, state, path=out / "state.pt")
        _forget_after(out / "curves.jsonl", step=state.step)
    bar = tqdm(total=100, desc=f"codec step {state.step}", unit="%", disable=not (progress and sys.stderr.isatty()))
    facts, clock, last_tick = None, _clock(state, config), time.monotonic()
    while clock.fraction < 1.0:
        record = _step(task, state, clock=clock, config=config)
        now = time.monotonic()
        state.seconds, last_tick = state.seconds + now - last_tick, now
        state.step += 1
        clock = _clock(state, config)
        ended = clock.fraction >= 1.0
        validates = state.step % config.validate_every_steps == 0 or ended
        if state.step % config.log_every_steps == 0 or validates:
            figures = {name: float(value) for name, value in record.items()}
            _refuse_infinite(figures, step=state.step, config=config)
            _append(out, {"step": state.step, "minutes": state.seconds / 60, **figures})
            bar.set_description(f"codec step {state.step} loss {figures['loss']:.4f}")
            bar.update(int(100 * clock.fraction) - bar.n)
        if validates:
            facts = _validate(task, state, out=out)
    bar.close()
    return facts if facts is not None else _facts(task, state, task.validate(state.average))


def computes_in_bf16(config: CodecTrainConfig, *, device: torch.device) -> bool:
    """Whether forward and backward are narrow: as `precision` says, but never where fp32 would be faster."""
    return config.precision == "bf16" and multiplies_bf16(device)


def _start(task: CodecTask, *, config: CodecTrainConfig) -> CodecState:
    average = copy.deepcopy(task.codec).eval().requires_grad_(False)
    networks = [net for net in (task.codec, task.discriminator) if net is not None]
    optimizers = tuple(_build_optimizer(net, config) for net in networks)
    generator = torch.Generator(next(task.codec.parameters()).device).manual_seed(config.seed)
    return CodecState(0, 0.0, -math.inf, average, optimizers, generator)


def _build_optimizer(network: nn.Module, config: CodecTrainConfig) -> torch.optim.Optimizer:
    """AdamW, or Muon for the maps between channels: linear layers and dense kernels, not depthwise ones."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW(_decay_groups(network, config), lr=config.learning_rate, betas=(0.9, config.beta2))
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    groups = []
    for is_matrix in (True, False):
        members = [(name, p) for name, p in named if _is_map(p) == is_matrix]
        names, parameters = tuple(name for name, _ in members), tuple(p for _, p in members)
        decay = config.weight_decay if is_matrix else 0.0
        groups.append(ParameterGroup("matrix" if is_matrix else "plain", names, parameters, decay, is_matrix))
    settings = OptimConfig(name="muon", learning_rate=config.learning_rate, beta2=config.beta2)
    return Muon([group for group in groups if group.names], config=settings)


def _is_map(parameter: nn.Parameter) -> bool:
    return parameter.dim() in (2, 4) and min(parameter.shape[:2]) > 1


def _decay_groups(network: nn.Module, config: CodecTrainConfig) -> list[dict[str, object]]:
    """Weight decay acts on matrices and kernels only."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _clock(state: CodecState, config: CodecTrainConfig) -> CodecClock:
    if config.steps is not None:
        return CodecClock(state.step, min(1.0, state.step / config.steps))
    return CodecClock(state.step, min(1.0, state.seconds / (60.0 * config.minutes)))


def learning_rate_at(clock: CodecClock, *, config: CodecTrainConfig) -> float:
    """Linear warm-up over `warmup_steps`, then half a cosine of the spent budget down to `final_rate` of the peak."""
    warmup = min(1.0, (clock.step + 1) / max(1, config.warmup_steps))
    cosine = 0.5 * (1.0 + math.cos(math.pi * clock.fraction))
    return config.learning_rate * warmup * (config.final_rate + (1.0 - config.final_rate) * cosine)


def _step(
    task: CodecTask, state: CodecState, *, clock: CodecClock, config: CodecTrainConfig
) -> dict[str, torch.Tensor | float]:
    """One optimizer step of the codec and, where the task has one, of the discriminator; its figures, on the device."""
    rate = learning_rate_at(clock, config=config)
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
    task.codec.train()
    batch = task.draw(clock, generator=state.generator)
    bf16, kind = computes_in_bf16(config, device=state.device), state.device.type
    with torch.autocast(kind, dtype=torch.bfloat16, enabled=bf16):
        losses = task.codec_losses(batch, clock=clock, generator=state.generator)
    norm = _update(task.codec, losses.total, optimizer=state.optimizers[0], clip=config.clip_norm)
    record = {"loss": losses.total.detach(), "lr": rate, "grad_norm": norm, **losses.parts}
    if task.discriminator is not None:
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=bf16):
            adversary = task.discriminator_loss(losses, clock=clock)
        if adversary is not None:
            _update(task.discriminator, adversary, optimizer=state.optimizers[1], clip=config.clip_norm)
            record["discriminator"] = adversary.detach()
    _average(state.average, task.codec, decay=min(config.ema_decay, (1 + state.step) / (10 + state.step)))
    task.after_step(clock, generator=state.generator)
    return record


def _refuse_infinite(figures: dict[str, float], *, step: int, config: CodecTrainConfig) -> None:
    """Raise NumericsError for a loss that is not finite; asked at every line of the curves, and before each state is
    written, not at every step: reading a number waits for the device."""
    if not math.isfinite(figures["loss"]):
        raise NumericsError(
            f"The codec's loss is {figures['loss']} at step {step} (learning rate {figures['lr']:.2e}), or became so "
            f"in the {config.log_every_steps} steps before. A loss must be finite. Lower train.learning_rate, or set "
            "train.precision: fp32."
        )


def _update(network: nn.Module, loss: torch.Tensor, *, optimizer: torch.optim.Optimizer, clip: float) -> torch.Tensor:
    network.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
    optimizer.step()
    return norm


@torch.no_grad()
def _average(average: nn.Module, network: nn.Module, *, decay: float) -> None:
    """Averaged weights; a short run averages over its recent tenth. Buffers (codebooks, statistics) are copied."""
    torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in network.parameters()], 1.0 - decay)
    for mine, theirs in zip(average.buffers(), network.buffers(), strict=True):
        mine.copy_(theirs)


def _facts(task: CodecTask, state: CodecState, quality: dict[str, float]) -> CodecFacts:
    parameters = sum(p.numel() for p in task.codec.parameters())
    return CodecFacts(quality, state.step, state.seconds / 60, parameters)


def _validate(task: CodecTask, state: CodecState, *, out: Path) -> CodecFacts:
    """Figures of the averaged weights into the curves; export when they are the best so far; save the state."""
    with torch.no_grad():
        facts = _facts(task, state, task.validate(state.average))
    _append(out, {"step": state.step, "minutes": facts.minutes, "validation": facts.quality})
    if facts.quality[task.score] >= state.best_score:
        state.best_score = facts.quality[task.score]
        _save_atomically(state.average.state_dict(), path=out / "best.pt")
        task.export(state.average, out / "export", facts=facts)
    _save_state(task, state, path=out / "state.pt")
    return facts


def _networks(task: CodecTask, state: CodecState) -> list[nn.Module]:
    return [net for net in (task.codec, state.average, task.discriminator) if net is not None]


def _save_state(task: CodecTask, state: CodecState, *, path: Path) -> None:
    content = {
        "step": state.step,
        "seconds": state.seconds,
        "best_score": state.best_score,
        "networks": [net.state_dict() for net in _networks(task, state)],
        "optimizers": [optimizer.state_dict() for optimizer in state.optimizers],
        "generator": state.generator.get_state(),
    }
    _save_atomically(content, path=path)


def _save_atomically(content: object, *, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(content, temporary)
    os.replace(temporary, path)


def _load_state(task: CodecTask, state: CodecState, *, path: Path) -> None:
    """Raises CheckpointError for a file that is damaged, or of a codec of another kind or shape."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch would fail in any way on what is torn
            damage = archive.testzip()
    except zipfile.BadZipFile as error:
        damage = str(error)
    if damage:
        raise CheckpointError(
            f"{path} is damaged, so the run cannot go on ({damage}). Bring back a copy, or remove it to start over; "
            f"the best weights so far are in {path.parent / 'export'}."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        state.step, state.seconds, state.best_score = content["step"], content["seconds"], content["best_score"]
        for network, weights in zip(_networks(task, state), content["networks"], strict=True):
            network.load_state_dict(weights)
        for optimizer, saved in zip(state.optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        state.generator.set_state(content["generator"])
    except (LookupError, TypeError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path} is of another tokenizer than the one configured ({reason}). Go on with the settings of that run, "
            "or give this one another --out."
        ) from error


def _forget_after(curves: Path, *, step: int) -> None:
    """Drop the lines of steps that are about to be repeated, and a line that a killed run left half written."""
    lines = curves.read_text(encoding="utf-8").splitlines(keepends=True) if curves.exists() else []
    kept = [line for line in lines if line.endswith("\n") and _step_of(line) <= step]
    replace_file(curves, content="".join(kept).encode("utf-8"))


def _step_of(line: str) -> float:
    """The step of a line of the curves; infinity for one that a full disk or a crash has torn."""
    try:
        return json.loads(line)["step"]
    except (ValueError, LookupError, TypeError):
        return math.inf


def _append(out: Path, record: dict[str, object]) -> None:
    with (out / "curves.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
