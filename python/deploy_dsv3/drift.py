"""What somebody changed by hand: the host as the last finished deploy left it, beside the host as it is now.

Pure: facts in, differences out. `state_of` puts everything that a person could change into one flat mapping of
readable keys (``container restart_policy``, ``file /etc/...``, ``sysctl vm.swappiness``). Role
`deployment_record` keeps it on the host; the same function applied to newer facts shows the drift.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deploy_dsv3.facts import Container, FileState, HostFacts

# Pattern of a key, what kind of thing that is, and the role that makes it; "" where no role does.
_KINDS: tuple[tuple[str, str, str], ...] = (
    (r"container (image|image_id)", "image", "engine"),
    (r"container .*", "container", "engine"),
    (r"file /etc/deploy-dsv3/endpoint/.*", "file", "endpoint"),
    (r"file /etc/deploy-dsv3/engine/(serve\.json|secrets/api_keys)", "file", "lmdeploy"),
    (r"file /etc/deploy-dsv3/engine/.*", "file", "engine"),
    (r"file /etc/deploy-dsv3/release\.json", "file", "lmdeploy"),
    (r"file /etc/deploy-dsv3/image\.json", "file", "engine_image"),
    (r"file /etc/systemd/system/dsv3-endpoint\.service", "file", "endpoint"),
    (r"file /etc/systemd/system/dsv3-engine\.service", "file", "engine"),
    (r"file /etc/systemd/system/nvidia-persistenced\.service\.d/.*", "file", "nvidia_driver"),
    (r"file /etc/systemd/system/.*", "file", ""),
    (r"file /etc/modprobe\.d/deploy-dsv3-nouveau\.conf", "file", "nvidia_driver"),
    (r"file /etc/modules-load\.d/deploy-dsv3-rdma\.conf", "file", "rdma"),
    (r"file /etc/sysctl\.d/90-deploy-dsv3\.conf", "file", "node_network"),
    (r"file /etc/cdi/.*", "file", "nvidia_container_toolkit"),
    (r"file .*deploy-dsv3-nvidia-driver.*", "file", "nvidia_driver"),
    (r"file .*deploy-dsv3-nvidia-container-toolkit.*", "file", "nvidia_container_toolkit"),
    (r"file .*deploy-dsv3-docker.*", "file", "docker_engine"),
    (r"file .*", "file", ""),
    (r"daemon\.json.*", "daemon.json", "docker_engine"),
    (r"unit dsv3-endpoint\.service .*", "unit", "endpoint"),
    (r"unit dsv3-engine\.service .*", "unit", "engine"),
    (r"unit docker\.service .*", "unit", "docker_engine"),
    (r"unit nvidia-fabricmanager\.service .*", "unit", "fabric_manager"),
    (r"unit nvidia-persistenced\.service .*", "unit", "nvidia_driver"),
    (r"package haproxy", "package", "endpoint"),
    (r"package (docker|containerd).*", "package", "docker_engine"),
    (r"package nvidia-fabricmanager.*", "package", "fabric_manager"),
    (r"package (lib)?nvidia-container.*", "package", "nvidia_container_toolkit"),
    (r"package (rdma-core|(lib)?ibverbs.*)", "package", "rdma"),
    (r"package .*", "package", "nvidia_driver"),
    (r"sysctl net\.ipv4\.ip_local_reserved_ports", "sysctl", "node_network"),
    (r"sysctl .*", "sysctl", ""),
    (r"driver", "driver", ""),
    (r"kernel", "kernel", ""),
    (r"gpu .*", "gpu", ""),
    (r"hca .*|rdma devices", "rdma", ""),
)


# It runs once at boot, so whether it is active says only whether the host was booted since.
_STARTED_AT_BOOT = frozenset({"dsv3-engine.service"})


@dataclass(frozen=True, kw_only=True)
class Drift:
    """One thing that is not as the last finished deploy left it.

    Attributes:
        host: where.
        key: what, as in the flat state.
        kind: ``container``, ``image``, ``file``, ``daemon.json``, ``unit``, ``package``, ``sysctl``, ``driver``,
            ``kernel``, ``gpu`` or ``rdma``.
        role: the role that makes it, "" where no role does.
        recorded: how the deploy left it, "" for not there.
        found: how it is now, "" for not there.
    """

    host: str
    key: str
    kind: str
    role: str
    recorded: str
    found: str

    @property
    def same_content(self) -> bool:
        """Whether it is a file of which only mode or owner differ."""
        if self.kind != "file" or not (self.recorded and self.found):
            return False
        return self.recorded.split(" ", 2)[2] == self.found.split(" ", 2)[2]

    @property
    def same_mode(self) -> bool:
        """Whether it is a file whose mode was left alone."""
        return self.kind == "file" and self.recorded.split(" ")[0] == self.found.split(" ")[0]

    def as_dict(self) -> dict[str, Any]:
        """The difference for ``--json``."""
        return asdict(self)

    def __str__(self) -> str:
        if not self.found:
            return f"{self.key} is gone"
        # A hash stands for a value that may be a secret.
        hidden = self.kind == "file" or ("sha256:" in (self.recorded[:7], self.found[:7]) and self.kind != "image")
        if not self.recorded:
            return f"{self.key} is new" + ("" if hidden else f": {self.found}")
        if self.key.startswith("file "):
            return f"{self.key} has {_difference_of_files(self.recorded, self.found)}"
        if hidden:
            return f"{self.key} has another value"
        if self.recorded.startswith("[") and self.found.startswith("["):
            return f"{self.key} has {difference_of_lists(json.loads(self.recorded), json.loads(self.found))}"
        return f"{self.key} was {self.recorded}, is {self.found}"


def find(host: str, recorded: Mapping[str, Any], found: Mapping[str, Any]) -> list[Drift]:
    """The differences between two states of a host, in the order of their keys.

    Args:
        host: the host's name.
        recorded: `state_of` after the last finished deploy.
        found: `state_of` now.
    """
    return [
        Drift(
            host=host,
            key=key,
            kind=kind,
            role=role,
            recorded=text(recorded.get(key)),
            found=text(found.get(key)),
        )
        for key in sorted(recorded.keys() | found.keys())
        if recorded.get(key) != found.get(key)
        for kind, role in [classify(key)]
    ]


def classify(key: str) -> tuple[str, str]:
    """Kind and role of a key."""
    for pattern, kind, role in _KINDS:
        if re.fullmatch(pattern, key):
            return kind, role
    raise ValueError(f"no kind of key {key!r}")


def state_of(facts: HostFacts, container: str) -> dict[str, Any]:
    """Everything on a host that a deployment made or depends on, as a flat mapping of JSON scalars and lists.

    Args:
        facts: read with at least the sections ``os gpus driver infiniband docker state``.
        container: name of the engine's container.
    """
    return dict(sorted(_state(facts, container)))


def text(value: Any) -> str:
    """A value of the state for people; "" for one that is not there."""
    if value is None:
        return ""
    return value if isinstance(value, str) and value else json.dumps(value)


def difference_of_lists(before: Sequence[Any], after: Sequence[Any]) -> str:
    """What came to a list and what went, in words."""
    added = [text(one) for one in after if one not in before]
    gone = [text(one) for one in before if one not in after]
    words = [f"{' '.join(added)} more"] if added else []
    words += [f"no {' '.join(gone)}"] if gone else []
    return ", ".join(words) or "another order"


def _state(facts: HostFacts, container: str) -> Iterator[tuple[str, Any]]:
    if facts.state:
        for path, file in facts.state.files.items():
            yield f"file {path}", _file(file)
        for name, unit in facts.state.units.items():
            if name not in _STARTED_AT_BOOT:
                yield f"unit {name} active", unit.active
            yield f"unit {name} enabled", unit.enabled
        for name, version in facts.state.packages.items():
            yield f"package {name}", version
        for name, value in facts.state.sysctls.items():
            yield f"sysctl {name}", value
    if facts.docker.daemon_json_error:
        yield "daemon.json", f"unreadable: {facts.docker.daemon_json_error}"
    for key, value in (facts.docker.daemon_json or {}).items():
        yield f"daemon.json {key}", value
    for known in facts.docker.containers:
        if known.name == container:
            yield from _container(known)
    yield "kernel", facts.os.kernel
    if facts.driver.loaded_version or facts.gpus:
        yield "driver", facts.driver.loaded_version or facts.gpus[0].driver_version
    for gpu in facts.gpus:
        yield f"gpu {gpu.index}", f"{gpu.name} {gpu.uuid}"
    if facts.infiniband.devices:
        yield "rdma devices", list(facts.infiniband.devices)
    for port in facts.infiniband.ports:
        # Without a link the kernel shows a rate that means nothing.
        rate = f" {port.rate_gbps:g} Gb/s" if port.state == "ACTIVE" else ""
        yield f"hca {port.device}:{port.port}", f"{port.state}{rate} {port.link_layer}".rstrip()


def _file(file: FileState) -> str:
    return f"{file.mode} {file.owner} " + (f"-> {file.link}" if file.link else file.sha256)


def _container(container: Container) -> Iterator[tuple[str, Any]]:
    # A container that is being restarted is one that runs.
    yield "container state", "running" if container.state == "restarting" else container.state
    if container.config is None:  # made by somebody else under our name
        yield "container image_id", container.image_id
        return
    for field, value in container.config.model_dump(mode="json").items():
        if isinstance(value, dict):
            for key, one in value.items():
                yield f"container {field} {key}", one
        else:
            yield f"container {field}", value


def _difference_of_files(recorded: str, found: str) -> str:
    """Of two descriptions of a file, what differs; content is only ever another one."""
    (mode, owner, content), (mode_now, owner_now, content_now) = recorded.split(" ", 2), found.split(" ", 2)
    words = []
    if mode != mode_now:
        words.append(f"mode {mode_now} instead of {mode}")
    if owner != owner_now:
        words.append(f"owner {owner_now} instead of {owner}")
    if content != content_now:
        words.append(f"other content{f' ({content_now})' if content_now.startswith('->') else ''}")
    return ", ".join(words)
