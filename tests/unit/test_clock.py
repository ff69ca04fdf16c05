"""Bounds on a clock's offset hold whatever the connection cost, and become tighter by repetition."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deploy_dsv3 import clock
from deploy_dsv3.facts import Clock

seconds = st.floats(min_value=0, max_value=60)


@given(offset=st.floats(min_value=-1e6, max_value=1e6), there=seconds, work=seconds, back=seconds)
def test_the_true_offset_is_always_within(offset: float, there: float, work: float, back: float) -> None:
    sent = 1.8e9
    measured = clock.measure(
        sent=sent,
        began=sent + there + offset,
        ended=sent + there + work + offset,
        received=sent + there + work + back,
    )
    assert measured.offset_low - 1e-6 <= offset <= measured.offset_high + 1e-6
    assert abs(clock.width(measured) - (there + back)) < 1e-5  # the host's own work costs no certainty


def test_two_measurements_are_tighter_than_one() -> None:
    narrowed = clock.narrow(Clock(offset_low=-1, offset_high=0.5), Clock(offset_low=-0.2, offset_high=3))
    assert (narrowed.offset_low, narrowed.offset_high) == (-0.2, 0.5)


def test_a_clock_that_was_set_in_between_is_taken_as_it_is_now() -> None:
    now = Clock(offset_low=-0.1, offset_high=0.1)
    assert clock.narrow(Clock(offset_low=5, offset_high=6), now) == now
