#!/usr/bin/env python3
"""Make the offline bundle: what a GPU server without internet lacks for `acceptance/run.sh`.

Runs on a Debian machine that reaches package mirrors (Debian's, and a Python index), in the environment that
deploy-dsv3 is installed in. Needs `uv`. Three archives, in parts:

    docker.tar.xz.NN    programs of the Docker engine, to be laid over /
    engine.tar.xz.NN    LMDeploy and Ray: site-packages with a bin/
    control.tar.xz.NN   deploy-dsv3 and Ansible, likewise
    bundle.json         versions, sizes, checksums

What the server has already is left out: give `--present` the output of `python3 -m pip list --format=freeze`
there.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
CONTENTS = tomllib.loads((HERE / "bundle.toml").read_text(encoding="utf-8"))
# Three programs of Ray are linked from the same libraries: a window that spans them all halves them.
_FILTERS = [
    {"id": lzma.FILTER_X86},
    {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 256 << 20},
]
_FQCN = re.compile(r"^\s*(?:- )?([a-z_]+\.[a-z_]+)\.[a-z_]+:", re.MULTILINE)


class BundleError(Exception):
    """The bundle cannot be made; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One file of the bundle."""

    name: str
    size: int
    sha256: str


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    record_path = options.output / "bundle.json"
    record = json.loads(record_path.read_text(encoding="utf-8")) if record_path.exists() else {}
    try:
        with tempfile.TemporaryDirectory(prefix="bundle-") as work:
            for what in options.only or COLLECTORS:
                tree = Path(work) / what
                _say(f"collecting {what}")
                versions = COLLECTORS[what](tree, options)
                _say(f"packing {_size(tree) / 1e6:.1f} MB")
                parts = pack(tree, options.output / f"{what}.tar.xz", options.part_size)
                record[what] = {
                    "made": datetime.now(UTC).isoformat(timespec="seconds"),
                    "versions": versions,
                    "parts": [vars(part) for part in parts],
                }
                record_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                total = sum(part.size for part in parts)
                _say(f"{what}: {total / 1e6:.1f} MB in {len(parts)} part(s)")
    except (BundleError, subprocess.CalledProcessError) as error:
        print(f"make_bundle: {error}", file=sys.stderr)
        return 1
    _say(f"bundle in {options.output}")
    return 0


def collect_docker(tree: Path, options: argparse.Namespace) -> dict[str, str]:
    """Unpack the wanted programs of Docker below `tree`; returns package name to version.

    The suite need not be this machine's own: apt works with lists of its own in a folder of its own, from the
    mirror that this machine uses.
    """
    contents = CONTENTS["docker"]
    mirror = options.debian_mirror or _debian_mirror()
    with tempfile.TemporaryDirectory(prefix="bundle-apt-") as work:
        apt = Path(work)
        for folder in ("lists/partial", "cache/archives/partial", "sources", "debs", "root"):
            (apt / folder).mkdir(parents=True)
        (apt / "sources" / "bundle.sources").write_text(
            f"Types: deb\nURIs: {mirror}\nSuites: {contents['suite']}\nComponents: main\n"
            "Architectures: amd64\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n",
            encoding="utf-8",
        )
        settings = {
            "Dir::State::Lists": apt / "lists",
            "Dir::State::Status": "/dev/null",
            "Dir::Cache": apt / "cache",
            "Dir::Etc::SourceList": "/dev/null",
            "Dir::Etc::SourceParts": apt / "sources",
            "APT::Architecture": "amd64",
            "APT::Sandbox::User": "root",
        }
        flags = [f"-o{key}={value}" for key, value in settings.items()]
        _run(["apt-get", *flags, "-q", "update"])
        _run(["apt-get", *flags, "-q", "download", *contents["packages"]], cwd=apt / "debs")
        versions = {}
        for package in sorted((apt / "debs").glob("*.deb")):
            _run(["dpkg-deb", "--extract", str(package), str(apt / "root")])
            name, version = _run(["dpkg-deb", "--show", str(package)]).split()
            versions[name] = version
        for pattern in contents["files"]:
            found = sorted((apt / "root").glob(pattern))
            if not found:
                raise BundleError(f"no file {pattern} in Debian's {', '.join(contents['packages'])}")
            for file in found:
                target = tree / file.relative_to(apt / "root")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, target, follow_symlinks=False)
    return versions


def collect_engine(tree: Path, options: argparse.Namespace) -> dict[str, str]:
    """Install LMDeploy, Ray and what the server lacks for them into `tree`; returns versions by package."""
    present = _read_present(options.present)
    versions = _without(_resolve_engine(present), {*present, *CONTENTS["python"]["left_out"]["packages"]})
    _install(tree, versions)
    for pattern in CONTENTS["python"]["left_out"]["files"]:
        for path in tree.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return versions


def collect_control(tree: Path, options: argparse.Namespace) -> dict[str, str]:
    """Install deploy-dsv3, Ansible and what neither server nor engine has into `tree`; likewise.

    They run on top of the engine's packages, so the versions of both must agree.
    """
    present = _read_present(options.present)
    engine = _resolve_engine(present)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    # The collections come from the `ansible` that is installed here, so its core has to fit them.
    core = f"ansible-core=={importlib.metadata.version('ansible-core')}"
    wanted = _resolve(
        [*project["dependencies"], *CONTENTS["python"]["tools"], core],
        [*_pins(present), *_pins(_without(engine, set(present)))],
    )
    versions = _without(wanted, {*present, *engine, *CONTENTS["python"]["left_out"]["packages"]})
    _install(tree, versions)
    _uv(["pip", "install", *_target(tree), "--no-deps", str(REPOSITORY)])
    versions |= _copy_collections(tree / "ansible_collections")
    return {project["name"]: importlib.metadata.version(project["name"]), **versions}


COLLECTORS: dict[str, Callable[[Path, argparse.Namespace], dict[str, str]]] = {
    "docker": collect_docker,
    "engine": collect_engine,
    "control": collect_control,
}


def pack(tree: Path, archive: Path, part_size: int) -> list[Part]:
    """Compress `tree` into ARCHIVE.00, ARCHIVE.01, … of at most `part_size` bytes, replacing older ones."""
    for old in archive.parent.glob(f"{archive.name}*"):
        old.unlink()
    with (
        lzma.open(archive, "wb", format=lzma.FORMAT_XZ, filters=_FILTERS) as stream,
        tarfile.open(fileobj=stream, mode="w|", format=tarfile.GNU_FORMAT) as tar,
    ):
        for path in sorted(tree.rglob("*")):
            if path.parent.name == "bin":
                _make_movable(path)
            if "__pycache__" not in path.parts:
                tar.add(path, arcname=str(path.relative_to(tree)), recursive=False, filter=_anonymous)
    parts: list[Part] = []
    with archive.open("rb") as whole:
        while piece := whole.read(part_size):
            part = archive.with_name(f"{archive.name}.{len(parts):02d}")
            part.write_bytes(piece)
            parts.append(Part(name=part.name, size=len(piece), sha256=hashlib.sha256(piece).hexdigest()))
    archive.unlink()
    return parts


def _anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = "root"
    info.mtime = 0
    return info


def _debian_mirror() -> str:
    """The mirror that this machine's apt uses for Debian itself."""
    rows = _run(["apt-get", "indextargets", "--format", "$(ORIGIN) $(REPO_URI)", "Created-By: Packages"])
    mirrors = [uri for origin, _, uri in (row.partition(" ") for row in rows.splitlines()) if origin == "Debian"]
    plain = [uri for uri in mirrors if "security" not in uri]
    if not plain:
        raise BundleError("apt here knows no mirror of Debian (run apt-get update?): give --debian-mirror URL")
    return plain[0]


def _read_present(file: Path | None) -> dict[str, str]:
    """Packages that the server has, normalised name to version; empty where the file gives none."""
    if file is None:
        return {}
    present = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        # A freeze names what came from a folder as "NAME @ file:///…"; its version is then not told.
        name, _, version = line.partition("#")[0].partition(" @ ")[0].partition("==")
        if name.strip():
            present[_normalise(name)] = version.strip()
    return present


def _resolve_engine(present: dict[str, str]) -> dict[str, str]:
    return _resolve(CONTENTS["python"]["engine"], _pins(present))


def _pins(versions: dict[str, str]) -> list[str]:
    return [f"{name}=={version}" for name, version in versions.items() if version]


def _without(versions: dict[str, str], names: Container[str]) -> dict[str, str]:
    return {name: version for name, version in versions.items() if name not in names}


def _resolve(requirements: Iterable[str], constraints: Iterable[str]) -> dict[str, str]:
    """Versions that fit the server's Python and each other."""
    with tempfile.TemporaryDirectory(prefix="bundle-resolve-") as work:
        wanted, pinned = Path(work) / "wanted.txt", Path(work) / "pinned.txt"
        wanted.write_text("\n".join(requirements) + "\n", encoding="utf-8")
        pinned.write_text("\n".join(constraints) + "\n", encoding="utf-8")
        python = CONTENTS["python"]
        output = _uv(
            [
                *("pip", "compile", "--quiet", "--no-annotate", "--no-header"),
                *("--only-binary", ":all:", "--constraints", str(pinned)),
                *("--python-version", python["version"], "--python-platform", python["platform"]),
                str(wanted),
            ]
        )
    rows = (line.partition(";")[0].strip().split("==") for line in output.splitlines() if "==" in line)
    return {_normalise(name): version for name, version in rows}


def _install(folder: Path, versions: dict[str, str]) -> None:
    _uv(["pip", "install", *_target(folder), "--only-binary", ":all:", "--no-deps", *_pins(versions)])


def _target(folder: Path) -> list[str]:
    python = CONTENTS["python"]
    return [
        *("--quiet", "--target", str(folder)),
        *("--python-version", python["version"], "--python-platform", python["platform"]),
    ]


def _copy_collections(folder: Path) -> dict[str, str]:
    """Copy the Ansible collections that roles and playbooks use, and those they need; name to version."""
    # By the distribution's files: the import system answers otherwise once Ansible's own loader is in it.
    try:
        source = Path(str(importlib.metadata.distribution("ansible").locate_file("ansible_collections")))
    except importlib.metadata.PackageNotFoundError as error:
        raise BundleError("package `ansible` is not installed here: run in deploy-dsv3's own environment") from error
    texts = (
        path.read_text(encoding="utf-8") for top in ("roles", "playbooks") for path in (REPOSITORY / top).rglob("*.yml")
    )
    open_names = {name for text in texts for name in _FQCN.findall(text)} - {"ansible.builtin"}
    versions: dict[str, str] = {}
    while open_names:
        name = open_names.pop()
        place = Path(*name.split("."))
        manifest = json.loads((source / place / "MANIFEST.json").read_text(encoding="utf-8"))
        information: dict[str, Any] = manifest["collection_info"]
        versions[name] = information["version"]
        open_names |= information["dependencies"].keys() - versions.keys()
        shutil.copytree(
            source / place, folder / place, ignore=shutil.ignore_patterns("tests", "docs", "changelogs", ".*")
        )
    return versions


def _make_movable(script: Path) -> None:
    """Let a console script find python3 on the PATH: the one here is not the server's."""
    if script.is_symlink():
        return
    content = script.read_bytes()
    if content.startswith(b"#!") and b"python" in content.partition(b"\n")[0]:
        script.write_bytes(b"#!/usr/bin/env python3\n" + content.partition(b"\n")[2])


def _normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _size(tree: Path) -> int:
    return sum(path.stat().st_size for path in tree.rglob("*") if path.is_file() and not path.is_symlink())


def _uv(arguments: Sequence[str]) -> str:
    if not shutil.which("uv"):
        raise BundleError("uv is not on the PATH: pip install uv")
    return _run(["uv", "--system-certs", *arguments])


def _run(command: Sequence[str], *, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True)
    if done.returncode:
        raise BundleError(f"{' '.join(command[:4])} … failed ({done.returncode}):\n{done.stderr.strip()}")
    return done.stdout


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=REPOSITORY / ".bundle", help="folder (default: .bundle)")
    parser.add_argument("--present", type=Path, metavar="FILE", help="`pip list --format=freeze` of the server")
    parser.add_argument("--only", action="append", choices=list(COLLECTORS), help="make only this archive")
    parser.add_argument("--part-size", type=int, default=60_000_000, metavar="BYTES", help="largest part")
    parser.add_argument("--debian-mirror", metavar="URL", help="instead of the one that apt uses here")
    options = parser.parse_args(arguments)
    if options.part_size < 1:
        parser.error("--part-size must be at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
