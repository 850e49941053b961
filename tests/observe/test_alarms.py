"""Alarms fire on NaN and on spikes, stay quiet on noise, and resume where they were."""

from __future__ import annotations

import math
import random

import pytest

from ernie5.observe.alarms import LoadAlarm, LossAlarm
from ernie5.observe.config import AlarmsConfig


def fed(alarm: LossAlarm, *, steps: int, level: float = 3.0, seed: int = 0) -> list:
    noise = random.Random(seed)
    return [alarm.check(level + 0.1 * noise.gauss(0, 1), grad_norm=1.0, step=i) for i in range(steps)]


def test_ordinary_noise_and_a_falling_loss_raise_no_alarm() -> None:
    alarm = LossAlarm(AlarmsConfig())
    assert not any(fed(alarm, steps=500))
    falling = LossAlarm(AlarmsConfig())
    assert not any(falling.check(9.0 - i / 100, grad_norm=1.0, step=i) for i in range(500))


def test_a_flat_curve_does_not_alarm_on_a_tiny_step() -> None:
    alarm = LossAlarm(AlarmsConfig())
    assert not any(alarm.check(2.0, grad_norm=1.0, step=i) for i in range(100))
    assert alarm.check(2.1, grad_norm=1.0, step=100) is None


def test_a_spike_names_its_action_and_figures() -> None:
    alarm = LossAlarm(AlarmsConfig(on_spike="stop"))
    fed(alarm, steps=100)
    found = alarm.check(9.0, grad_norm=1.0, step=100)
    assert (found.kind, found.action) == ("spike", "stop")
    assert "step 100" in found.message and "9" in found.message


def test_a_new_level_becomes_normal_after_a_while() -> None:
    alarm = LossAlarm(AlarmsConfig())
    fed(alarm, steps=100)
    fed(alarm, steps=60, level=6.0)
    assert alarm.check(6.0, grad_norm=1.0, step=200) is None


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_is_an_alarm_and_does_not_enter_the_window(loss: float, norm: float) -> None:
    alarm = LossAlarm(AlarmsConfig())
    found = alarm.check(loss, grad_norm=norm, step=1)
    assert (found.kind, found.action) == ("nan", "skip")
    assert alarm.state() == []


def test_the_window_is_restored_exactly() -> None:
    alarm, copy = LossAlarm(AlarmsConfig()), LossAlarm(AlarmsConfig())
    fed(alarm, steps=90)
    copy.load_state(alarm.state())
    assert copy.state() == alarm.state() and len(alarm.state()) == 64
    assert (copy.check(7.0, grad_norm=1.0, step=91)).message == (alarm.check(7.0, grad_norm=1.0, step=91)).message


def test_no_spike_is_called_before_half_the_window_is_known_or_when_switched_off() -> None:
    early = LossAlarm(AlarmsConfig())
    fed(early, steps=10)
    assert early.check(99.0, grad_norm=1.0, step=11) is None
    off = LossAlarm(AlarmsConfig(spike_deviations=0.0))
    fed(off, steps=100)
    assert off.check(99.0, grad_norm=1.0, step=101) is None


def test_imbalance_names_the_worst_layer() -> None:
    alarm = LoadAlarm(AlarmsConfig(), total_steps=20)
    assert alarm.check([1.2, math.nan], step=3) is None
    assert alarm.check([], step=3) is None
    found = alarm.check([1.2, 7.5, math.nan], step=3)
    assert found.action == "warn" and "7.50 in MoE layer 1" in found.message


def test_imbalance_is_no_news_at_the_start_of_a_run_and_is_not_repeated_each_step() -> None:
    alarm = LoadAlarm(AlarmsConfig(load_grace=0.1, load_every_steps=50), total_steps=1000)
    said = [step for step in range(1, 251) if alarm.check([9.0], step=step)]
    assert said == [101, 151, 201]
