#!/usr/bin/env python3
"""Unpack one archive of the bundle: unpack.py BUNDLE NAME FOLDER. Checks every part against bundle.json first."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class _Parts(io.RawIOBase):
    """Files one after the other, as one stream."""

    def __init__(self, paths: list[Path]) -> None:
        self._files = (path.open("rb") for path in paths)
        self._open = next(self._files)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            data = self._open.read(len(buffer))
            if data:
                buffer[: len(data)] = data
                return len(data)
            self._open.close()
            following = next(self._files, None)
            if following is None:
                return 0
            self._open = following


def main() -> int:
    bundle, name, folder = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    parts = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))[name]["parts"]
    if problems := list(_problems(bundle, parts)):
        print("\n".join(f"unpack: {problem}" for problem in problems), file=sys.stderr)
        return 1
    folder.mkdir(parents=True, exist_ok=True)
    stream = io.BufferedReader(_Parts([bundle / part["name"] for part in parts]), 1 << 20)
    with tarfile.open(fileobj=stream, mode="r|xz") as archive:
        archive.extractall(folder, filter="tar")
    return 0


def _problems(bundle: Path, parts: list[dict[str, str]]) -> Iterator[str]:
    for part in parts:
        path = bundle / part["name"]
        if not path.exists():
            yield f"{path} is not here: carry it to this machine, then run again"
        elif hashlib.sha256(path.read_bytes()).hexdigest() != part["sha256"]:
            yield f"{path} is damaged: carry it again"


if __name__ == "__main__":
    sys.exit(main())
