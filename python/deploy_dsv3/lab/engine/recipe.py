"""Build the lab's engine image: real Ray and the stand-in `lmdeploy` in an environment like LMDeploy's.

Packages are fetched on this machine, by its own pip with its own index, proxy and CA settings, so nothing
of those gets into the image and the build needs no network inside a container. Only `docker create`, `cp`,
`start` and `commit` are used: every engine since 20.10 has them, with or without a builder plugin.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ... import serving
from .. import shell
from ..docker_cli import DockerCli
from ..errors import LabError
from .standin import IMITATES, __version__

_HERE = Path(__file__).resolve().parent
_LOCK = _HERE / "requirements.lock"
_STANDIN = _HERE / "standin"

# Where LMDeploy's image keeps its Python: first on PATH, so that `python3` there has Ray.
_PREFIX = "/opt/py3"

# Parts of Ray that a cluster for LMDeploy never runs, and what no process reads.
_NEEDLESS = (
    "bin",
    "ray/jars",
    "ray/cpp",
    "ray/rllib",
    "ray/tune",
    "ray/train",
    "ray/serve",
    "ray/data",
    "ray/llm",
    "ray/dashboard/client",
    "ray/**/tests",
    "**/*.pyi",
    "**/*.pyx",
    "**/*.pxd",
    "**/*.pxi",
)

_CHANGES = (
    f"ENV PATH={_PREFIX}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "ENV PYTHONUNBUFFERED=1",
    f'LABEL org.opencontainers.image.title="SIMULATOR for the deploy-dsv3 lab, not LMDeploy {IMITATES}"',
    "LABEL io.deploy-dsv3.lab.stand-in=true",
    'CMD ["/bin/bash"]',
)

# Bytecode is compiled once here: sixteen ranks that compile their imports would keep a small machine busy.
_FINISH = f"""
set -eu
{_PREFIX}/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash {_PREFIX}/lib
{_PREFIX}/bin/ray --version
{_PREFIX}/bin/lmdeploy --version
"""


def fingerprint() -> str:
    """Twelve characters that change when anything that goes into the image does, but for the base image."""
    digest = hashlib.sha256()
    for path in [Path(__file__), _LOCK, *_standin_files()]:
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    digest.update(serving.options_file().encode())
    return digest.hexdigest()[:12]


def build(
    docker_host: str,
    tag: str,
    base_image: str,
    *,
    ca_bundle: Path | None = None,
    pip_config: Path | None = None,
) -> None:
    """Make image `tag` on the engine at `docker_host` from a Debian-like `base_image` that holds python3.

    Args:
        docker_host: address of the Docker engine ("unix:///…").
        ca_bundle: certificates for pip where the package index stands behind a private CA; None: pip's own
        settings. pip_config: a pip.conf to use; None: the machine's own.

    Raises:
        LabError: pip or Docker failed; the message ends with what they said.
    """
    docker = DockerCli(host=docker_host)
    version, machine = _python_of(docker, base_image)
    name = f"dsv3-build-engine-{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix="dsv3-engine-") as folder:
        root = Path(folder) / "root"
        environment = root / _PREFIX.lstrip("/")
        packages = environment / "lib" / f"python{version}" / "site-packages"
        packages.mkdir(parents=True)
        _fetch(packages, version, machine, ca_bundle=ca_bundle, pip_config=pip_config)
        _strip(packages)
        _install_standin(packages)
        _lay_out(environment, version)
        docker.run("create", "--name", name, base_image, "/bin/sh", "-c", _FINISH)
        try:
            docker.run("cp", "--archive", f"{root}/.", f"{name}:/")
            docker.run("start", "--attach", name)
            docker.run("commit", *(f"--change={change}" for change in _CHANGES), name, tag)
        finally:
            docker.run("rm", "--force", name, check=False)


def _python_of(docker: DockerCli, image: str) -> tuple[str, str]:
    """Version ("3.13") and machine ("x86_64") of the image's python3."""
    script = "import platform, sys; print('%d.%d' % sys.version_info[:2], platform.machine())"
    version, machine = docker.run("run", "--rm", image, "python3", "-c", script).stdout.split()
    return version, machine


def _fetch(packages: Path, version: str, machine: str, *, ca_bundle: Path | None, pip_config: Path | None) -> None:
    environment = {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    if ca_bundle:
        environment["PIP_CERT"] = str(ca_bundle)
    if pip_config:
        environment["PIP_CONFIG_FILE"] = str(pip_config)
    platforms = [f"--platform=manylinux{suffix}_{machine}" for suffix in ("2014", "_2_17", "_2_28", "_2_34")]
    shell.run(
        [
            *(
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--no-compile",
                "--require-hashes",
            ),
            *("--only-binary=:all:", f"--python-version={version}", "--implementation=cp", *platforms),
            # `pip install` holds Requires-Python against the Python it runs in, not the one that is installed for.
            "--ignore-requires-python",
            *("--target", str(packages), "--requirement", str(_LOCK)),
        ],
        environment=environment,
    )


def _strip(packages: Path) -> None:
    for pattern in _NEEDLESS:
        for path in list(packages.glob(pattern)):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.exists():
                path.unlink()


def _install_standin(packages: Path) -> None:
    shutil.copytree(_STANDIN, packages / "lmdeploy", ignore=shutil.ignore_patterns("__pycache__"))
    (packages / "lmdeploy" / "options.json").write_text(serving.options_file())
    information = packages / f"lmdeploy-{__version__}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: lmdeploy\nVersion: {__version__}\n")
    (information / "entry_points.txt").write_text("[console_scripts]\nlmdeploy = lmdeploy.cli:run\n")


def _lay_out(environment: Path, version: str) -> None:
    programs = environment / "bin"
    programs.mkdir()
    for name in ("python", "python3"):
        (programs / name).symlink_to("/usr/bin/python3")
    (environment / "pyvenv.cfg").write_text(
        f"home = /usr/bin\ninclude-system-site-packages = false\nversion = {version}\n"
    )
    for command, module, function in (
        ("ray", "ray.scripts.scripts", "main"),
        ("lmdeploy", "lmdeploy.cli", "run"),
    ):
        script = programs / command
        script.write_text(
            f"#!{_PREFIX}/bin/python\nimport sys\n\nfrom {module} import {function} as main\n\nsys.exit(main())\n"
        )
        script.chmod(0o755)


def _standin_files() -> Iterator[Path]:
    return (path for path in sorted(_STANDIN.rglob("*")) if path.is_file() and "__pycache__" not in path.parts)


__all__ = ["LabError", "build", "fingerprint"]
