"""Runs on a host: prints, as JSON, what a deployment could have changed there.

Sent to the host as it is, so it needs nothing but its Python. Each section is a mapping of text to text.
"""

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

#: Below these, content counts; elsewhere size and time of change do.
HASHED = ("/etc", "/usr/local", "/opt", "/srv", "/root", "/home", "/data", "/var/lib/deploy-dsv3")
#: What changes by itself on a host that nobody touches.
RESTLESS = ("/var/log", "/var/cache", "/var/tmp", "/var/lib/systemd", "/var/lib/dbus")


def main() -> None:
    json.dump(
        {
            "packages": packages(),
            "files": files(),
            "services": services(),
            "ports": ports(),
            "containers": docker("ps", "--all", "--no-trunc", "--format", "{{.Names}}\t{{.ID}} {{.Image}}"),
            "images": docker("images", "--no-trunc", "--format", "{{.Repository}}:{{.Tag}}\t{{.ID}}"),
        },
        sys.stdout,
    )


def said(*argv: str) -> str:
    return subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True).stdout


def packages() -> dict[str, str]:
    listing = said("dpkg-query", "--show", "--showformat=${Package}\t${Version} ${db:Status-Status}\n")
    return dict(line.split("\t") for line in listing.splitlines())


def services() -> dict[str, str]:
    running = said("systemctl", "list-units", "--type=service", "--state=running", "--plain", "--no-legend")
    enabled = said("systemctl", "list-unit-files", "--state=enabled", "--plain", "--no-legend")
    found = {line.split()[0]: "enabled" for line in enabled.splitlines()}
    for line in running.splitlines():
        unit = line.split()[0]
        # A user's manager comes and goes with logins.
        if not unit.startswith("user"):
            found[unit] = f"{found.get(unit, '')} running".strip()
    return found


def ports() -> dict[str, str]:
    return {line.split()[3]: "listening" for line in said("ss", "-Hltn").splitlines()}


def docker(*arguments: str) -> dict[str, str]:
    if shutil.which("docker") is None:
        return {}
    return dict(line.split("\t") for line in said("docker", *arguments).splitlines())


def files() -> dict[str, str]:
    found, folders = {}, ["/"]
    device = os.lstat("/").st_dev
    while folders:
        for entry in os.scandir(folders.pop()):
            about = entry.stat(follow_symlinks=False)
            if about.st_dev != device or entry.path.startswith(RESTLESS) or is_ansibles(entry.path):
                continue
            owner = f"{about.st_mode:o} {about.st_uid}:{about.st_gid}"
            found[entry.path] = f"{owner} {content(Path(entry.path), about)}"
            if stat.S_ISDIR(about.st_mode):
                folders.append(entry.path)
    return found


def is_ansibles(path: str) -> bool:
    """Whether it is Ansible's working folder, which it leaves behind empty."""
    return path.endswith("/.ansible") and all(not files for _, _, files in os.walk(path))


def content(path: Path, about: os.stat_result) -> str:
    if stat.S_ISLNK(about.st_mode):
        return f"-> {path.readlink()}"
    if not stat.S_ISREG(about.st_mode):
        return ""
    if str(path).startswith(HASHED):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return f"{about.st_size} {about.st_mtime_ns}"


if __name__ == "__main__":
    main()
