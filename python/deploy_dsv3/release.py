"""A release: a file with what must be the same on every node, such as image digest, driver branch and serving flags.

It is an ordinary file of variables (``--release FILE`` means ``-e @FILE`` before all other ``-e``), so its values win
over the inventory's, lose to ``-e``, and tell where they are from. What makes it a release is what it may hold: no
setting of one host or one site, no secret.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import yaml

from deploy_dsv3 import inventory_text, settings
from deploy_dsv3.errors import ConfigError
from deploy_dsv3.settings import Setting

#: The setting that names the release; `status` shows it of what runs.
NAME = "lmdeploy_release_name"

_OF_A_RELEASE = re.compile(
    r"engine_image_(name|digest|archive_path)"
    r"|engine_(environment|capabilities|ulimits|ipc_mode)"
    r"|nvidia_driver_(branch|kernel_modules|packages)"
    r"|nvidia_container_toolkit_version"
    r"|model_weights_(name|path)"
    r"|ray_cluster_authentication"
    # Everything of the serving command but where it listens.
    r"|lmdeploy_(?!server_port$|dist_port$|no_log$).*"
)


def belongs(setting: Setting) -> bool:
    """Whether a setting may be in a release."""
    return not setting.internal and not setting.secret and _OF_A_RELEASE.fullmatch(setting.name) is not None


def check(path: Path) -> list[ConfigError]:
    """What is wrong with a release beyond the values themselves, which are checked with all others.

    Args:
        path: the file.
    """
    problems = inventory_text.check_file(path, variables=True)
    if problems:
        return problems
    text = path.read_text(encoding="utf-8")
    if text.startswith(inventory_text.VAULT_HEADER):
        return [
            ConfigError(
                message="this release is encrypted, and a release holds no secrets",
                file=str(path),
                remedy="Decrypt it; secrets belong into the inventory's group_vars.",
            )
        ]
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    names = {str(key.value): key.start_mark.line + 1 for key, _ in pairs}
    known = settings.catalogue()
    errors = [_stranger(path, name, line, known) for name, line in names.items() if not _is_ours(name, known)]
    if NAME not in names:
        errors.append(
            ConfigError(
                message="this release has no name",
                file=str(path),
                key=NAME,
                expected=f'{NAME}: "2026-11"',
                remedy="Name it; `deploy-dsv3 status` shows the name of what runs.",
            )
        )
    return errors


def _is_ours(name: str, known: Mapping[str, Setting]) -> bool:
    return name in known and belongs(known[name])


def _stranger(path: Path, name: str, line: int, known: Mapping[str, Setting]) -> ConfigError:
    if name in known:
        remedy = "Set it in the inventory: it is of a host or a site, and a release is for all of them."
        if known[name].secret:
            remedy = "Keep it in a vault of the inventory: a release holds no secrets."
    else:
        meant = settings.suggest(name, [one.name for one in known.values() if belongs(one)])
        remedy = f"Did you mean {meant!r}?" if meant else "docs/reference/settings.md lists what a release may hold."
    return ConfigError(message=f"{name} is no part of a release", file=str(path), line=line, key=name, remedy=remedy)
