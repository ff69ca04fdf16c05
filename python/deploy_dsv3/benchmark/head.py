"""The head's part: its tokenizer's files, and a worker that makes the load from there.

The worker runs in a container of its own beside the engine's, from the same image (which has the numpy and
aiohttp that it needs), without GPUs, and detached: once Docker runs it, no connection has to last. Everything
goes through playbooks and so through the connections, passwords and privileges that the inventory describes.
"""

from __future__ import annotations

import shutil
import tempfile
import zipapp
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy_dsv3 import runner, verbs
from deploy_dsv3.benchmark.plan import Plan
from deploy_dsv3.benchmark.runs import RunFolder
from deploy_dsv3.benchmark.target import Target
from deploy_dsv3.errors import BY_EXIT_CODE, HostError, LockedError
from deploy_dsv3.options import Options

_PACKAGE = Path(__file__).resolve().parent
_PLAYBOOKS = _PACKAGE / "playbooks"
_STATE = "/var/lib/deploy-dsv3/benchmark"
_CONTAINER = "deploy-dsv3-benchmark"
#: What the bundle for the head is made of: the worker and what it imports.
WORKER_MODULES = (
    "__init__",
    "client",
    "estimate",
    "figures",
    "plan",
    "runs",
    "texts",
    "worker",
    "workload",
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class Head:
    """A replica's head, reached through Ansible."""

    def __init__(self, loaded: verbs.Target, options: Options, target: Target) -> None:
        self._loaded = loaded
        self._options = options
        self._target = target

    def play(self, name: str, variables: Mapping[str, Any], *, secret: str = "") -> Mapping[str, Any]:
        """Run one of `playbooks/` on the head; returns what it handed over.

        Raises:
            UnreachableError: the head cannot be reached.
            HostError: a task failed.
        """
        secrets = self._loaded.secrets | ({secret} if secret else set())
        job = runner.Job(
            playbook=_PLAYBOOKS / f"{name}.yml",
            inventories=self._options.inventories,
            extra_vars={**self._loaded.settings.extra_vars, "benchmark_head": self._target.head, **variables},
            user_extra_vars=self._options.variables,
            verbosity=self._options.verbosity,
            passwords=runner.Passwords(
                become=self._options.become_password,
                become_file=self._options.become_file,
                vault=self._options.vault_password,
                vault_files=self._options.vault_files,
            ),
        )
        with runner.RunLog(f"benchmark-{name}", secrets) as log:
            outcome = runner.run(job, log=log, on_record=lambda record: None)
        if outcome.first is not None:
            failure = outcome.first
            raise BY_EXIT_CODE.get(outcome.exit_code, HostError)(
                f"{failure.host}: {failure.task}: {failure.message}",
                remedy=failure.remedy or f"The log is in {log.directory}.",
            )
        # Only of use for looking into a failure, and one is made every time the worker is looked at.
        shutil.rmtree(log.directory, ignore_errors=True)
        return outcome.report

    def fetch_tokenizer(self) -> Path | None:
        """The deployed tokenizer's files, brought to this machine; None where the weights have none."""
        folder = runner.state_directory() / "tokenizers" / self._target.replica
        folder.mkdir(parents=True, exist_ok=True)
        files = [f"{self._target.weights_path}/{name}" for name in _TOKENIZER_FILES]
        for name in _TOKENIZER_FILES:
            (folder / name).unlink(missing_ok=True)
        self.play("tokenizer", {"benchmark_files": files, "benchmark_destination": f"{folder}/"})
        return folder if (folder / _TOKENIZER_FILES[0]).is_file() else None


class HeadWorker:
    """A worker in a container on the head."""

    # Each look is a playbook: seconds of work here.
    look_every_s = 20.0

    def __init__(self, head: Head, folder: RunFolder, target: Target, plan: Plan, files: Sequence[str] = ()) -> None:
        """`files`: what of the head's own the worker reads beside the weights."""
        self._head = head
        self._folder = folder
        self._target = target
        self._variables = {
            "benchmark_container": _CONTAINER,
            "benchmark_folder": f"{_STATE}/{plan.fingerprint()}-{folder.path.name}",
            "benchmark_results": f"{folder.path.absolute()}/",
        }
        self._files = (target.weights_path, *files)
        self._seen: Mapping[str, Any] = {}

    def start(self, api_key: str) -> None:
        """Carry the worker, plan, job and measured rows over, and start the container."""
        with tempfile.TemporaryDirectory(prefix="deploy-dsv3-") as scratch:
            bundle = build_bundle(Path(scratch))
            known = sorted(
                str(path.absolute())
                for pattern in ("run.json", "job.json", "api_n*.json")
                for path in self._folder.path.glob(pattern)
            )
            self._head.play(
                "start",
                {
                    **self._variables,
                    "benchmark_bundle": str(bundle),
                    "benchmark_known": known,
                    "benchmark_ca": self._target.ca_file,
                    "benchmark_api_key": api_key,
                    "benchmark_image": self._target.image,
                    "benchmark_mounts": [
                        {"type": "bind", "source": path, "target": path, "read_only": True}
                        for path in dict.fromkeys(self._files)
                    ],
                },
                secret=api_key,
            )

    def alive(self) -> bool:
        """Whether the container runs.

        Raises:
            LockedError: it runs for another folder.
        """
        self._look()
        if not self._seen.get("running"):
            return False
        if self._seen.get("folder") != self._variables["benchmark_folder"]:
            raise LockedError(
                f"{self._target.head}: another benchmark runs there, into {self._seen.get('folder')}",
                remedy=f"Wait for it, or stop it: docker stop {_CONTAINER} on that host.",
            )
        return True

    def progress(self) -> Mapping[str, Any]:
        """Its `progress.json`, as last looked at."""
        found = self._seen.get("progress")
        return found if isinstance(found, dict) else {}

    def last_words(self) -> str:
        """The end of the container's log."""
        return str(self._seen.get("log", ""))

    def stop(self) -> None:
        """Stop the container; the worker is told with SIGTERM."""
        self._head.play("stop", self._variables)

    def collect(self) -> None:
        """Bring results here and tidy up there; files that are here already are left as they are."""
        self._look()
        self._head.play("collect", {**self._variables, "benchmark_here": self._files_here()})

    def _look(self) -> None:
        self._seen = self._head.play("look", self._variables)

    def _files_here(self) -> list[str]:
        folder = self._folder.path
        return [str(path.relative_to(folder)) for path in folder.rglob("api_n*") if path.is_file()]


def build_bundle(scratch: Path) -> Path:
    """The worker as one file that Python runs; it needs numpy, aiohttp, and tokenizers for exact lengths."""
    source = scratch / "source"
    inside = source / "deploy_dsv3" / "benchmark"
    inside.mkdir(parents=True)
    for name in ("__init__.py", "errors.py"):
        shutil.copy(_PACKAGE.parent / name, source / "deploy_dsv3" / name)
    for module in WORKER_MODULES:
        shutil.copy(_PACKAGE / f"{module}.py", inside)
    shutil.copy(_PACKAGE / "words.txt", inside)
    shutil.copy(_PACKAGE / "bundled.py", source / "__main__.py")
    bundle = scratch / "worker.pyz"
    zipapp.create_archive(source, bundle, compressed=True)
    return bundle
