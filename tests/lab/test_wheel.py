"""The wheel, installed elsewhere and run from another folder, does what the checkout does."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from product import Product

from deploy_dsv3.lab.fleet import Lab

REPOSITORY = Path(__file__).parents[2]
TOOLS = Path(sys.executable).parent

pytestmark = pytest.mark.usefixtures("deployed")


def _run(tool: str, *arguments: str | Path) -> None:
    """Run a tool of this environment in the checkout."""
    subprocess.run([TOOLS / tool, *arguments], cwd=REPOSITORY, check=True, timeout=600)


@pytest.fixture(scope="module")
def elsewhere(product: Product, tmp_path_factory: pytest.TempPathFactory) -> Product:
    """The command of a fresh environment that has only the wheel and what the wheel asks for."""
    folder = tmp_path_factory.mktemp("elsewhere")
    venv = folder / "venv"
    _run("pip", "wheel", ".", "--quiet", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}")
    (wheel,) = folder.glob("*.whl")
    _run("uv", "venv", "--quiet", f"--python={sys.executable}", venv)
    pins = f"--constraints={REPOSITORY / 'requirements' / 'dev.lock'}"
    _run("uv", "pip", "install", "--quiet", f"--python={venv}", pins, wheel)
    (folder / "work").mkdir()
    return replace(product, program=venv / "bin" / "deploy-dsv3", folder=folder / "work")


def test_its_content_is_inside_the_wheel(elsewhere: Product) -> None:
    python = elsewhere.program.with_name("python")
    asked = "from deploy_dsv3 import content; print(content.playbook('deploy')); print(content.testinfra())"
    done = subprocess.run([python, "-c", asked], cwd=elsewhere.folder, capture_output=True, text=True, check=True)
    for path in done.stdout.split():
        assert Path(path).is_relative_to(elsewhere.program.parents[1])


def test_it_finds_nothing_to_do(elsewhere: Product, lab: Lab) -> None:
    run = elsewhere("--inventory", lab.inventory, "--check", "--json", what="--check from the wheel")
    assert [stats["changed"] for stats in run.document["hosts"].values()] == [0, 0]


def test_it_verifies(elsewhere: Product, lab: Lab) -> None:
    run = elsewhere("verify", "--inventory", lab.inventory, "--json", what="verify from the wheel")
    assert run.document["passed"] is True
    assert {check["host"] for check in run.document["checks"]} == {"gpu-01", "gpu-02"}
