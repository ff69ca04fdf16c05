"""The TCP ports of a host that are fixed by settings, and the kernel's list of reserved ones. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

#: The kernel hands out none of these to a program that names no port (Documentation/networking/ip-sysctl.rst).
SYSCTL = "net.ipv4.ip_local_reserved_ports"

EVERYWHERE = (
    "ray_cluster_node_manager_port",
    "ray_cluster_object_manager_port",
    "ray_cluster_runtime_env_agent_port",
    "ray_cluster_dashboard_agent_grpc_port",
    "ray_cluster_dashboard_agent_listen_port",
    "ray_cluster_metrics_export_port",
)
ON_HEAD = (
    "ray_cluster_port",
    "ray_cluster_dashboard_port",
    "ray_cluster_client_server_port",
    "lmdeploy_server_port",
    "lmdeploy_dist_port",
)


def names(settings: Mapping[str, Any], *, is_head: bool) -> list[str]:
    """Return the settings that name single ports that a host listens on."""
    found = [*EVERYWHERE]
    if is_head:
        found += ON_HEAD
        if settings["endpoint_mode"] == "proxy":
            found.append("endpoint_port")
    return found


def of_host(settings: Mapping[str, Any], *, is_head: bool) -> set[int]:
    """Return every port that a host listens on, those of Ray's workers included."""
    workers = range(settings["ray_cluster_min_worker_port"], settings["ray_cluster_max_worker_port"] + 1)
    return {settings[name] for name in names(settings, is_head=is_head)} | set(workers)


def parse(text: str) -> set[int]:
    """Return the ports of a list as the kernel writes it, such as "6379-6383,8000"."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def to_text(ports: Iterable[int]) -> str:
    """Return the list as the kernel writes it: sorted, neighbours joined."""
    spans: list[list[int]] = []
    for port in sorted(set(ports)):
        if spans and port == spans[-1][1] + 1:
            spans[-1][1] = port
        else:
            spans.append([port, port])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
