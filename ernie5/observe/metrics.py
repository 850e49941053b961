"""Figures of a step, kept on the device until they are flushed: one transfer per flush, none per figure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ernie5.observe.sinks import MetricRow, Sink


@dataclasses.dataclass
class Figures:
    """Named scalars of one optimizer step; tensors are 0-d, on any device, and are not read before the flush."""

    step: int
    names: list[str] = dataclasses.field(default_factory=list)
    values: list[torch.Tensor | float | int] = dataclasses.field(default_factory=list)

    def add(self, name: str, value: torch.Tensor | float | int) -> None:
        """Append one figure. Raises ValueError for a name given twice or a tensor with more than one element."""
        if name in self.names:
            raise ValueError(f"figure {name} was added twice at step {self.step}")
        if isinstance(value, torch.Tensor):
            if value.numel() != 1:
                raise ValueError(f"figure {name} has shape {tuple(value.shape)}; a figure is one number")
            value = value.detach().reshape(())
        self.names.append(name)
        self.values.append(value)


class Metrics:
    """Collects Figures and writes them to every sink, `flush_every_steps` at a time."""

    def __init__(self, sinks: Sequence[Sink], *, flush_every_steps: int = 1) -> None:
        self._sinks = tuple(sinks)
        self._flush_every_steps = flush_every_steps
        self._pending: list[Figures] = []

    def record(self, figures: Figures) -> None:
        """Keep the figures of a step until it is time to write them."""
        self._pending.append(figures)
        if len(self._pending) >= self._flush_every_steps:
            self.flush()

    def flush(self) -> None:
        """Read every pending tensor and write the rows."""
        rows = _read(self._pending)
        self._pending = []
        for row in rows:
            for sink in self._sinks:
                sink.write(row)

    def go_back(self, step: int) -> None:
        """Forget every figure of the steps after `step`."""
        self._pending = []
        for sink in self._sinks:
            sink.go_back(step)

    def close(self) -> None:
        """Flush and close the sinks."""
        self.flush()
        for sink in self._sinks:
            sink.close()


def _read(pending: Sequence[Figures]) -> tuple[MetricRow, ...]:
    tensors = [value for figures in pending for value in figures.values if isinstance(value, torch.Tensor)]
    numbers = _transfer(tensors)
    rows = []
    for figures in pending:
        values = tuple(numbers.pop(0) if isinstance(value, torch.Tensor) else value for value in figures.values)
        rows.append(MetricRow(figures.step, tuple(figures.names), values))
    return tuple(rows)


def _transfer(tensors: Sequence[torch.Tensor]) -> list[float]:
    """The values of 0-d tensors as Python floats, with one device-to-host copy per device."""
    result = [0.0] * len(tensors)
    for device in {tensor.device for tensor in tensors}:
        places = [i for i, tensor in enumerate(tensors) if tensor.device == device]
        for place, number in zip(places, torch.stack([tensors[i].double() for i in places]).tolist(), strict=True):
            result[place] = number
    return result
