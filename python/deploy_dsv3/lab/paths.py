"""Where the lab keeps what it needs: state goes with `lab down`, caches stay."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
FILES = _PACKAGE / "files"
PROFILES = _PACKAGE / "profiles"
CACHE_VARIABLE = "DEPLOY_DSV3_LAB_CACHE"


@dataclass(frozen=True, kw_only=True)
class LabPaths:
    """The folders of all labs of one checkout or user.

    Attributes:
        state: what describes running labs; removed by the last `lab down`.
        cache: what is slow to make: images (the private engine's data), built packages.
        inventory: where the inventory is written by default, the lab's name in place of ``{name}``.
    """

    state: Path
    cache: Path
    inventory: str

    @property
    def runtime(self) -> Path:
        """Sockets: a path of a socket may not be longer than 107 bytes, and a checkout's may be."""
        return Path("/run/deploy-dsv3") / f"lab-{self.tag}"

    @property
    def tag(self) -> str:
        """Short name of this state folder; labels what is ours among others' containers."""
        return hashlib.sha256(str(self.state).encode()).hexdigest()[:8]

    def lab(self, name: str) -> Path:
        """Folder of one lab."""
        return self.state / "labs" / name


def default_paths() -> LabPaths:
    """``.lab`` and ``.cache/lab`` of a checkout, else the user's XDG folders.

    ``DEPLOY_DSV3_LAB_CACHE`` names another folder for the caches, for a checkout on a file system that cannot carry
    Docker's data (overlayfs, NFS).
    """
    checkout = _PACKAGE.parents[2]
    if (checkout / "pyproject.toml").is_file() and (checkout / "playbooks").is_dir():
        state, cache = checkout / ".lab", checkout / ".cache" / "lab"
        inventory = str(checkout / "inventory" / "{name}")
    else:
        home = Path.home()
        state = Path(os.environ.get("XDG_STATE_HOME") or home / ".local" / "state") / "deploy-dsv3" / "lab"
        cache = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "deploy-dsv3" / "lab"
        inventory = str(state / "labs" / "{name}" / "inventory")
    named = os.environ.get(CACHE_VARIABLE)
    return LabPaths(state=state, cache=Path(named).absolute() if named else cache, inventory=inventory)
