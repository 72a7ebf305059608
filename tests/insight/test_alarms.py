# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Alarms on planted faults, and none on healthy histories."""

import math

import pytest

from insight.alarms import find_alarms, kind_of, without_numbers


def healthy(epochs: int = 30) -> list[dict]:
    """Losses that fall, and a probe every 10 epochs and after the first."""
    history = []
    for epoch in range(1, epochs + 1):
        record = {"train_loss": 0.6 + 0.4 * 0.9**epoch}
        if epoch == 1 or epoch % 10 == 0:
            record |= {
                "probe_knn": 30 + epoch,
                "probe_linear": 40 + epoch,
                "rank_me": 60 - epoch / 2,  # falls from that of random weights
                "feature_distance": 0.4,
                "dead_channels": 1.0,
                "skipped_steps": 0.0,
                "holdout_loss": 0.7,
            }
        history.append(record)
    return history


def changed(last: int = 1, **values: float | None) -> list[dict]:
    """A healthy history with other values in its last epochs."""
    history = healthy()
    for record in history[-last:]:
        record |= values
    return history


def kinds(history: list[dict]) -> list[str]:
    return [kind_of(alarm) for alarm in find_alarms(history)]


def test_healthy_runs_raise_no_alarm_at_any_epoch():
    history = healthy(60)
    for end in range(1, len(history) + 1):
        assert find_alarms(history[:end]) == []


def test_nothing_known_raises_no_alarm():
    assert find_alarms([]) == []
    assert find_alarms([{"epoch": 0}]) == []


@pytest.mark.parametrize(
    ("history", "kind", "words"),
    [
        (changed(train_loss=None), "divergence", "train_loss is not finite"),
        (changed(train_loss=math.nan), "divergence", "train_loss is not finite"),
        (changed(holdout_loss=math.inf), "divergence", "holdout_loss is not finite"),
        (changed(features_finite=False), "divergence", "features hold NaN"),
        (
            changed(2, train_loss=0.9),
            "divergence",
            "train_loss 0.9 is far above its lowest",
        ),
        (changed(skipped_steps=12.0), "skipped steps", "12% of the optimizer steps"),
        (changed(rank_me=1.2), "collapse", "rank_me 1.2: all images get nearly the same"),
        (changed(rank_me=10.0), "collapse", "rank_me 10.0 has fallen from 59.5"),
        (changed(feature_distance=0.01), "collapse", "feature_distance 0.010"),
        (changed(dead_channels=80.0), "collapse", "80% of the channels are dead and 0% saturated"),
        (changed(saturated_channels=60.0), "collapse", "1% of the channels are dead and 60%"),
        (changed(30, train_loss=0.99), "stall", "train_loss 0.99 after 30 epochs"),
        (
            [{"train_loss": loss} for loss in (1.0, 1.15, 1.1, 1.0, 1.0, 1.0)],
            "stall",
            "train_loss 1 after 6 epochs, and 1 in the first",
        ),
        (
            [{"rank_me": rank} for rank in (60.0, 40.0, 30.0, 20.0)],  # a little in each probe
            "collapse",
            "rank_me 20.0 has fallen from 60.0",
        ),
        (
            changed(dead_channels=30.0, saturated_channels=25.0),
            "collapse",
            "30% of the channels are dead and 25% saturated",
        ),
        (changed(29, probe_knn=20.0), "stall", "probe_knn 20.0% is below its first value, 31.0%"),
    ],
)
def test_planted_faults_raise_their_alarm(history, kind, words):
    (alarm,) = find_alarms(history)
    assert alarm.startswith(f"{kind}: ")
    assert words in alarm
    assert "--" in alarm  # what to try


def test_alarms_of_probes_hold_until_the_next_probe():
    """They vanished in the epochs between two probes, and were logged anew after each."""
    for values in ({"skipped_steps": 12.0}, {"dead_channels": 80.0}):
        history = [*changed(**values), {"train_loss": 0.6}]
        (alarm,) = find_alarms(history)
        assert without_numbers(alarm) == without_numbers(find_alarms(history[:-1])[0])


def test_an_alarm_ends_with_its_cause():
    history = changed(feature_distance=0.01)
    assert kinds(history) == ["collapse"]
    assert kinds([*history, {**healthy()[-1]}]) == []
    assert kinds([*changed(skipped_steps=12.0), {"skipped_steps": 0.0}]) == []


@pytest.mark.parametrize(
    "history",
    [
        changed(1, train_loss=0.9),  # one epoch alone may be an accident
        changed(rank_me=26.0),
        healthy(5)[:5],
        [{"train_loss": x} for x in (1, 0.05, 0.001, 0.0013, 0.0014)],  # fitted perfectly
        [{"train_loss": x} for x in (1, 0.5, 0, 1e-6, 1e-6)],
        changed(30, train_loss=0.99)[:5],  # too early
        changed(29, probe_knn=29.0),  # within the noise
        changed(1, probe_knn=20.0),  # one probe alone
    ],
)
def test_what_is_not_clear_raises_no_alarm(history):
    assert find_alarms(history) == []


def test_a_few_dead_probes_without_knn_use_the_linear_one():
    history = [{"probe_linear": 50.0}, *({"probe_linear": 40.0},) * 3]
    assert kinds(history) == ["stall"]
    assert "probe_linear 40.0%" in find_alarms(history)[0]
