"""What the machine that carries the lab has to offer, read and never written."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import shell
from .errors import LabError

#: Capabilities of Linux by their number (linux/capability.h), as Docker names them.
CAPABILITIES = (
    *("CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID"),
    *("SETPCAP", "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW"),
    *("IPC_LOCK", "IPC_OWNER", "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT"),
    *("SYS_ADMIN", "SYS_BOOT", "SYS_NICE", "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD"),
    *("LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG"),
    *("WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ"),
)

#: Options of apt that a mirror may need and that hosts of the lab take over.
_APT_OPTIONS = re.compile(
    r"^Acquire::(Check-Valid-Until|Check-Date|Retries|(http|https)::(Proxy|CAInfo|Verify-Peer|Verify-Host|Timeout))$"
)
_DEBIAN_RELEASES = re.compile(r"bullseye|bookworm|trixie|forky|sid|stable|oldstable|testing")
_CA_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt")


@dataclass(frozen=True, kw_only=True)
class AptSettings:
    """Where this machine gets Debian packages from.

    Attributes:
        archive: base address of the archive, ends in ``/``; empty if the machine uses none (Ubuntu, for example).
        security: base address of the security archive; empty if the machine uses none.
        options: ``Acquire::…`` options the mirror needs (proxy, clock checks), name to value.
    """

    archive: str
    security: str
    options: Mapping[str, str]

    def sources(self, suite: str) -> str:
        """sources.list for a release of Debian."""
        lines = [f"deb {self.archive} {suite} main", f"deb {self.archive} {suite}-updates main"]
        if self.security:
            lines.append(f"deb {self.security} {suite}-security main")
        return "\n".join(lines) + "\n"

    def configuration(self) -> str:
        """apt.conf with the options of the mirror and no translations."""
        lines = [f'{name} "{value}";' for name, value in sorted(self.options.items())]
        return "\n".join([*lines, 'Acquire::Languages "none";']) + "\n"


def apt_settings(mirror: str = "") -> AptSettings:
    """What this machine's apt configuration says; `mirror` instead of the archive it names."""
    dump = shell.run(["apt-config", "dump"]).stdout if shell.which("apt-config") else ""
    targets = ""
    if shell.which("apt-get"):
        template = "$(REPO_URI) $(RELEASE) $(COMPONENT)"
        listing = ["apt-get", "indextargets", "--format", template, "Created-By: Packages"]
        targets = shell.run(listing, check=False).stdout
    return parse_apt(targets.splitlines(), dump.splitlines(), mirror)


def parse_apt(targets: Iterable[str], dump: Iterable[str], mirror: str = "") -> AptSettings:
    """Read ``apt-get indextargets`` ("URI RELEASE COMPONENT") and ``apt-config dump``, both by lines."""
    archive, security = mirror, ""
    for target in targets:
        uri, release, component = (*target.split(), "", "", "")[:3]
        if component != "main" or not uri.startswith(("http://", "https://")):
            continue
        if _DEBIAN_RELEASES.fullmatch(release):
            archive = archive or uri
        elif release.endswith("-security") and "debian" in uri and not mirror:
            security = security or uri
    options = {}
    for line in dump:
        name, _, value = line.partition(" ")
        value = value.strip().rstrip(";").strip('"')
        if _APT_OPTIONS.match(name) and value:
            options[name] = value
    archive = archive.rstrip("/") + "/" if archive else ""
    return AptSettings(archive=archive, security=security if archive else "", options=options)


def ca_bundle() -> Path | None:
    """The machine's bundle of trusted CAs; a private one may be in it."""
    named = os.environ.get("SSL_CERT_FILE", "")
    return next((Path(path) for path in (named, *_CA_BUNDLES) if path and Path(path).is_file()), None)


def capabilities(status: str | None = None) -> list[str]:
    """Capabilities that a container on this machine can be given.

    Args:
        status: text of ``/proc/self/status``; read when not given.
    """
    text = Path("/proc/self/status").read_text() if status is None else status
    match = re.search(r"^CapBnd:\s*([0-9a-f]+)$", text, re.MULTILINE)
    bounding = int(match[1], 16) if match else 0
    return [name for bit, name in enumerate(CAPABILITIES) if bounding >> bit & 1]


def cgroup2_mount(mounts: str | None = None) -> Path:
    """Where the machine's cgroup v2 tree is: alone, or beside v1 controllers.

    Args:
        mounts: text of ``/proc/self/mounts``; read when not given.

    Raises:
        LabError: there is none.
    """
    text = Path("/proc/self/mounts").read_text() if mounts is None else mounts
    trees = [fields[1] for line in text.splitlines() if (fields := line.split())[2] == "cgroup2"]
    for preferred in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified"):
        if preferred in trees:
            return Path(preferred)
    if trees:
        return Path(trees[0])
    raise LabError(
        "this machine has no cgroup v2 tree, which the systemd of the lab's hosts needs",
        remedy="Mount one: mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified.",
    )


def kernel_release() -> str:
    """The running kernel, as ``uname -r``."""
    return os.uname().release


def memory_gib() -> float:
    """Memory of the machine [GiB]."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def inotify_instances() -> int:
    """How many inotify instances a user may have (``fs.inotify.max_user_instances``)."""
    return int(Path("/proc/sys/fs/inotify/max_user_instances").read_text())
