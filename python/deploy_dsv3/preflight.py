"""Whether hosts can become a deployment. Pure: facts and settings of all hosts in, findings by host out.

`host_checks` looks at each host by itself; here are the checks that compare hosts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from . import fit
from .derive import HostInput, derive
from .driver import is_of_branch
from .facts import HostFacts
from .findings import Finding
from .host_checks import check_host
from .topology import Replica


def check(replicas: Sequence[Replica], hosts: Mapping[str, HostInput]) -> dict[str, list[Finding]]:
    """Return the findings of every host of the replicas, errors first.

    `hosts` has an entry for every host; one that was not looked at (facts None) has no findings of its own.
    """
    findings: list[Finding] = []
    for replica in replicas:
        _, derived = derive(replica, hosts)
        findings += derived
        members = [(hosts[name], facts) for name in replica.hosts if (facts := hosts[name].facts) is not None]
        for known, facts in members:
            findings += check_host(known.host, facts, known.settings, is_head=known.host == replica.head)
        findings += _check_gpus_equal(members)
        findings += _check_drivers_equal(members)
        findings += fit.check(replica, hosts)
    everyone = {
        name: facts for replica in replicas for name in replica.hosts if (facts := hosts[name].facts) is not None
    }
    limits = {name: float(hosts[name].settings["preflight_max_clock_skew_s"]) for name in everyone}
    findings += _check_clocks(everyone, limits)
    findings += _check_machines(everyone)
    by_host: dict[str, list[Finding]] = {name: [] for replica in replicas for name in replica.hosts}
    for finding in findings:
        by_host[finding.host].append(finding)
    return {name: sorted(found, key=lambda f: (f.severity != "error", f.code)) for name, found in by_host.items()}


def _usual(values: Iterable[Any]) -> Any:
    """Return the most frequent value; among equals the first, which is the head's."""
    return Counter(values).most_common(1)[0][0]


def _check_gpus_equal(members: Sequence[tuple[HostInput, HostFacts]]) -> Iterator[Finding]:
    """Compare count, model and memory of the GPUs over the hosts of a replica, and within each host."""
    counts = {known.host: facts.gpu_count for known, facts in members if facts.gpu_count}
    models = {known.host: _gpu_models(facts) for known, facts in members if facts.gpu_count}
    memories = {
        known.host: tuple(sorted({gpu.memory_total_mib for gpu in facts.gpus}))
        for known, facts in members
        if facts.gpus
    }
    # The greatest first: where two hosts differ, it is more likely that a GPU is missing than that one grew.
    counts = dict(sorted(counts.items(), key=lambda item: -item[1]))
    yield from _unequal("gpu-count", counts, "{value} GPUs", "a GPU is missing, or the hosts are not alike")
    # A host with its driver tells product names, one without only PCI device IDs: compare like with like.
    for named in (True, False):
        alike = {host: value for host, (is_name, value) in models.items() if is_name is named}
        yield from _unequal("gpu-model", alike, "GPUs {value}", "the hosts are not alike")
    listed = {host: ", ".join(f"{size} MiB" for size in value) for host, value in memories.items()}
    usual = _usual(memories.values()) if memories else ()
    # Drivers differ by less than 2 % in what they reserve.
    far = {
        host: text
        for host, text in listed.items()
        if max(memories[host]) > 1.02 * min(usual) or min(memories[host]) < 0.98 * max(usual)
    }
    for host, text in far.items():
        yield _unequal_finding("gpu-memory", host, f"GPU memory {text}", _others(listed, host), "mixed models")


def _gpu_models(facts: HostFacts) -> tuple[bool, str]:
    """Return (whether these are product names, the sorted models as text)."""
    if facts.gpus:
        return True, ", ".join(sorted({gpu.name for gpu in facts.gpus}))
    return False, ", ".join(sorted({gpu.device for gpu in facts.pci_gpus}))


def _others(values: Mapping[str, Any], host: str) -> str:
    return ", ".join(f"{other} {value}" for other, value in values.items() if other != host)


def _unequal(code: str, values: Mapping[str, Any], text: str, cause: str) -> Iterator[Finding]:
    if len(set(values.values())) < 2:
        return
    usual = _usual(values.values())
    for host, value in values.items():
        if value != usual:
            yield _unequal_finding(code, host, text.format(value=value), _others(values, host), cause)


def _unequal_finding(code: str, host: str, found: str, others: str, cause: str) -> Finding:
    return Finding(
        code=code,
        host=host,
        severity="error",
        message=f"{host}: {found}, unlike the other hosts of the replica ({others or 'its own GPUs differ'})",
        cause=cause,
        remedy="make the hosts of a replica equal, or put them into different replicas",
    )


def _check_drivers_equal(members: Sequence[tuple[HostInput, HostFacts]]) -> Iterator[Finding]:
    """Compare the drivers that stay as they are; what is of another branch is replaced."""
    versions = {}
    for known, facts in members:
        version, prepared = facts.driver.loaded_version, known.settings["nvidia_driver_source"] == "preinstalled"
        if version and (prepared or is_of_branch(version, known.settings["nvidia_driver_branch"])):
            versions[known.host] = version
    for finding in _unequal("driver-differs", versions, "driver {value}", "the hosts were set up at different times"):
        usual = _usual(versions.values())
        yield replace(
            finding, remedy=f"set nvidia_driver_branch to the exact version {usual}, or put the hosts into two replicas"
        )


def _check_clocks(facts: Mapping[str, HostFacts], limits: Mapping[str, float]) -> Iterator[Finding]:
    """Compare clocks pairwise; only what the measured intervals prove is an error.

    Where one host disagrees with many, it alone is named: a host is reported if it disagrees with at least as
    many hosts as each of those it disagrees with.
    """
    clocks = {host: known.clock for host, known in facts.items() if known.clock is not None}
    apart: dict[str, dict[str, float]] = {host: {} for host in clocks}
    for first, second in combinations(clocks, 2):
        limit = min(limits[first], limits[second])
        ahead = clocks[first].offset_low - clocks[second].offset_high
        behind = clocks[second].offset_low - clocks[first].offset_high
        if max(ahead, behind) > limit:
            apart[first][second] = ahead if ahead > 0 else -behind
            apart[second][first] = -apart[first][second]
    for host, others in apart.items():
        if others and all(len(others) >= len(apart[other]) for other in others):
            listed = ", ".join(
                f"at least {abs(seconds):.1f} s {'ahead of' if seconds > 0 else 'behind'} {other}"
                for other, seconds in others.items()
            )
            yield Finding(
                code="clock",
                host=host,
                severity="error",
                message=f"{host}: its clock is {listed}; {limits[host]:g} s is allowed",
                cause="time synchronisation is off or has no server",
                remedy="enable chrony or systemd-timesyncd on both hosts",
            )


def _check_machines(facts: Mapping[str, HostFacts]) -> Iterator[Finding]:
    """Find machines listed twice. Clones share a machine ID, containers a boot ID: all three must agree."""
    first: dict[tuple[str, str, str], str] = {}
    for host, known in facts.items():
        if not known.machine_id or not known.boot_id:
            continue
        other = first.setdefault((known.machine_id, known.boot_id, known.hostname), host)
        if other != host:
            yield Finding(
                code="same-machine",
                host=host,
                severity="error",
                message=f"{host} and {other} are the same machine ({known.hostname}, machine ID {known.machine_id})",
                cause="it is in the inventory under two names",
                remedy=f"remove {host} or {other} from the inventory",
            )
