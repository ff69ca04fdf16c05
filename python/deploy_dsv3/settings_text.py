"""The settings in words: for the terminal, as JSON, as Markdown tables in documents, as JSON Schema for
editors.

``python -m deploy_dsv3.settings_text README.md`` writes the tables between the document's two markers;
with ``--check`` it only says whether they are up to date.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

from deploy_dsv3 import setting_rules
from deploy_dsv3.settings import Setting, Settings, Value, catalogue

BEGIN = "<!-- settings:begin -->"
END = "<!-- settings:end -->"
_ORIGIN = "<!-- Written by `python -m deploy_dsv3.settings_text FILE` from the roles' argument_specs. -->"
_COLUMNS = {
    "": ("setting", "type", "default", "what it does"),
    "zh-CN": ("设置项", "类型", "默认值", "作用"),
}

_JSON_TYPES = {
    "str": "string",
    "path": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "list": "array",
    "dict": "object",
}


def public(known: Mapping[str, Setting] | None = None) -> list[Setting]:
    """The settings that operators can set, role by role."""
    return [setting for setting in (known or catalogue()).values() if not setting.internal]


def document(settings: Settings | None, known: Mapping[str, Setting] | None = None) -> dict[str, Any]:
    """The settings for ``--json``.

    Args:
        settings: checked values of hosts; None for the defaults alone.
        known: the catalogue; by default that of the installed roles.
    """
    return {
        "schema": 1,
        "verb": "settings",
        "settings": [
            {
                "name": setting.name,
                "role": setting.role,
                "type": setting.type,
                "elements": setting.elements,
                "choices": list(setting.choices),
                "default": setting.default,
                "unit": setting.unit,
                "secret": setting.secret,
                "former_names": list(setting.former_names),
                "doc": setting.doc,
                "values": [
                    {"hosts": list(hosts), "value": value.shown, "source": value.source}
                    for hosts, value in distinct(settings, setting)
                ],
            }
            for setting in public(known)
        ],
        "warnings": list(settings.warnings) if settings else [],
    }


def distinct(settings: Settings | None, setting: Setting) -> list[tuple[tuple[str, ...], Value]]:
    """The different values of a setting, each with the hosts that have it."""
    if settings is None:
        return []
    groups: dict[str, tuple[list[str], Value]] = {}
    for host, values in settings.values.items():
        value = values[setting.name]
        groups.setdefault(repr((value.value, value.source)), ([], value))[0].append(host)
    return [(tuple(hosts), value) for hosts, value in groups.values()]


def render(settings: Settings | None, stream: TextIO, known: Mapping[str, Setting] | None = None) -> None:
    """Write every setting with value, source, default, type and description for people."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=stream, highlight=False, soft_wrap=True)
    everywhere = tuple(settings.values) if settings else ()
    for role, group in groupby(public(known), key=lambda setting: setting.role):
        console.print(Text(f"\n{role}", style="bold"))
        for setting in group:
            values = distinct(settings, setting) or [((), Value(setting=setting, value=setting.default))]
            for hosts, value in values:
                where = "" if hosts in ((), everywhere) else f"  on {', '.join(hosts)}"
                changed = bool(value.file)
                console.print(
                    Text.assemble(
                        "  ",
                        (setting.name, "bold yellow" if changed else "bold"),
                        f" = {value.shown if setting.secret else written(value.value)}",
                        (f"  {value.source}{where}", "cyan" if changed else "dim"),
                    )
                )
            default = "" if setting.secret else f", default {written(setting.default)}"
            choices = f", one of {', '.join(map(str, setting.choices))}" if setting.choices else ""
            console.print(Text(f"      {type_of(setting)}{default}{choices}. {setting.doc}", style="dim"))
    for warning in settings.warnings if settings else ():
        console.print(f"warning: {warning}", style="yellow", markup=False)


def type_of(setting: Setting) -> str:
    """The type in words, e.g. ``list of str``."""
    return f"{setting.type} of {setting.elements}" if setting.elements else setting.type


def written(value: Any) -> str:
    """A value as it is written in YAML, on one line."""
    return json.dumps(value, ensure_ascii=False)


def markdown(known: Mapping[str, Setting] | None = None, *, columns: Sequence[str] = _COLUMNS[""]) -> str:
    """One table for each role, with `columns` as its headings."""
    lines = []
    for role, group in groupby(public(known), key=lambda setting: setting.role):
        lines += [
            f"**{role}**",
            "",
            f"| {' | '.join(columns)} |",
            "| --- | --- | --- | --- |",
        ]
        for setting in group:
            kind = " \\| ".join(f"`{choice}`" for choice in setting.choices) or type_of(setting)
            default = "" if setting.default in ("", None, [], {}) else f"`{written(setting.default)}`"
            doc = setting.doc.replace("|", "\\|")
            lines.append(f"| `{setting.name}` | {kind} | {default} | {doc} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def insert(text: str, known: Mapping[str, Setting] | None = None, *, language: str = "") -> str:
    """A document with the tables between its markers.

    Args:
        text: the document.
        known: the catalogue; by default that of the installed roles.
        language: language of the headings; the descriptions are the roles' own.

    Raises:
        ValueError: the document does not have both markers, in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the markers are missing:\n{BEGIN}\n{END}")
    return f"{before}{BEGIN}\n{_ORIGIN}\n\n{markdown(known, columns=_COLUMNS[language])}\n{END}{after}"


def json_schema(known: Mapping[str, Setting] | None = None) -> dict[str, Any]:
    """JSON Schema of a variables file, for editors: every setting, and no misspelt ones."""
    settings = public(known)
    prefixes = sorted({setting.role for setting in settings}, key=len, reverse=True)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "deploy-dsv3 settings",
        "description": "Variables of an inventory's group_vars or host_vars.",
        "type": "object",
        "properties": {
            **{setting.name: _property(setting) for setting in settings},
            # No value is right for a name that was given up; editors strike it through and show the new one.
            **{
                old: {"not": {}, "deprecated": True, "description": f"Renamed: write {setting.name} instead."}
                for setting in settings
                for old in setting.former_names
            },
        },
        # Other variables are the site's own; what begins like a setting must be one.
        "propertyNames": {
            "anyOf": [
                {"enum": [name for setting in settings for name in (setting.name, *setting.former_names)]},
                {"not": {"pattern": f"^(?:dsv3|{'|'.join(prefixes)})_"}},
            ]
        },
    }


def _property(setting: Setting) -> dict[str, Any]:
    schema: dict[str, Any] = {"description": setting.doc}
    if setting.type in _JSON_TYPES:
        schema["type"] = _JSON_TYPES[setting.type]
    if not setting.secret:
        schema["default"] = setting.default
    if setting.choices:
        schema["enum"] = list(setting.choices)
    item: dict[str, Any] = {"type": _JSON_TYPES[setting.elements]} if setting.elements in _JSON_TYPES else {}
    for rule in setting_rules.rules_for(setting.name):
        (item if rule.each else schema).update(rule.schema)
    if setting.type == "list":
        schema["items"] = item
    # An empty text means "not set".
    if setting.default == "" and "pattern" in schema:
        schema["pattern"] = f"^$|{schema['pattern']}"
    return schema


def _settings_of(document: Path) -> Mapping[str, Setting] | None:
    """What a document tells: a role's README its own settings, any other all of them."""
    folder = document.absolute().parent
    if folder.parent.name != "roles":
        return None
    return {name: setting for name, setting in catalogue().items() if setting.role == folder.name}


def main(argv: Sequence[str]) -> int:
    """Write the tables into documents, or check them.

    Args:
        argv: files, and ``--check`` to change nothing.

    Returns:
        1 if `--check` found a document that is out of date.
    """
    check = "--check" in argv
    stale = 0
    for name in argv:
        if name == "--check":
            continue
        path = Path(name)
        text = path.read_text(encoding="utf-8")
        # README.zh-CN.md is in the language that its name says.
        language = path.stem.partition(".")[2]
        fresh = insert(text, _settings_of(path), language=language if language in _COLUMNS else "")
        if fresh != text and check:
            print(f"{name} is out of date: python -m deploy_dsv3.settings_text {name}", file=sys.stderr)
            stale = 1
        elif fresh != text:
            path.write_text(fresh, encoding="utf-8")
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
