"""Figures stay tensors until they are flushed, and come out in order."""

from __future__ import annotations

import pytest
import torch

from ernie5.observe.metrics import Figures, Metrics
from ernie5.observe.sinks import MetricRow, Sink


class ListSink(Sink):
    def __init__(self) -> None:
        self.rows: list[MetricRow] = []
        self.closed = False

    def write(self, row: MetricRow) -> None:
        self.rows.append(row)

    def go_back(self, step: int) -> None:
        self.rows = [row for row in self.rows if row.step <= step]

    def close(self) -> None:
        self.closed = True


def figures_of(step: int) -> Figures:
    figures = Figures(step=step)
    figures.add("loss", torch.tensor(step / 3, dtype=torch.float32, requires_grad=True))
    figures.add("tokens", 10 * step)
    figures.add("lr", torch.tensor([1e-4], dtype=torch.float64))
    return figures


def test_rows_are_written_every_n_steps_and_at_the_end() -> None:
    sink = ListSink()
    metrics = Metrics([sink], flush_every_steps=2)
    metrics.record(figures_of(1))
    assert sink.rows == []
    metrics.record(figures_of(2))
    assert [row.step for row in sink.rows] == [1, 2]
    metrics.record(figures_of(3))
    metrics.close()
    assert [row.step for row in sink.rows] == [1, 2, 3] and sink.closed


def test_values_keep_order_type_and_precision() -> None:
    sink = ListSink()
    Metrics([sink]).record(figures_of(1))
    row = sink.rows[0]
    assert row.names == ("loss", "tokens", "lr")
    assert row.value("loss") == float(torch.tensor(1 / 3, dtype=torch.float32))
    assert row.value("tokens") == 10 and isinstance(row.value("tokens"), int)
    assert row.value("lr") == 1e-4


def test_a_figure_is_one_number_under_one_name() -> None:
    figures = figures_of(1)
    with pytest.raises(ValueError, match="twice"):
        figures.add("loss", 1.0)
    with pytest.raises(ValueError, match="one number"):
        figures.add("vector", torch.zeros(2))


def test_going_back_forgets_pending_and_written_figures_of_later_steps() -> None:
    sink = ListSink()
    metrics = Metrics([sink], flush_every_steps=2)
    for step in (1, 2, 3):
        metrics.record(figures_of(step))
    metrics.go_back(1)
    metrics.record(figures_of(2))
    metrics.close()
    assert [row.step for row in sink.rows] == [1, 2]
