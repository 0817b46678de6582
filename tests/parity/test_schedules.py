"""Schedules equal the reference's stored numbers, and hold at their edges."""

import json
import math
from pathlib import Path

import pytest

from dinov3.errors import ConfigError
from dinov3.train.schedules import Schedule, cosine_schedule, linear_warmup_cosine, scaled_lr

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "golden" / "GOLDEN.json").read_text(encoding="utf-8")
)["sched"]


def at(schedule, steps):
    return [schedule(step) for step in steps]


def test_cosine_matches():
    def schedule(step):
        return cosine_schedule(step, base=1e-3, final=1e-6, total_steps=100, warmup_steps=10)

    assert at(schedule, (0, 5, 9, 10, 11, 55, 99, 100)) == pytest.approx(GOLDEN["cos"], rel=1e-12)


def test_truncated_cosine_matches():
    def schedule(step):
        return cosine_schedule(
            step, base=1e-3, final=1e-6, total_steps=100, warmup_steps=10, trunc_extra=0.25
        )

    assert at(schedule, (0, 10, 55, 99)) == pytest.approx(GOLDEN["cos_trunc"], rel=1e-12)


def test_warmup_then_cosine_matches():
    schedule = Schedule(0.0, 1.0, 0.1, warmup_steps=10, total_steps=100)
    assert at(schedule, (0, 5, 9, 10, 11, 55, 99)) == pytest.approx(GOLDEN["lwcd"], rel=1e-12)


def test_rising_cosine_then_constant_matches():
    schedule = Schedule(0.0, 0.0, 1.25e-5, warmup_steps=0, total_steps=300, cosine_steps=100)
    steps = (0, 50, 99, 100, 299)
    assert at(schedule, steps) == pytest.approx(GOLDEN["lwcd_cos"], rel=1e-12)


def test_frozen_steps_are_zero_and_precede_the_warmup_of_the_plain_cosine():
    def schedule(step):
        return cosine_schedule(
            step,
            base=1.0,
            final=0.0,
            total_steps=20,
            warmup_steps=3,
            start_warmup=0.5,
            freeze_steps=5,
        )

    assert at(schedule, (0, 4, 5, 6, 7, 8)) == [0.0, 0.0, 0.5, 0.75, 1.0, 1.0]


def test_frozen_steps_replace_the_head_of_a_schedule():
    free = Schedule(0.0, 1.0, 0.1, warmup_steps=10, total_steps=100)
    frozen = Schedule(0.0, 1.0, 0.1, warmup_steps=10, total_steps=100, freeze_steps=4)
    assert at(frozen, range(4)) == [0.0] * 4
    assert at(frozen, range(4, 100)) == at(free, range(4, 100))


def test_steps_beyond_the_run_have_the_end_value():
    schedule = Schedule(0.0, 1.0, 0.1, warmup_steps=10, total_steps=100)
    assert at(schedule, (100, 10**9)) == [0.1, 0.1]
    assert linear_warmup_cosine(5, start=0, peak=1, end=0.5, warmup_steps=9, total_steps=5) == 0.5


def test_a_schedule_of_equal_values_is_constant():
    schedule = Schedule(0.02, 0.02, 0.02, warmup_steps=0, total_steps=700)
    assert set(at(schedule, range(701))) == {0.02}


def test_a_cosine_of_no_steps_jumps_to_the_end():
    schedule = Schedule(0.04, 0.07, 0.07, warmup_steps=30, total_steps=100, cosine_steps=0)
    assert at(schedule, (0, 15, 30, 99)) == pytest.approx([0.04, 0.055, 0.07, 0.07])


def test_a_cosine_of_one_step_is_at_its_peak():
    assert at(Schedule(0.0, 1.0, 0.1, 2, 3), (1, 2, 3)) == [0.5, 1.0, 0.1]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"warmup_steps": 50, "total_steps": 20}, "must fit into the 20 steps .*got 50"),
        (
            {"warmup_steps": 5, "total_steps": 20, "cosine_steps": 16},
            r"must fit into the 20 steps of the run, got 5 \+ 16",
        ),
        ({"warmup_steps": -1, "total_steps": 20}, "lengths must not be negative"),
    ],
)
def test_contradicting_lengths_are_refused(lengths, message):
    with pytest.raises(ConfigError, match=message):
        Schedule(0.0, 1.0, 0.1, **lengths)


@pytest.mark.parametrize(
    ("lr", "batch_size", "peak"),
    [(1e-3, 2048, 5.657e-3), (5e-5, 4096, 4.0e-4), (3e-5, 4096, 2.4e-4), (1.25e-5, 2048, 7.07e-5)],
)
def test_square_root_rule_gives_the_published_peaks(lr, batch_size, peak):
    assert scaled_lr("sqrt_wrt_1024", lr, batch_size) == pytest.approx(peak, rel=1e-3)


def test_the_rules_agree_at_1024_images():
    linear = scaled_lr("linear_wrt_256", 1e-3, 1024)
    assert linear == pytest.approx(scaled_lr("sqrt_wrt_1024", 1e-3, 1024))
    assert math.isclose(linear, 4e-3)
    assert scaled_lr("none", 1e-3, 1024) == 1e-3


def test_an_unknown_rule_is_refused():
    with pytest.raises(ConfigError, match="lr_scaling: unknown rule, got 'cubic'"):
        scaled_lr("cubic", 1e-3, 64)
