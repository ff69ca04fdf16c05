"""Ask LMDeploy's own argument parser, in an environment that holds the real package.

Reads one JSON document on stdin and prints one on stdout; runs as a script, with that environment's Python:

    {"argv": ["lmdeploy", "serve", "api_server", …]}  →  {"accepted": true, "values": {…}}
                                                      or {"accepted": false, "error": "…"}
    {"options": true}                                 →  {"version": "0.18.0", "options": [{"names": […], …}]}

The parser's modules import torch, transformers and more for other purposes. Where one of those is not
installed, a hollow module takes its place: the parser is LMDeploy's own code either way, and the
environment stays small.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import json
import sys
import types
from collections.abc import Sequence
from typing import Any

# What importing lmdeploy.cli of 0.18.0 needs of others; found by hiding every package but LMDeploy.
IMPORTED = [
    "PIL",
    "mmengine",
    "numpy",
    "openai_harmony",
    "partial_json_parser",
    "psutil",
    "pybase64",
    "pydantic",
    "requests",
    "shortuuid",
    "torch",
    "tqdm",
    "transformers",
    "typing_extensions",
    "urllib3",
]


class _Hollow(type):
    """A class whose attributes, items and calls are itself; a decorator gives back what it decorates."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __call__(cls, *arguments: Any, **named: Any) -> Any:
        return arguments[0] if len(arguments) == 1 and not named and callable(arguments[0]) else cls

    def __or__(cls, _other: object) -> Any:
        return cls

    __ror__ = __or__

    def __getitem__(cls, _key: object) -> Any:
        return cls


class _Nothing(metaclass=_Hollow):
    pass


class _HollowModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing


class _HollowFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, packages: frozenset[str]) -> None:
        self._packages = packages

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in self._packages:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _HollowModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def build() -> argparse.ArgumentParser:
    """Return LMDeploy's parser with the `serve` commands in it."""
    missing = frozenset(name for name in IMPORTED if importlib.util.find_spec(name) is None)
    sys.meta_path.insert(0, _HollowFinder(missing))
    from lmdeploy.cli.cli import CLI
    from lmdeploy.cli.serve import SubCliServe

    SubCliServe.add_parsers()
    parser: argparse.ArgumentParser = CLI.parser
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> dict[str, Any]:
    """Parse one command line; argv[0] is the command itself."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            values = vars(parser.parse_args(argv[1:]))
    except SystemExit:
        return {"accepted": False, "error": said.getvalue().strip().rpartition("error: ")[2]}
    values.pop("run", None)
    return {"accepted": True, "values": values}


def describe(parser: argparse.ArgumentParser) -> list[dict[str, Any]]:
    """Return the options of `serve api_server` as arguments to add_argument."""
    serve = _subparsers(parser)["serve"]
    actions = _subparsers(serve)["api_server"]._actions
    return [_option(action) for action in actions if not isinstance(action, argparse._HelpAction)]


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


def _option(action: argparse.Action) -> dict[str, Any]:
    option: dict[str, Any] = {"names": list(action.option_strings) or [action.dest]}
    if isinstance(action, argparse._StoreTrueAction):
        return {**option, "action": "store_true"}
    kinds = {"loads": "json", "_parse": "quant_policy"}
    name = getattr(action.type, "__name__", "str")
    option["type"] = kinds.get(name, name)
    if action.option_strings:
        option["default"] = action.default
        if "_".join(action.option_strings[0].strip("-").split("-")) != action.dest:
            option["dest"] = action.dest
    if action.nargs is not None:
        option["nargs"] = action.nargs
    if action.choices is not None:
        option["choices"] = list(action.choices)
    return option


def main() -> None:
    question = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):  # LMDeploy logs to stdout
        parser = build()
    if question.get("options"):
        from lmdeploy.version import __version__

        answer: dict[str, Any] = {"version": __version__, "options": describe(parser)}
    else:
        answer = parse(parser, question["argv"])
    json.dump(answer, sys.stdout, default=str)


if __name__ == "__main__":
    main()
