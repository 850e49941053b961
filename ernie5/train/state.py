"""The mutable state of a run beside the engine: where it stands, and the random generators."""

from __future__ import annotations

import dataclasses

import torch

from ernie5.checkpoint.manifest import RunState


@dataclasses.dataclass
class Progression:
    """Where a run stands. step: optimizer steps attempted; tokens: seen, padding not counted; skipped_in_row: steps
    dropped for a gradient that was not finite, since the last good one; recent_losses: the windows of the loss alarm by
    modality; routing: loads [L, 6, E] since the last line of routing.jsonl, on rank 0.
    """

    step: int = 0
    tokens: int = 0
    skipped_in_row: int = 0
    recent_losses: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    routing: torch.Tensor | None = None

    def snapshot(self, *, data: object) -> RunState:
        """What a checkpoint keeps; `data` is the loader's cursor."""
        return RunState(
            step=self.step,
            tokens=self.tokens,
            data=data,
            rng=capture_rng(),
            spikes=self.skipped_in_row,
            recent_losses={name: list(losses) for name, losses in self.recent_losses.items()},
            routing=None if self.routing is None else self.routing.long().tolist(),
        )

    def restore(self, run: RunState) -> None:
        """Continue from a checkpoint."""
        self.step, self.tokens, self.skipped_in_row = run.step, run.tokens, run.spikes
        # checkpoints of before hold one window, of sums over modalities: the alarm begins anew
        self.recent_losses = dict(run.recent_losses) if isinstance(run.recent_losses, dict) else {}
        self.routing = None if run.routing is None else torch.tensor(run.routing, dtype=torch.float32)
        restore_rng(run.rng)


def capture_rng() -> dict[str, str]:
    """States of torch's generators as hexadecimal text. Data and initialisation draw from keyed generators of their
    own, so these matter only to operations that use the global ones.
    """
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: bytes(state.numpy()).hex() for name, state in states.items()}


def restore_rng(states: dict[str, str]) -> None:
    """Undo `capture_rng`; a state of a device that is absent here is left out."""
    for name, text in states.items():
        state = torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
        if name == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(state)
