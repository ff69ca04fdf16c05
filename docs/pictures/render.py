"""Turns what a terminal showed (with colours, on standard input) into an SVG picture.

tmux capture-pane -p -e -S - -t SESSION | python docs/pictures/render.py TITLE docs/pictures/deploy.svg
"""

import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text


def main() -> None:
    title, target = sys.argv[1], Path(sys.argv[2])
    lines = [line.rstrip() for line in sys.stdin.read().splitlines()]
    text = Text.from_ansi("\n".join(lines).strip("\n"))
    console = Console(record=True, width=max(len(line.plain) for line in text.split()) + 1, file=sys.stderr)
    console.print(text)
    svg = console.export_svg(title=title)
    # The fonts come from the reader's machine: a picture fetches nothing.
    svg = "\n".join(line for line in svg.splitlines() if "url(" not in line or "clip-path" in line)
    target.write_text(svg + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
