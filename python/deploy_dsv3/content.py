"""Where playbooks, roles, the example inventory and the verification suites are.

A checkout keeps them at its root; the wheel carries the same tree inside the package (`pyproject.toml`,
``force-include``). Every other module asks here, so that both behave alike from any working directory.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from deploy_dsv3.errors import InternalError

_PACKAGE = Path(__file__).resolve().parent


@cache
def root() -> Path:
    """The directory that holds ``playbooks/`` and ``roles/``.

    Raises:
        InternalError: the installation is incomplete.
    """
    # An editable install has no _content; a wheel has no checkout above it.
    for candidate in (_PACKAGE / "_content", _PACKAGE.parents[1]):
        if (candidate / "playbooks").is_dir() and (candidate / "roles").is_dir():
            return candidate
    raise InternalError(
        f"the playbooks and roles that belong to {_PACKAGE} are missing",
        remedy="Install deploy-dsv3 again: the installation is incomplete.",
    )


def playbooks() -> Path:
    """The directory of the playbooks."""
    return root() / "playbooks"


def playbook(verb: str) -> Path:
    """The playbook of a verb, e.g. ``deploy``.

    Raises:
        InternalError: there is none.
    """
    path = playbooks() / f"{verb}.yml"
    if not path.is_file():
        raise InternalError(f"no playbook {path}", remedy="Install deploy-dsv3 again.")
    return path


def roles() -> Path:
    """The directory of the roles."""
    return root() / "roles"


def example_inventory() -> Path:
    """The directory of the example inventory."""
    return root() / "inventory" / "example"


def testinfra() -> Path:
    """The directory of the verification suites."""
    return root() / "tests" / "testinfra"


def read_yaml(path: Path) -> Any:
    """What a YAML file of the content says.

    Raises:
        InternalError: it cannot be read.
    """
    try:
        # libyaml's: there are a hundred such files, and each run reads them.
        return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    except (OSError, yaml.YAMLError) as error:
        raise InternalError(f"{path} cannot be read: {error}", remedy="Install deploy-dsv3 again.") from error
