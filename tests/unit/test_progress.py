"""What an operator sees while a run goes on."""

from __future__ import annotations

import io
import re
import sys
from typing import Any

import pytest

from deploy_dsv3 import progress
from deploy_dsv3.events import (
    Failure,
    Finished,
    HostChanged,
    HostFailed,
    HostOk,
    HostRetried,
    HostStarted,
    HostUnreachable,
    Record,
    StageStarted,
    TaskStarted,
    Warned,
)
from deploy_dsv3.progress import PlainProgress, TerminalProgress, duration

START = 1_000_000.0


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def failure(host: str, **more: Any) -> Failure:
    return Failure(host=host, stage="host", task="Install", message="no", **more)


RUN: list[Record] = [
    StageStarted(time=START, stage="preflight", title="look"),
    TaskStarted(time=START, stage="preflight", task="Probe"),
    HostStarted(time=START, stage="preflight", host="a", task="Probe"),
    HostOk(time=START + 1, stage="preflight", host="a", task="Probe"),
    StageStarted(time=START + 2, stage="host", title="prepare"),
    HostChanged(time=START + 65, stage="host", host="a", task="Install"),
    HostOk(time=START + 65, stage="host", host="b", task="Install"),
    StageStarted(time=START + 66, stage="host", title="more of it"),
    *(
        HostRetried(time=START + 66 + n, host="a", task="Wait", attempt=n, attempts=50, detail=f"{n} GB")
        for n in range(1, 32)
    ),
    Warned(time=START + 99, message="odd"),
    HostFailed(time=START + 100, host="b", task="Install", failure=failure("b")),
    HostFailed(time=START + 100, host="c", task="Maybe", failure=failure("c"), ignored=True),
    HostUnreachable(time=START + 101, host="d", task="Install", failure=failure("d", unreachable=True)),
    Finished(time=START + 102, hosts={}),
]


def plain() -> list[str]:
    stream = io.StringIO()
    with PlainProgress(stream, now=lambda: START) as shown:
        for record in RUN:
            shown.show(record)
    return stream.getvalue().splitlines()


class TestPlain:
    def test_a_line_for_each_stage_and_each_change(self) -> None:
        lines = [re.sub(r"^\d\d:\d\d:\d\d \+ *", "", line) for line in plain()]
        assert lines == [
            "0.0s preflight: look",
            "2.0s preflight: done in 2.0s, 0 changed on 1 hosts",
            "2.0s host: prepare",
            "65.0s host: a: changed: Install",
            "66.0s host: more of it",
            "67.0s host: a: waiting: Wait (1/50): 1 GB",
            "97.0s host: a: waiting: Wait (31/50): 31 GB",
            "99.0s host: warning: odd",
            "100.0s host: b: FAILED: Install",
            "101.0s host: d: unreachable: Install",
            "102.0s host: done in 1m40s, 1 changed on 2 hosts",
        ]

    def test_every_line_has_the_time(self) -> None:
        assert all(re.match(r"\d\d:\d\d:\d\d \+ *[\d.]+s ", line) for line in plain())


class TestTerminal:
    def test_hosts_and_stages_are_shown(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")
        stream = Terminal()
        with TerminalProgress(["a", "b", "c", "d"], stream) as shown:
            for record in RUN:
                shown.show(record)
            shown._live.refresh()
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
        assert re.search(r"✓ preflight +2\.0s +nothing to change", text)
        assert re.search(r"host: more of it", text)
        assert re.search(r"\ba +waiting 31/50 .*Wait: 31 GB", text)
        assert re.search(r"\bb +failed .*Install", text)
        assert re.search(r"\bd +unreachable .*Install", text)
        assert re.search(r"✗ host .*failed on b, d", text)
        assert "warning: odd" in text

    def test_a_line_without_a_terminals_width_is_cut_and_not_wrapped(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "60")
        stream = Terminal()
        with TerminalProgress(["a"], stream) as shown:
            shown.show(StageStarted(time=START, stage="host", title="x"))
            shown.show(HostStarted(time=START, host="a", task="word " * 40))
            shown._live.refresh()
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
        assert max(len(line) for line in text.replace("\r", "\n").splitlines()) <= 60


@pytest.mark.parametrize(
    ("json", "terminal", "kind", "target"),
    [
        (False, True, TerminalProgress, "stdout"),
        (False, False, PlainProgress, "stdout"),
        (True, True, PlainProgress, "stderr"),
        (True, False, PlainProgress, "stderr"),
    ],
)
def test_the_output_decides(
    monkeypatch: pytest.MonkeyPatch, json: bool, terminal: bool, kind: type, target: str
) -> None:
    streams = {name: Terminal() if terminal else io.StringIO() for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setenv("TERM", "xterm")
    chosen = progress.choose(["a"], json=json)
    assert type(chosen) is kind
    with chosen as shown:
        shown.show(StageStarted(time=START, stage="host", title="prepare"))
    written = {name for name, stream in streams.items() if stream.getvalue()}
    assert written == {target}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0.0s"), (0, "0.0s"), (3.25, "3.2s"), (59.9, "59.9s"), (59.97, "1m00s"), (125, "2m05s"), (3720, "1h02m")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
