"""One host of the lab: a bare server in a container."""

from __future__ import annotations

import json
import resource
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import hardware, machine, model, network, shell
from .docker_cli import DockerCli, File
from .errors import LabError
from .images import ADMIN_UID, ADMIN_USER, fingerprint

MODEL_PATH = "/data/models/DeepSeek-V3"
#: Where a host finds its hardware.json; mounted from the lab's state.
HARDWARE_PATH = "/var/lib/dsv3-lab"

_BIRTH_LABEL = "io.deploy-dsv3.lab.birth"
_SHARED_MEMORY = "8g"  # a limit, not a reservation: Ray's object store lives in it
_VOLUMES = {"docker": "/var/lib/docker", "containerd": "/var/lib/containerd"}
_BOOT_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 30
_NOFILE = 1048576


@dataclass(frozen=True, kw_only=True)
class HostRecord:
    """What a host of a lab is: its place and its hardware.

    Attributes:
        number: from 1.
        profile: name or path of its hardware profile.
        gpus: number of GPUs instead of the profile's.
    """

    name: str
    number: int
    address: str
    profile: str
    gpus: int | None = None

    def hardware_profile(self) -> hardware.Profile:
        """Its profile, read now."""
        return hardware.load(self.profile).with_gpus(self.gpus)


def record(number: int, subnet: str, profile: str, gpus: int | None) -> HostRecord:
    """The host of a number in a lab's network."""
    return HostRecord(
        name=f"gpu-{number:02d}",
        number=number,
        address=network.host_address(subnet, number),
        profile=profile,
        gpus=gpus,
    )


@dataclass(frozen=True, kw_only=True)
class Host:
    """A host with everything that is needed to handle its container.

    Attributes:
        lab: name of its lab.
        folder: its part of the lab's state: hardware.json, host key.
        labels: labels of everything that belongs to the lab.
    """

    record: HostRecord
    lab: str
    docker: DockerCli
    folder: Path
    labels: Mapping[str, str]

    @property
    def name(self) -> str:
        """Name in the inventory."""
        return self.record.name

    @property
    def address(self) -> str:
        """Its address on the lab's network."""
        return self.record.address

    @property
    def container(self) -> str:
        """Name of its container."""
        return f"dsv3-{self.lab}-{self.name}"

    @property
    def volumes(self) -> dict[str, str]:
        """Its volumes, name to mount point: Docker's data needs a file system that nests."""
        return {f"{self.container}-{part}": target for part, target in _VOLUMES.items()}

    # ------------------------------------------------------------------ life

    def state(self) -> str:
        """``running``, ``exited``, … as Docker says, or ``absent``."""
        found = self.docker.inspect("container", self.container)
        return str(found["State"]["Status"]) if found else "absent"

    def is_as_born(self, image: str) -> bool:
        """Whether its container was made from this image and with all that its profile decides at birth."""
        found = self.docker.inspect("container", self.container)
        return found is not None and found["Config"]["Labels"].get(_BIRTH_LABEL) == self._birth(image)

    def _birth(self, image: str) -> str:
        profile = self.record.hardware_profile()
        return fingerprint(image, profile.sudo, str(profile.nouveau), *map(str, sorted(profile.born_with.items())))

    def create(self, image: str, authorized_key: str) -> None:
        """Make it: a bare server with an administrator's key and a model directory, switched off."""
        self.write_hardware(self.description())
        make_key(self.folder / "ssh_host_ed25519_key", comment=self.name)
        for volume in self.volumes:
            self.docker.run("volume", "create", *_labels(self.labels), volume)
        self.docker.run(*self.create_arguments(image))
        self.docker.copy_in(self.container, self._birth_files(authorized_key))

    def create_arguments(self, image: str, *, status: str | None = None, mounts: str | None = None) -> list[str]:
        """Arguments of ``docker create`` for a container that boots systemd and runs a Docker of its own.

        ``--privileged`` would ask for capabilities that a machine may not have, so they are named one by one.
        """
        cgroups = machine.cgroup2_mount(mounts)
        nofile = min(_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        return [
            "create",
            f"--name={self.container}",
            f"--hostname={self.name}",
            *_labels({**self.labels, "io.deploy-dsv3.lab.role": "host", _BIRTH_LABEL: self._birth(image)}),
            f"--network=dsv3-{self.lab}",
            f"--network-alias={self.name}",
            f"--ip={self.address}",
            "--restart=unless-stopped",  # a reboot ends the container
            "--stop-signal=SIGRTMIN+3",  # systemd: halt
            "--cgroupns=host",
            f"--volume={cgroups}:/sys/fs/cgroup:rw",
            *(
                f"--tmpfs={path}:exec,mode={mode}"
                for path, mode in (("/run", 755), ("/run/lock", 1777), ("/tmp", 1777))
            ),
            *(f"--volume={volume}:{target}" for volume, target in self.volumes.items()),
            f"--volume={self.folder / 'hardware'}:{HARDWARE_PATH}:ro",
            f"--shm-size={_SHARED_MEMORY}",
            f"--ulimit=nofile={nofile}:{nofile}",
            *(f"--cap-add={name}" for name in machine.capabilities(status)),
            "--security-opt=seccomp=unconfined",
            "--security-opt=apparmor=unconfined",
            "--device-cgroup-rule=a *:* rwm",
            image,
        ]

    def _birth_files(self, authorized_key: str) -> dict[str, File]:
        key = self.folder / "ssh_host_ed25519_key"
        password = "" if self.record.hardware_profile().sudo == "password" else "NOPASSWD:"
        home = {"uid": ADMIN_UID, "gid": ADMIN_UID}
        files = {
            "/etc/machine-id": File(content=f"{uuid.uuid4().hex}\n".encode(), mode=0o444),
            "/etc/ssh/ssh_host_ed25519_key": File(content=key.read_bytes(), mode=0o600),
            "/etc/ssh/ssh_host_ed25519_key.pub": File(content=key.with_suffix(".pub").read_bytes()),
            f"/etc/sudoers.d/{ADMIN_USER}": File(
                content=f"{ADMIN_USER} ALL=(ALL:ALL) {password}ALL\n".encode(), mode=0o440
            ),
            f"/home/{ADMIN_USER}/.ssh/authorized_keys": File(content=authorized_key.encode(), mode=0o600, **home),
        }
        return files | {f"{MODEL_PATH}/{name}": File(content=content) for name, content in model.files().items()}

    def start(self) -> None:
        """Switch it on, or leave it on; returns when SSH answers."""
        self.docker.run("start", self.container)
        self.wait_until_ready()

    def stop(self, *, power_cut: bool = False) -> None:
        """Switch it off: an orderly halt, or as if the power failed."""
        if power_cut:
            self.docker.run("kill", self.container)
        else:
            self.docker.run("stop", f"--time={_STOP_TIMEOUT_S}", self.container)

    def reboot(self) -> None:
        """Reboot it in good order; returns when SSH answers again."""
        before = self._started_at()
        self.run(["systemctl", "reboot"], check=False)
        deadline = time.monotonic() + _BOOT_TIMEOUT_S
        while self._started_at() == before or self.state() != "running":
            if time.monotonic() > deadline:
                raise LabError(f"{self.name} did not come back from its reboot (it is {self.state()})")
            time.sleep(0.3)
        self.wait_until_ready()

    def _started_at(self) -> str:
        found = self.docker.inspect("container", self.container)
        return str(found["State"]["StartedAt"]) if found else ""

    def wait_until_ready(self, timeout_s: float = _BOOT_TIMEOUT_S) -> None:
        """Wait until systemd has settled and sshd answers on the lab's network.

        Raises:
            LabError: it is not there in time; says what systemd said last.
        """
        deadline = time.monotonic() + timeout_s
        while not _speaks_ssh(self.address):
            if self.state() not in ("running", "restarting") or time.monotonic() > deadline:
                logs = self.docker.run("logs", "--tail=5", self.container, check=False)
                raise LabError(
                    f"{self.name} ({self.address}) does not boot: its container is {self.state()}; "
                    f"it said: {(logs.stdout + logs.stderr).strip() or 'nothing'}",
                    remedy=f"deploy-dsv3 lab down && deploy-dsv3 lab up; the container is {self.container}.",
                )
            time.sleep(0.2)
        self.run(["systemctl", "is-system-running", "--wait"], check=False)

    def failed_units(self) -> list[str]:
        """Units of systemd that failed."""
        listing = self.run(["systemctl", "--failed", "--plain", "--no-legend"], check=False).stdout
        return [line.split()[0] for line in listing.splitlines()]

    def remove(self) -> None:
        """Remove its container and volumes; its keys stay: a new one is the same host to its clients."""
        self.docker.run("rm", "--force", "--volumes", self.container, check=False)
        for volume in self.volumes:
            self.docker.run("volume", "rm", "--force", volume)

    # ------------------------------------------------------------------ inside

    def run(self, argv: Sequence[str], *, stdin: bytes | None = None, check: bool = True) -> _Completed:
        """Run a command on it as root, beside SSH: also works while it is cut off.

        Raises:
            LabError: it failed, and `check`.
        """
        done = self.docker.inside(self.container, argv, stdin=stdin, check=check)
        return _Completed(returncode=done.returncode, stdout=done.stdout, stderr=done.stderr)

    # ------------------------------------------------------------------ hardware

    def description(self) -> dict[str, object]:
        """The hardware of its profile."""
        return hardware.describe(self.record.hardware_profile(), host=self.name, number=self.record.number)

    def hardware(self) -> dict[str, object]:
        """Its hardware as it is now."""
        found: dict[str, object] = json.loads((self.folder / "hardware" / "hardware.json").read_text())
        return found

    def write_hardware(self, description: Mapping[str, object]) -> None:
        """Change its hardware on paper; `change_hardware` also shows it to the running host."""
        folder = self.folder / "hardware"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "hardware.json").write_text(hardware.document(description))

    def change_hardware(self, description: Mapping[str, object]) -> None:
        """Change its hardware while it runs, as pulling a cable or losing a GPU does."""
        self.write_hardware(description)
        self.run(["/usr/lib/dsv3-lab/kernel.py", "apply"])

    # ------------------------------------------------------------------ network

    def cut_off(self) -> None:
        """Pull its network cable: nothing gets in or out until `reconnect` or a restart."""
        shell.run(shell.as_root(["ip", "link", "set", self._cable(), "down"]))

    def reconnect(self) -> None:
        """Plug the cable in again."""
        shell.run(shell.as_root(["ip", "link", "set", self._cable(), "up"]))

    def _cable(self) -> str:
        """The machine's end of the host's network cable."""
        index = self.run(["cat", "/sys/class/net/eth0/iflink"]).stdout.strip()
        for interface in Path("/sys/class/net").iterdir():
            if (interface / "ifindex").read_text().strip() == index:
                return interface.name
        raise LabError(f"the network cable of {self.name} was not found on this machine")


@dataclass(frozen=True, kw_only=True)
class _Completed:
    returncode: int
    stdout: str
    stderr: str


def make_key(path: Path, *, comment: str) -> None:
    """Have an Ed25519 key pair at `path` and `path`.pub."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        shell.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)])


def _labels(labels: Mapping[str, str]) -> list[str]:
    return [f"--label={name}={value}" for name, value in labels.items()]


def _speaks_ssh(address: str) -> bool:
    try:
        with socket.create_connection((address, 22), timeout=2) as connection:
            return connection.recv(4) == b"SSH-"
    except OSError:
        return False
