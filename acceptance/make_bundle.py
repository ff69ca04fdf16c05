#!/usr/bin/env python3
"""Make the offline bundle: what a GPU server without internet lacks for `acceptance/run.sh`.

Runs on a Debian machine that reaches package mirrors (Debian's, and a Python index), in the environment that
deploy-dsv3 is installed in. Needs `uv`. Two archives, in parts:

    docker.tar.xz.NN   programs of the Docker engine, to be laid over /
    python.tar.xz.NN   engine/ (LMDeploy, Ray) and control/ (deploy-dsv3, Ansible): site-packages with bin/
    bundle.json        versions, sizes, checksums

What the server has already is left out: give `--present` the output of `python3 -m pip list --format=freeze`
there.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
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
from collections.abc import Iterable, Sequence
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
    record |= {"made": datetime.now(UTC).isoformat(timespec="seconds")}
    try:
        with tempfile.TemporaryDirectory(prefix="bundle-") as work:
            for what in options.only or ["docker", "python"]:
                tree = Path(work) / what
                _say(f"collecting {what}")
                versions = collect_docker(tree, options) if what == "docker" else collect_python(tree, options)
                parts = pack(tree, options.output / f"{what}.tar.xz", options.part_size)
                record[what] = {"versions": versions, "parts": [vars(part) for part in parts]}
                total = sum(part.size for part in parts)
                _say(f"{what}: {total / 1e6:.1f} MB in {len(parts)} parts, {_size(tree) / 1e6:.1f} MB unpacked")
    except (BundleError, subprocess.CalledProcessError) as error:
        print(f"make_bundle: {error}", file=sys.stderr)
        return 1
    record_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
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


def collect_python(tree: Path, options: argparse.Namespace) -> dict[str, str]:
    """Install what the server lacks into `tree`/engine and `tree`/control; returns versions by package."""
    present = _read_present(options.present)
    pins = [f"{name}=={version}" for name, version in present.items() if version]
    engine = _resolve(CONTENTS["python"]["engine"], pins)
    installed_core = importlib.metadata.version("ansible-core")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    control = _resolve(
        [*project["dependencies"], f"ansible-core=={installed_core}"],
        [*pins, *(f"{name}=={version}" for name, version in engine.items() if name not in present)],
    )
    left_out = {*present, *CONTENTS["python"]["left_out"]["packages"]}
    wanted_engine = {name: version for name, version in engine.items() if name not in left_out}
    wanted_control = {name: version for name, version in control.items() if name not in {*left_out, *wanted_engine}}
    _install(tree / "engine", wanted_engine)
    _install(tree / "control", wanted_control)
    _uv(["pip", "install", *_target(tree / "control"), "--no-deps", str(REPOSITORY)])
    for pattern in CONTENTS["python"]["left_out"]["files"]:
        for path in (tree / "engine").glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    collections = _copy_collections(tree / "control" / "ansible_collections")
    for script in tree.glob("*/bin/*"):
        _make_movable(script)
    return {**wanted_engine, **wanted_control, **collections}


def pack(tree: Path, archive: Path, part_size: int) -> list[Part]:
    """Compress `tree` into ARCHIVE.00, ARCHIVE.01, … of at most `part_size` bytes, replacing older ones."""
    for old in archive.parent.glob(f"{archive.name}*"):
        old.unlink()
    with (
        lzma.open(archive, "wb", format=lzma.FORMAT_XZ, filters=_FILTERS) as stream,
        tarfile.open(fileobj=stream, mode="w|", format=tarfile.GNU_FORMAT) as tar,
    ):
        for path in sorted(tree.rglob("*")):
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
    requirements = [f"{name}=={version}" for name, version in versions.items()]
    _uv(["pip", "install", *_target(folder), "--only-binary", ":all:", "--no-deps", *requirements])


def _target(folder: Path) -> list[str]:
    python = CONTENTS["python"]
    return [
        *("--quiet", "--target", str(folder)),
        *("--python-version", python["version"], "--python-platform", python["platform"]),
    ]


def _copy_collections(folder: Path) -> dict[str, str]:
    """Copy the Ansible collections that roles and playbooks use, and those they need; name to version."""
    spec = importlib.util.find_spec("ansible_collections")
    if spec is None or not spec.submodule_search_locations:
        raise BundleError("package `ansible` is not installed here: run in deploy-dsv3's own environment")
    source = Path(spec.submodule_search_locations[0])
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
    parser.add_argument("--only", action="append", choices=["docker", "python"], help="make only this archive")
    parser.add_argument("--part-size", type=int, default=60_000_000, metavar="BYTES", help="largest part")
    parser.add_argument("--debian-mirror", metavar="URL", help="instead of the one that apt uses here")
    options = parser.parse_args(arguments)
    if options.part_size < 1:
        parser.error("--part-size must be at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
