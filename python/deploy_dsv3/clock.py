"""How far a host's clock is from the controller's, as bounds that hold however slow the connection was."""

from __future__ import annotations

from .facts import Clock


def measure(*, sent: float, began: float, ended: float, received: float) -> Clock:
    """Return the bounds from one round trip.

    `sent` and `received` are the controller's clock around it, `began` and `ended` the host's in between,
    all in seconds. The host began after the request was sent and ended before its answer came; nothing else
    is assumed.
    """
    return Clock(offset_low=ended - received, offset_high=began - sent)


def width(clock: Clock) -> float:
    """Return what is left uncertain [seconds]."""
    return clock.offset_high - clock.offset_low


def narrow(first: Clock, second: Clock) -> Clock:
    """Return the bounds that satisfy both measurements; the second's where a clock was set in between."""
    low = max(first.offset_low, second.offset_low)
    high = min(first.offset_high, second.offset_high)
    return Clock(offset_low=low, offset_high=high) if low <= high else second
