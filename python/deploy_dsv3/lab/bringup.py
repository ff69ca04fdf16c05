"""Bring a lab up, and take it down again."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import (
    fleet,
    hosts,
    images,
    inventory,
    machine,
    network,
    outer_engine,
    prerequisites,
    repository,
    shell,
)
from .docker_cli import DockerCli
from .engine import recipe
from .errors import LabError, LabUsageError
from .fleet import Lab, LabRecord
from .hardware import DEFAULT_PROFILE, load
from .paths import LabPaths
from .progress import Steps

DEFAULT_HOSTS = 2
DEFAULT_SUITE = "trixie"
#: Measured: a host whose engine runs 8 ranks.
_HOST_MEMORY_GIB = 0.7
#: Counted in /proc: systemd takes 7, dockerd and containerd one each; all belong to root, whose number is limited.
_HOST_INOTIFY_INSTANCES = 9
#: Debian release to the vendor's name of the distribution.
SUITES = {"trixie": "debian13", "bookworm": "debian12"}
_NAME = re.compile(r"[a-z][a-z0-9-]{0,20}")


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What `lab up` was asked for; empty fields mean: as it is, or the default.

    Attributes:
        profiles: hardware profiles in the hosts' order; the last one holds for the hosts that follow.
        inventory: directory for the inventory.
        mirror: Debian mirror to use instead of the machine's.
    """

    name: str = fleet.DEFAULT_NAME
    hosts: int | None = None
    gpus: int | None = None
    profiles: Sequence[str] = ()
    inventory: Path | None = None
    suite: str | None = None
    mirror: str = ""
    engine: outer_engine.Choice = "auto"


def up(wish: Wish, paths: LabPaths, steps: Steps) -> Lab:
    """Have the lab as wished; what is there already stays as it is.

    Raises:
        LabUsageError: the wish makes no sense.
        LabError: it could not be done; running again continues.
    """
    _check(wish)
    with _locked(paths):
        prerequisites.have("ssh-keygen", "ip")
        engine = outer_engine.choose(paths, wish.engine)
        with steps.step(f"container engine: {engine.describe()}"):
            engine.ensure()
            outer_engine.remember(paths, engine)
        docker = engine.docker
        before = fleet.read_record(paths.lab(wish.name))
        suite = wish.suite or (before.suite if before else DEFAULT_SUITE)
        record = _record(wish, paths, docker, before, suite)
        suites = {host.hardware_profile().suite or suite for host in record.hosts}
        with steps.step(f"base image: Debian {' and '.join(sorted(suites))}"):
            bases = {name: images.debian(docker, paths, name, wish.mirror) for name in {*suites, DEFAULT_SUITE}}
            host_images = {name: images.host(docker, bases[name], name) for name in suites}
        lab = Lab(record=replace(record, host_images=host_images), paths=paths, docker=docker)
        for surplus in _surplus(before, lab.record):
            with steps.step(f"{surplus.name}: not wanted any more, removed"):
                lab.host(surplus).remove()
        lab.record.save(lab.folder)
        _keys(lab)
        _have_network(lab)
        # Services and engine are the same for the hosts of every release.
        _assemble(lab, bases[DEFAULT_SUITE], steps)
        if isinstance(engine, outer_engine.PrivateEngine):
            images.tidy(docker)
        inventory.write(lab.inventory, inventory.render(_site(lab)))
        return lab


def down(paths: LabPaths, name: str | None, steps: Steps, *, purge: bool = False) -> list[str]:
    """Remove a lab, or all of them, with all that belongs to it; then stop the engine, if the lab started it.

    Args:
        purge: drop the caches as well.

    Returns:
        The names of the labs that were removed.
    """
    engine = outer_engine.recall(paths)
    gone = [lab for lab in fleet.names(paths) if name in (None, lab)]
    with _locked(paths):
        if engine is not None:
            engine.ensure()
            for lab in gone:
                with steps.step(f"remove the lab {lab}"):
                    _remove(lab, paths, engine.docker)
            if not fleet.names(paths):
                if purge and isinstance(engine, outer_engine.RunningEngine):
                    _drop_images(engine.docker)
                with steps.step(f"leave {engine.describe()}"):
                    engine.stop()
                    shutil.rmtree(paths.state)
        if purge and not fleet.names(paths):
            with steps.step("drop the caches"):
                shell.run(shell.as_root(["rm", "--recursive", "--force", "--one-file-system", str(paths.cache)]))
    return gone


# ---------------------------------------------------------------------- what is wanted


def _check(wish: Wish) -> None:
    if not _NAME.fullmatch(wish.name):
        raise LabUsageError(
            f"{wish.name!r} cannot be the name of a lab",
            remedy="Use up to 21 small letters, digits and hyphens.",
        )
    if wish.hosts is not None and not 1 <= wish.hosts <= network.MAX_HOSTS:
        raise LabUsageError(f"{wish.hosts} hosts: a lab has 1 to {network.MAX_HOSTS}", remedy="Choose another number.")
    if wish.hosts is not None:
        refuse_too_many(wish.hosts, memory_gib=machine.memory_gib(), inotify_instances=machine.inotify_instances())
    if wish.suite is not None and wish.suite not in SUITES:
        raise LabUsageError(f"no lab hosts of Debian {wish.suite}", remedy=f"Choose one of {', '.join(SUITES)}.")
    for profile in wish.profiles:
        load(profile)


def refuse_too_many(hosts: int, *, memory_gib: float, inotify_instances: int) -> None:
    """Nothing is begun that this machine cannot carry.

    Args:
        memory_gib: memory of the machine [GiB].
        inotify_instances: how many of them its kernel lets a user have.

    Raises:
        LabUsageError: too little of either.
    """
    fits = max(1, int(memory_gib / _HOST_MEMORY_GIB))
    if hosts > fits:
        raise LabUsageError(
            f"{hosts} hosts with their engines need about {hosts * _HOST_MEMORY_GIB:.0f} GiB of memory, "
            f"this machine has {memory_gib:.0f}",
            remedy=f"Ask for {fits} or fewer.",
        )
    watches = hosts * _HOST_INOTIFY_INSTANCES
    if watches > inotify_instances:
        raise LabUsageError(
            f"{hosts} hosts need about {watches} inotify instances, this machine's kernel lets a user have "
            f"{inotify_instances}: services of the last hosts would not start",
            remedy=f"Raise the number: sysctl -w fs.inotify.max_user_instances={2 * watches}.",
        )


def _record(wish: Wish, paths: LabPaths, docker: DockerCli, before: LabRecord | None, suite: str) -> LabRecord:
    subnet = before.subnet if before else network.choose_subnet(wish.name, _networks_in_use(docker))
    count = wish.hosts or (len(before.hosts) if before else DEFAULT_HOSTS)
    known = {host.number: host for host in before.hosts} if before else {}
    records = []
    for number in range(1, count + 1):
        old = known.get(number)
        profile = old.profile if old else DEFAULT_PROFILE
        if wish.profiles:
            profile = wish.profiles[min(number, len(wish.profiles)) - 1]
        gpus = wish.gpus if wish.gpus is not None else (old.gpus if old else None)
        records.append(hosts.record(number, subnet, profile, gpus))
    folder = wish.inventory or Path(before.inventory if before else paths.inventory.format(name=wish.name))
    return LabRecord(
        name=wish.name,
        subnet=subnet,
        suite=suite,
        host_images={},
        inventory=str(folder.absolute()),
        hosts=tuple(records),
    )


def _surplus(before: LabRecord | None, now: LabRecord) -> list[hosts.HostRecord]:
    wanted = {host.name for host in now.hosts}
    return [host for host in before.hosts if host.name not in wanted] if before else []


def _networks_in_use(docker: DockerCli) -> list[str]:
    routes = shell.run(["ip", "-4", "route", "show"], check=False).stdout.splitlines()
    seen = [words[0] for line in routes if (words := line.split()) and "/" in words[0]]
    for name in docker.run("network", "ls", "--format", "{{.Name}}").stdout.split():
        found = docker.inspect("network", name) or {}
        seen += [config["Subnet"] for config in (found.get("IPAM", {}).get("Config") or []) if config.get("Subnet")]
    return [cidr for cidr in seen if ipaddress.ip_network(cidr, strict=False).version == 4]


# ---------------------------------------------------------------------- making it so


def _assemble(lab: Lab, base: str, steps: Steps) -> None:
    """Services, engine image and hosts, side by side where it can be."""
    docker = lab.docker

    def make_services() -> None:
        with steps.step("package repository and image registry"):
            image = images.services(docker, base)
            repository.build(docker, image, lab.paths.cache / "repository")
            lab.services.ensure(image)

    def make_engine() -> str:
        tag = f"dsv3-lab/engine:{images.fingerprint(base, recipe.fingerprint())}"
        if not images.exists(docker, tag):
            with steps.step("stand-in engine image (real Ray)"):
                recipe.build(docker.host, tag, base)
        return tag

    def make_host(host: hosts.Host) -> None:
        with steps.step(f"{host.name}: {host.record.profile}, {host.address}"):
            _have_host(lab, host)

    with ThreadPoolExecutor(max_workers=4) as pool:
        engine = pool.submit(make_engine)
        services = pool.submit(make_services)
        # Hosts that are born with packages get them from the repository.
        early = [host for host in lab.hosts if not host.record.hardware_profile().born_with]
        late = [host for host in lab.hosts if host.record.hardware_profile().born_with]
        working = [pool.submit(make_host, host) for host in early]
        _all_done([services])
        working += [pool.submit(make_host, host) for host in late]
        _all_done([engine, *working])
        tag = engine.result()
    with steps.step("registry serves openmmlab/lmdeploy:latest-cu12 (the stand-in)"):
        lab.services.publish_image(tag)


def _all_done(futures: Sequence[Future[Any]]) -> None:
    failures = [error for future in futures if (error := future.exception()) is not None]
    for error in failures:
        if not isinstance(error, LabError):
            raise error
    if failures:
        raise LabError(
            "\n".join(error.message for error in failures if isinstance(error, LabError)),
            remedy="\n".join(dict.fromkeys(error.remedy for error in failures if isinstance(error, LabError))),
        )


def _have_host(lab: Lab, host: hosts.Host) -> None:
    state = host.state()
    if state == "absent" or not host.is_as_born(lab.host_image(host)):
        lab.reset(host)
        return
    if host.hardware() != host.description():
        host.write_hardware(host.description())
        if state == "running":
            host.change_hardware(host.description())
    host.start()


def _keys(lab: Lab) -> None:
    hosts.make_key(lab.key, comment=f"dsv3-lab-{lab.name}")
    if not lab.password_file.is_file():
        lab.password_file.write_text(secrets.token_urlsafe(16) + "\n")
        lab.password_file.chmod(0o600)
    lines = []
    for host in lab.hosts:
        key = host.folder / "ssh_host_ed25519_key"
        hosts.make_key(key, comment=host.name)
        kind, public = key.with_suffix(".pub").read_text().split()[:2]
        lines.append(f"{host.address} {kind} {public}\n")
    lab.known_hosts.write_text("".join(lines))


def _have_network(lab: Lab) -> None:
    name = f"dsv3-{lab.name}"
    if lab.docker.inspect("network", name) is None:
        labels = [f"--label={key}={value}" for key, value in lab.labels.items()]
        lab.docker.run("network", "create", f"--subnet={lab.record.subnet}", *labels, name)


def _site(lab: Lab) -> inventory.Site:
    asks = any(host.record.hardware_profile().sudo == "password" for host in lab.hosts)
    return inventory.Site(
        hosts=lab.record.hosts,
        key=lab.key,
        known_hosts=lab.known_hosts,
        packages_url=lab.services.packages_url,
        registry=lab.services.registry,
        distributions={host.name: SUITES[lab.suite(host)] for host in lab},
        can_raise_limits="SYS_RESOURCE" in machine.capabilities(),
        password_file=lab.password_file if asks else None,
    )


# ---------------------------------------------------------------------- taking it down


def _remove(name: str, paths: LabPaths, docker: DockerCli) -> None:
    labels = fleet.labels(paths, name)
    containers = docker.container_names(labels)
    if containers:
        docker.run("rm", "--force", "--volumes", *containers)
    volumes = docker.volume_names(labels)
    if volumes:
        docker.run("volume", "rm", "--force", *volumes)
    if docker.inspect("network", f"dsv3-{name}") is not None:
        docker.run("network", "rm", f"dsv3-{name}")
    with contextlib.suppress(LabError):
        record = fleet.read_record(paths.lab(name))
        if record is not None:
            inventory.remove(Path(record.inventory))
    shutil.rmtree(paths.lab(name))


def _drop_images(docker: DockerCli) -> None:
    tags = docker.run("images", "--format", "{{.Repository}}:{{.Tag}}", "--filter=reference=dsv3-lab/*").stdout.split()
    if tags:
        docker.run("rmi", "--force", *tags)
    docker.run("volume", "rm", "--force", "dsv3-lab-registry")


@contextlib.contextmanager
def _locked(paths: LabPaths) -> Iterator[None]:
    paths.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (paths.state / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LabError("another `lab` command is at work here", remedy="Wait for it, then run again.") from error
        yield
