"""The inventory of a lab: what an operator would write for a site with mirrors of its own.

Only variables that a real site could set as well; nothing says "lab" to a role.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy_dsv3 import capacity

from . import hosts, images

_FILES = ("hosts.ini", "group_vars/all.yml")

_HOSTS = """\
# Written by `deploy-dsv3 lab up`; `lab up` writes it again.
# A SIMULATION: the GPUs of these hosts do not exist.
[dsv3_head]
{head}

[dsv3_workers]
{workers}
"""

_ALL = """\
# Written by `deploy-dsv3 lab up`; `lab up` writes it again.

# How to log in: an ordinary user with sudo; host keys are checked.
ansible_user: {user}
ansible_ssh_private_key_file: {key}
ansible_ssh_common_args: >-
  -o UserKnownHostsFile={known_hosts} -o StrictHostKeyChecking=yes -o IdentitiesOnly=yes
{become}
# Mirrors of this site: the vendor's packages (simulated ones) and Docker Hub.
nvidia_driver_repository_url: {packages}/{drivers}
nvidia_driver_repository_key_url: {packages}/{drivers}archive-key.asc
nvidia_container_toolkit_repository_url: {packages}/libnvidia-container/stable/deb/amd64/
nvidia_container_toolkit_repository_key_url: {packages}/libnvidia-container/gpgkey
docker_engine_registry_mirrors: ["http://{registry}"]
docker_engine_insecure_registries: ["{registry}"]

model_weights_path: {model}

# Hosts much smaller than the real ones.
preflight_min_memory_gib: 2
preflight_min_disk_gib: 5
ray_cluster_object_store_memory_bytes: 268435456
{capacity}{limits}"""

#: Distributions whose own Docker knows no CDI.
_WITHOUT_CDI = ("debian12",)
#: Where the vendor's repository of a distribution is.
_DRIVERS = "nvidia/{}/x86_64/"

_CAPACITY = """\

# The real model would not fit these GPUs; the one of these hosts is a few KB.
preflight_require_capacity: false
"""

_LIMITS = """\

# This machine may not raise limits (no CAP_SYS_RESOURCE), so memlock is left as it is, and the proxy opens fewer files.
engine_ulimits: ["stack:67108864:67108864"]
endpoint_max_connections: 4096
"""


@dataclass(frozen=True, kw_only=True)
class Site:
    """What the inventory says about a lab.

    Attributes:
        key, known_hosts: files of the lab's SSH identity.
        password_file: holds the sudo password; none where sudo asks for none.
        distributions: the vendor's name of each host's distribution, by host.
        can_raise_limits: whether the hosts may raise resource limits.
    """

    hosts: Sequence[hosts.HostRecord]
    key: Path
    known_hosts: Path
    packages_url: str
    registry: str
    distributions: Mapping[str, str]
    can_raise_limits: bool
    password_file: Path | None = None


def render(site: Site) -> dict[str, str]:
    """File name in the inventory directory to content."""
    common = site.distributions[site.hosts[0].name]
    lines = [_host_line(site, host, common) for host in site.hosts]
    become = ""
    if site.password_file:
        become = f"ansible_become_password: \"{{{{ lookup('ansible.builtin.file', '{site.password_file}') }}}}\"\n"
    return {
        "hosts.ini": _HOSTS.format(head=lines[0], workers="\n".join(lines[1:])).rstrip() + "\n",
        "group_vars/all.yml": _ALL.format(
            user=images.ADMIN_USER,
            key=site.key,
            known_hosts=site.known_hosts,
            become=become,
            packages=site.packages_url,
            drivers=_DRIVERS.format(common),
            registry=site.registry,
            model=hosts.MODEL_PATH,
            capacity="" if _hold_the_model(site.hosts) else _CAPACITY,
            limits="" if site.can_raise_limits else _LIMITS,
        ),
    }


def _host_line(site: Site, host: hosts.HostRecord, common: str) -> str:
    own = site.distributions[host.name]
    words = [host.name, f"ansible_host={host.address}"]
    if own != common:
        words.append(f"nvidia_driver_repository_url={site.packages_url}/{_DRIVERS.format(own)}")
    if own in _WITHOUT_CDI:
        words.append("engine_gpu_mode=legacy")
    return " ".join(words)


def _hold_the_model(records: Sequence[hosts.HostRecord]) -> bool:
    """Whether GPUs like these, all in one replica, would hold the model that the hosts pretend to have."""
    gpus = [record.hardware_profile().gpus for record in records]
    count = sum(one.count for one in gpus)
    if not count:
        return False
    serving = capacity.Serving(
        gpus=count,
        gpu_memory_mib=min(one.memory_mib for one in gpus),
        gpu_name=gpus[0].model,
        layout=capacity.Layout(tp=count),
    )
    return capacity.estimate(capacity.load_model("deepseek-ai/DeepSeek-V3"), serving).fits


def write(folder: Path, files: dict[str, str]) -> None:
    """Write the inventory directory; a file that says the same already is left alone."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text() != content:
            path.write_text(content)


def remove(folder: Path) -> None:
    """Remove what `write` wrote; a person may keep more in the directory."""
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    for directory in (folder / "group_vars", folder):
        with contextlib.suppress(OSError):
            directory.rmdir()
