"""Replicas, heads and workers, worked out from inventory groups. Pure: groups in, `Deployment` out.

The convention:

- One replica: group ``dsv3_head`` (exactly one host) and group ``dsv3_workers`` (any number of hosts, may be
  missing). A ``[dsv3:children]`` holding both is optional. The replica is called ``dsv3``.
- Several replicas: ``[dsv3:children]`` lists replica groups; each, NAME, has the children ``NAME_head``
  (exactly one host) and ``NAME_workers``. Nothing else may be below ``dsv3``.
- A host belongs to one replica and has one role.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from deploy_dsv3.errors import ConfigError, ConfigErrors

#: The group of everything, and the name of the only replica of a small inventory.
ROOT_GROUP = "dsv3"
HEAD_SUFFIX = "_head"
WORKERS_SUFFIX = "_workers"

Role = Literal["head", "worker"]


@dataclass(frozen=True, kw_only=True)
class Group:
    """An inventory group: its own hosts and its direct children, in the inventory's order."""

    hosts: tuple[str, ...] = ()
    children: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Replica:
    """One engine instance: a head and zero or more workers, one Ray cluster, one endpoint."""

    name: str
    head: str
    workers: tuple[str, ...] = ()

    @property
    def hosts(self) -> tuple[str, ...]:
        """Head first, then the workers in inventory order; the index is the node's rank."""
        return (self.head, *self.workers)


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """Everything one inventory describes."""

    replicas: tuple[Replica, ...]

    @property
    def hosts(self) -> tuple[str, ...]:
        """Every host, replica by replica."""
        return tuple(host for replica in self.replicas for host in replica.hosts)

    def replica_of(self, host: str) -> Replica:
        """The replica a host belongs to.

        Raises:
            KeyError: the host is not part of the deployment.
        """
        for replica in self.replicas:
            if host in replica.hosts:
                return replica
        raise KeyError(host)

    def role_of(self, host: str) -> Role:
        """``head`` or ``worker``; KeyError as `replica_of`."""
        return "head" if self.replica_of(host).head == host else "worker"

    def limited(self, hosts: Iterable[str]) -> Deployment:
        """The replicas that have all their hosts among `hosts`.

        Raises:
            ConfigErrors: a replica is cut in two, or none is left. An engine runs on all hosts of its replica
                or not at all, so half a replica cannot be deployed.
        """
        wanted = set(hosts)
        errors = []
        kept = []
        for replica in self.replicas:
            missing = [host for host in replica.hosts if host not in wanted]
            if not missing:
                kept.append(replica)
            elif len(missing) < len(replica.hosts):
                errors.append(
                    ConfigError(
                        message=f"--limit cuts replica {replica.name!r} in two",
                        key="--limit",
                        found=f"without {', '.join(missing)}" + (" (the head)" if replica.head in missing else ""),
                        expected="all hosts of a replica, or none",
                        remedy=f"Limit to whole replicas, e.g. --limit {','.join(replica.hosts)}.",
                    )
                )
        if not kept and not errors:
            errors.append(
                ConfigError(
                    message="--limit leaves no host of the deployment",
                    key="--limit",
                    found=", ".join(sorted(wanted)) or "no host",
                    expected=f"some of {', '.join(self.hosts)}",
                    remedy="Name hosts or groups of the deployment.",
                )
            )
        if errors:
            raise ConfigErrors(errors)
        return Deployment(replicas=tuple(kept))


def build(groups: Mapping[str, Group], *, source: str = "") -> Deployment:
    """Work out the deployment from the inventory's groups.

    Args:
        groups: every group of the inventory by name.
        source: the inventory as the operator named it, for messages.

    Raises:
        ConfigErrors: all mistakes of the groups at once.
    """
    return _Builder(groups, source).build()


def all_hosts(groups: Mapping[str, Group]) -> tuple[str, ...]:
    """Every host that the groups of the convention name, however wrong they are otherwise."""
    roots = (ROOT_GROUP, ROOT_GROUP + HEAD_SUFFIX, ROOT_GROUP + WORKERS_SUFFIX)
    return tuple(dict.fromkeys(host for name in roots for host in members(groups, name)))


def members(groups: Mapping[str, Group], name: str) -> tuple[str, ...]:
    """All hosts below a group, each once; ends on a group that contains itself."""
    found: dict[str, None] = {}
    seen: set[str] = set()
    pending = [name]
    while pending:
        current = pending.pop(0)
        if current in seen or current not in groups:
            continue
        seen.add(current)
        found.update(dict.fromkeys(groups[current].hosts))
        pending.extend(groups[current].children)
    return tuple(found)


def from_group_hosts(groups: Mapping[str, Sequence[str]]) -> Deployment:
    """Work out the deployment from Ansible's ``groups`` variable (group name to all hosts below it).

    That variable knows nothing of parents and children, so a replica is a name with a ``NAME_head`` group
    whose host is below ``dsv3`` (or ``dsv3_head`` alone). For code that runs inside a play.

    Raises:
        ConfigErrors: as `build`.
    """
    below_root = set(groups.get(ROOT_GROUP, ()))
    names = [
        name.removesuffix(HEAD_SUFFIX)
        for name, hosts in groups.items()
        if name.endswith(HEAD_SUFFIX)
        and (
            name == ROOT_GROUP + HEAD_SUFFIX
            # A group made during the play, such as one of all heads, has no replica group above it.
            or (name.removesuffix(HEAD_SUFFIX) in groups and below_root.intersection(hosts))
        )
    ]
    shaped = {name: Group(hosts=tuple(hosts)) for name, hosts in groups.items() if name != ROOT_GROUP}
    if names != [ROOT_GROUP]:
        for name in names:
            shaped[name] = Group(
                children=tuple(child for child in (name + HEAD_SUFFIX, name + WORKERS_SUFFIX) if child in groups)
            )
        shaped[ROOT_GROUP] = Group(children=tuple(names))
    return build(shaped)


class _Builder:
    def __init__(self, groups: Mapping[str, Group], source: str) -> None:
        self._groups = groups
        self._source = source
        self._errors: list[ConfigError] = []

    def build(self) -> Deployment:
        replicas = [self._replica(name) for name in self._replica_names()]
        self._check_overlaps(replicas)
        if self._errors:
            raise ConfigErrors(self._errors)
        return Deployment(
            replicas=tuple(Replica(name=name, head=heads[0], workers=workers) for name, heads, workers in replicas)
        )

    def _error(self, message: str, *, key: str, remedy: str, found: str = "", expected: str = "") -> None:
        self._errors.append(
            ConfigError(message=message, key=key, remedy=remedy, found=found, expected=expected, file=self._source)
        )

    def _replica_names(self) -> list[str]:
        root = self._groups.get(ROOT_GROUP)
        single = {ROOT_GROUP + HEAD_SUFFIX, ROOT_GROUP + WORKERS_SUFFIX}
        children = root.children if root else ()
        if root and root.hosts:
            self._error(
                f"group '{ROOT_GROUP}' has hosts of its own",
                key=ROOT_GROUP,
                found=", ".join(root.hosts),
                expected=f"hosts only in {ROOT_GROUP}{HEAD_SUFFIX} and {ROOT_GROUP}{WORKERS_SUFFIX}, "
                "or in the two groups of each replica",
                remedy=f"Move each host to [{ROOT_GROUP}{HEAD_SUFFIX}] or [{ROOT_GROUP}{WORKERS_SUFFIX}].",
            )
        for child in children:
            if child not in single and not self._is_replica(child):
                self._unknown_group(child)
        replicas = [child for child in children if child not in single and self._is_replica(child)]
        present = sorted(single.intersection(self._groups))
        if replicas and present:
            self._error(
                "one replica and several replicas are described at once",
                key=ROOT_GROUP,
                found=f"{', '.join(present)} beside {', '.join(replicas)}",
                expected=f"either {ROOT_GROUP}{HEAD_SUFFIX}/{ROOT_GROUP}{WORKERS_SUFFIX}, or replica groups",
                remedy=f"Give the hosts of {present[0]} a replica group of their own, "
                f"or take the others out of [{ROOT_GROUP}:children].",
            )
        if replicas or present:
            return replicas or [ROOT_GROUP]
        if not self._errors:
            self._missing_head(ROOT_GROUP)
        return []

    def _is_replica(self, name: str) -> bool:
        group = self._groups.get(name)
        parts = {name + HEAD_SUFFIX, name + WORKERS_SUFFIX}
        return bool(parts.intersection(self._groups)) or bool(group and parts.intersection(group.children))

    def _unknown_group(self, name: str) -> None:
        options = [ROOT_GROUP + HEAD_SUFFIX, ROOT_GROUP + WORKERS_SUFFIX]
        close = difflib.get_close_matches(name, options, n=1, cutoff=0.75)
        self._error(
            f"group {name!r} below '{ROOT_GROUP}' is neither a replica nor a role",
            key=name,
            found=f"no group {name}{HEAD_SUFFIX}",
            expected=f"{' and '.join(options)}, or replica groups NAME with NAME{HEAD_SUFFIX} and NAME{WORKERS_SUFFIX}",
            remedy=f"Did you mean {close[0]!r}?"
            if close
            else f"Take it out of [{ROOT_GROUP}:children], or give it {name}{HEAD_SUFFIX}.",
        )

    def _missing_head(self, name: str) -> None:
        wanted = name + HEAD_SUFFIX
        close = difflib.get_close_matches(wanted, [g for g in self._groups if g != wanted], n=1, cutoff=0.75)
        remedy = f"Add [{wanted}] with the one host that is to run the head"
        if close and close[0] not in (name, name + WORKERS_SUFFIX):
            remedy += f"; did you mean it by [{close[0]}]?"
        else:
            remedy += "."
        self._error(
            f"replica {name!r} has no head",
            key=wanted,
            found=f"no group {wanted}" if wanted not in self._groups else f"group {wanted} is empty",
            expected="exactly one host",
            remedy=remedy,
        )

    def _replica(self, name: str) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
        head_group, workers_group = name + HEAD_SUFFIX, name + WORKERS_SUFFIX
        allowed = (head_group, workers_group)
        if name != ROOT_GROUP and (group := self._groups.get(name)):
            if group.hosts:
                self._error(
                    f"replica group {name!r} has hosts of its own",
                    key=name,
                    found=", ".join(group.hosts),
                    expected=f"hosts only in {head_group} and {workers_group}",
                    remedy=f"Move each host to [{head_group}] or [{workers_group}].",
                )
            for child in group.children:
                if child not in allowed:
                    self._error(
                        f"unknown group {child!r} below replica {name!r}",
                        key=child,
                        expected=" and ".join(allowed),
                        remedy=f"Take it out of [{name}:children].",
                    )
            for part in allowed:
                if part in self._groups and part not in group.children:
                    self._error(
                        f"group {part!r} is not a child of replica {name!r}",
                        key=part,
                        expected=f"{part} below {name}",
                        remedy=f"Add {part} to [{name}:children].",
                    )
        heads = members(self._groups, head_group)
        workers = members(self._groups, workers_group)
        if not heads:
            self._missing_head(name)
        elif len(heads) > 1:
            self._error(
                f"replica {name!r} has {len(heads)} heads",
                key=head_group,
                found=", ".join(heads),
                expected="exactly one host",
                remedy=f"Leave one host in [{head_group}] and move the others to [{workers_group}], "
                "or describe a second replica.",
            )
        for host in heads:
            if host in workers:
                self._error(
                    f"{host} is both head and worker of replica {name!r}",
                    key=host,
                    found=f"{host} in {head_group} and in {workers_group}",
                    expected="one role for each host",
                    remedy=f"Take {host} out of [{workers_group}]: the head runs GPUs as well.",
                )
        return name, heads, workers

    def _check_overlaps(self, replicas: Sequence[tuple[str, tuple[str, ...], tuple[str, ...]]]) -> None:
        owner: dict[str, str] = {}
        for name, heads, workers in replicas:
            for host in dict.fromkeys((*heads, *workers)):
                first = owner.setdefault(host, name)
                if first != name:
                    self._error(
                        f"{host} belongs to two replicas",
                        key=host,
                        found=f"{first} and {name}",
                        expected="one replica for each host",
                        remedy=f"Take {host} out of one of them.",
                    )
