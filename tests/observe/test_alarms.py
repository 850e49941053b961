"""Alarms fire on NaN and on spikes, stay quiet on noise, and resume where they were."""

from __future__ import annotations

import math
import random

import pytest

from ernie5.observe.alarms import LoadAlarm, LossAlarm
from ernie5.observe.config import AlarmsConfig


def fed(alarm: LossAlarm, *, steps: int, level: float = 3.0, seed: int = 0) -> list:
    noise = random.Random(seed)
    return [alarm.check({"text": level + 0.1 * noise.gauss(0, 1)}, grad_norm=1.0, step=i) for i in range(steps)]


def test_ordinary_noise_and_a_falling_loss_raise_no_alarm() -> None:
    alarm = LossAlarm(AlarmsConfig())
    assert not any(fed(alarm, steps=500))
    falling = LossAlarm(AlarmsConfig())
    assert not any(falling.check({"text": 9.0 - i / 100}, grad_norm=1.0, step=i) for i in range(500))


def test_a_flat_curve_does_not_alarm_on_a_tiny_step() -> None:
    alarm = LossAlarm(AlarmsConfig())
    assert not any(alarm.check({"text": 2.0}, grad_norm=1.0, step=i) for i in range(100))
    assert alarm.check({"text": 2.1}, grad_norm=1.0, step=100) is None


def test_a_spike_names_its_action_and_figures() -> None:
    alarm = LossAlarm(AlarmsConfig(on_spike="stop"))
    fed(alarm, steps=100)
    found = alarm.check({"text": 9.0}, grad_norm=1.0, step=100)
    assert (found.kind, found.action) == ("spike", "stop")
    assert "step 100: loss of text 9 is above" in found.message


def test_a_modality_that_is_seldom_there_is_compared_with_itself() -> None:
    alarm = LossAlarm(AlarmsConfig(on_spike="skip"))
    for step in range(400):
        losses = {"text": 3.0 + 0.01 * (step % 3)} | ({"audio": 6.0 + 0.01 * (step % 7)} if step % 5 == 0 else {})
        assert not alarm.is_spike(losses) and alarm.check(losses, grad_norm=1.0, step=step) is None
    for losses, name in (({"text": 3.0, "audio": 9.0}, "audio"), ({"text": 6.0}, "text")):
        assert alarm.is_spike(losses)
        assert f"loss of {name}" in alarm.check(losses, grad_norm=1.0, step=400).message


def test_a_new_level_becomes_normal_after_a_while() -> None:
    alarm = LossAlarm(AlarmsConfig())
    fed(alarm, steps=100)
    fed(alarm, steps=60, level=6.0)
    assert alarm.check({"text": 6.0}, grad_norm=1.0, step=200) is None


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_is_an_alarm_and_does_not_enter_the_window(loss: float, norm: float) -> None:
    alarm = LossAlarm(AlarmsConfig())
    found = alarm.check({"text": loss}, grad_norm=norm, step=1)
    assert (found.kind, found.action) == ("nan", "skip")
    assert alarm.state() == {}


def test_the_window_is_restored_exactly() -> None:
    alarm, copy = LossAlarm(AlarmsConfig()), LossAlarm(AlarmsConfig())
    fed(alarm, steps=90)
    copy.load_state(alarm.state())
    assert copy.state() == alarm.state() and len(alarm.state()["text"]) == 64
    found, expected = (one.check({"text": 7.0}, grad_norm=1.0, step=91) for one in (copy, alarm))
    assert found.message == expected.message


def test_no_spike_is_called_before_half_the_window_is_known_or_when_switched_off() -> None:
    early = LossAlarm(AlarmsConfig())
    fed(early, steps=10)
    assert early.check({"text": 99.0}, grad_norm=1.0, step=11) is None
    off = LossAlarm(AlarmsConfig(spike_deviations=0.0))
    fed(off, steps=100)
    assert off.check({"text": 99.0}, grad_norm=1.0, step=101) is None


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
