"""Pure parts of the programs that simulate kernel and vendor on the lab's hosts."""

from __future__ import annotations

from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from deploy_dsv3.lab.paths import FILES


def program(path: str) -> ModuleType:
    loader = SourceFileLoader(Path(path).name.replace("-", "_").removesuffix(".py"), str(FILES / path))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    # Not through the loader's exec_module: it would leave bytecode among files that are laid on hosts.
    exec(compile(loader.get_data(loader.path), loader.path, "exec"), module.__dict__)
    return module


@pytest.fixture(scope="module")
def kernel() -> ModuleType:
    return program("host/usr/lib/dsv3-lab/kernel.py")


def test_cdi_specification_reads_as_it_was_meant() -> None:
    spec = {
        "cdiVersion": "0.5.0",
        "kind": "nvidia.com/gpu",
        "devices": [
            {"name": "0", "containerEdits": {"deviceNodes": [{"path": "/dev/nvidia0"}]}},
            {
                "name": "all",
                "containerEdits": {"deviceNodes": [{"path": "/dev/nvidia0"}, {"path": "/dev/nvidia1"}]},
            },
        ],
        "containerEdits": {
            "env": ["NVIDIA_VISIBLE_DEVICES=void"],
            "mounts": [{"hostPath": "/a", "containerPath": "/a", "options": ["ro", "rbind"]}],
        },
    }
    assert yaml.safe_load(program("packages/toolkit-base/usr/bin/nvidia-ctk").yaml(spec)) == spec


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["-L"], {"L": ""}),
        (
            ["--query-gpu=index,name", "--format=csv,noheader"],
            {"query-gpu": "index,name", "format": "csv,noheader"},
        ),
        (["-i", "3", "-pm", "1"], {"i": "3", "pm": "1"}),
        (["-q", "-d", "MEMORY"], {"q": "", "d": "MEMORY"}),
    ],
)
def test_nvidia_smi_takes_options_as_the_real_one(arguments: list[str], options: dict[str, str]) -> None:
    assert program("packages/driver-cuda/usr/bin/nvidia-smi").parse(arguments) == options


@pytest.mark.parametrize(
    ("text", "forbidden"),
    [
        ("blacklist nouveau\noptions nouveau modeset=0\n", True),
        ("install nouveau /bin/false\n", True),
        ("# blacklist nouveau\n", False),
        ("blacklist nouveau_vieux\n", False),
    ],
)
def test_module_is_forbidden_by_modprobe_d(kernel: ModuleType, tmp_path: Path, text: str, forbidden: bool) -> None:
    (tmp_path / "gpu.conf").write_text(text)
    assert kernel.blacklisted("nouveau", tmp_path / "missing", tmp_path) is forbidden


def test_newest_built_driver_is_loaded(kernel: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "DKMS", tmp_path)
    assert kernel.built_driver() is None
    release = kernel.os.uname().release
    for version, flavour in (("580.95.05", "open"), ("580.105.08", "proprietary")):
        (tmp_path / version / release).mkdir(parents=True)
        (tmp_path / version / release / "flavour").write_text(flavour + "\n")
    (tmp_path / "590.48.01").mkdir()  # added, not built
    assert kernel.built_driver() == {"version": "580.105.08", "flavour": "proprietary"}


def test_gpu_and_hca_of_a_pair_share_a_root_complex(kernel: ModuleType) -> None:
    assert kernel.pci_path("0000:18:00.0").parent == kernel.pci_path("0000:19:00.0").parent
    assert kernel.pci_path("0000:18:00.0").parent != kernel.pci_path("0000:20:00.0").parent
