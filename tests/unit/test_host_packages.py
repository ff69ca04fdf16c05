"""Which packages, repositories and keys each distribution gets: the roles' own variables, from recorded facts.

The distributions that no lab host runs are proven here as far as that goes without them: what would be asked of their
package managers. docs/distributions.md says which were run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar
from recorded_hosts import document

from deploy_dsv3 import content
from deploy_dsv3.facts import load_facts
from deploy_dsv3.host_checks import SUPPORTED_OS
from deploy_dsv3.hostvars import role_defaults

CUDA = "https://developer.download.nvidia.com/compute/cuda/repos"
SYSTEMS = {
    "debian12": {"id": "debian", "version_id": "12", "codename": "bookworm", "family": "Debian"},
    "debian13": {"id": "debian", "version_id": "13", "codename": "trixie", "family": "Debian"},
    "ubuntu2204": {"id": "ubuntu", "version_id": "22.04", "codename": "jammy", "family": "Debian"},
    "ubuntu2404": {"id": "ubuntu", "version_id": "24.04", "codename": "noble", "family": "Debian"},
    "rhel9": {"id": "rhel", "version_id": "9.5", "codename": "", "family": "RedHat"},
    "rocky9": {"id": "rocky", "version_id": "9.5", "codename": "", "family": "RedHat"},
    "almalinux9": {"id": "almalinux", "version_id": "9.5", "codename": "", "family": "RedHat"},
}
KERNELS = {"debian": "6.12.48+deb13-amd64", "ubuntu": "6.8.0-79-generic"}


def variable(role: str, name: str, system: str, *, modules: str = "open", **settings: Any) -> Any:
    """A variable of a role on a host of that system."""
    facts = document("l20-pcie")
    facts["os"] = {**facts["os"], **SYSTEMS[system]}
    facts["os"]["kernel"] = KERNELS.get(facts["os"]["id"], "5.14.0-503.40.1.el9_5.x86_64")
    assert load_facts(facts).os.family == SYSTEMS[system]["family"]
    loader = DataLoader()
    variables: dict[str, Any] = {
        **role_defaults(),
        **settings,
        "dsv3_facts": facts,
        "dsv3_node": {"kernel_modules": modules},
        "__fabric_manager_driver": {"stdout_lines": [f"{settings.get('nvidia_driver_branch', '580')}.95.05"]},
    }
    for file in ("main", facts["os"]["family"]):
        path = content.roles() / role / "vars" / f"{file}.yml"
        if path.exists():
            variables |= loader.load_from_file(str(path), trusted_as_template=True)
    found = Templar(loader=loader, variables=variables).template(variables[name])
    return list(found) if isinstance(found, (list, tuple)) else found


def test_every_supported_system_is_here() -> None:
    here = {(system["id"], system["version_id"].split(".5")[0]) for system in SYSTEMS.values()}
    assert here == SUPPORTED_OS


@pytest.mark.parametrize(
    ("system", "settings", "packages"),
    [
        (
            "debian12",
            {},
            ["nvidia-driver-cuda=580.*", "nvidia-kernel-open-dkms=580.*", "nvidia-persistenced=580.*"],
        ),
        (
            "debian13",
            {"nvidia_driver_branch": "580.95.05", "modules": "proprietary"},
            ["nvidia-driver-cuda=580.95.05-*", "nvidia-kernel-dkms=580.95.05-*", "nvidia-persistenced=580.95.05-*"],
        ),
        (
            "debian13",
            {"nvidia_driver_source": "distribution"},
            ["nvidia-open-kernel-dkms", "nvidia-smi", "libcuda1", "nvidia-persistenced"],
        ),
        ("ubuntu2204", {}, ["nvidia-open-580"]),
        ("ubuntu2404", {"modules": "proprietary"}, ["cuda-drivers-580"]),
        # The branch left the names of Ubuntu's packages with 590.
        ("ubuntu2404", {"nvidia_driver_branch": "590"}, ["nvidia-open=590.*"]),
        (
            "ubuntu2204",
            {"nvidia_driver_source": "distribution"},
            [
                "linux-modules-nvidia-580-server-open-generic",
                "nvidia-headless-no-dkms-580-server-open",
                "nvidia-utils-580-server",
            ],
        ),
        ("rhel9", {}, ["@nvidia-driver:580-open"]),
        ("rocky9", {"modules": "proprietary"}, ["@nvidia-driver:580-dkms"]),
        ("almalinux9", {"nvidia_driver_packages": ["our-driver"]}, ["our-driver"]),
    ],
)
def test_driver_packages(system: str, settings: Mapping[str, Any], packages: list[str]) -> None:
    assert variable("nvidia_driver", "__nvidia_driver_wanted", system, **settings) == packages


@pytest.mark.parametrize(
    ("system", "url", "key"),
    [
        ("debian12", f"{CUDA}/debian12/x86_64/", f"{CUDA}/debian12/x86_64/3bf863cc.pub"),
        ("debian13", f"{CUDA}/debian13/x86_64/", f"{CUDA}/debian13/x86_64/8793F200.pub"),
        ("ubuntu2204", f"{CUDA}/ubuntu2204/x86_64/", f"{CUDA}/ubuntu2204/x86_64/3bf863cc.pub"),
        ("ubuntu2404", f"{CUDA}/ubuntu2404/x86_64/", f"{CUDA}/ubuntu2404/x86_64/3bf863cc.pub"),
        ("rhel9", f"{CUDA}/rhel9/x86_64/", f"{CUDA}/rhel9/x86_64/D42D0685.pub"),
        ("rocky9", f"{CUDA}/rhel9/x86_64/", f"{CUDA}/rhel9/x86_64/D42D0685.pub"),
        ("almalinux9", f"{CUDA}/rhel9/x86_64/", f"{CUDA}/rhel9/x86_64/D42D0685.pub"),
    ],
)
def test_driver_repository(system: str, url: str, key: str) -> None:
    assert variable("nvidia_driver", "__nvidia_driver_url", system) == url
    assert variable("nvidia_driver", "__nvidia_driver_key_url", system) == key
    mirror = {
        "nvidia_driver_repository_url": "https://mirror.example/",
        "nvidia_driver_repository_key_url": "https://k",
    }
    assert variable("nvidia_driver", "__nvidia_driver_url", system, **mirror) == "https://mirror.example/"
    assert variable("nvidia_driver", "__nvidia_driver_key_url", system, **mirror) == "https://k"


@pytest.mark.parametrize(
    ("role", "system", "ending"),
    [
        ("nvidia_driver", "debian12", "3BF863CC"),
        ("nvidia_driver", "debian13", "8793F200"),
        ("nvidia_driver", "ubuntu2404", "3BF863CC"),
        ("nvidia_driver", "rocky9", "D42D0685"),
        ("nvidia_container_toolkit", "debian13", "F796ECB0"),
        ("docker_engine", "debian12", "0EBFCD88"),
        ("docker_engine", "rhel9", "621E9F35"),
    ],
)
def test_fingerprints_of_keys(role: str, system: str, ending: str) -> None:
    """The vendor's own where the vendor's key is used; of a site's key only what the site says."""
    name, setting = f"__{role}_fingerprint", f"{role}_repository_key"
    own = variable(role, name, system)
    assert len(own) == 40 and own.endswith(ending)
    assert variable(role, name, system, **{f"{setting}_url": "https://k"}) == ""
    assert variable(role, name, system, **{f"{setting}_url": "https://k", f"{setting}_fingerprint": "AB"}) == "AB"


@pytest.mark.parametrize(
    ("system", "settings", "pins", "signed"),
    [
        ("debian12", {}, ["nvidia-driver-pinning-580"], False),
        ("ubuntu2404", {"nvidia_driver_branch": "580.95.05"}, ["nvidia-driver-pinning-580.95.05"], False),
        ("debian13", {"nvidia_driver_source": "distribution"}, [], False),
        ("ubuntu2204", {"nvidia_driver_source": "distribution"}, [], True),
    ],
)
def test_pins_and_signed_modules(system: str, settings: dict[str, Any], pins: list[str], signed: bool) -> None:
    source = settings.get("nvidia_driver_source", "vendor")
    assert variable("nvidia_driver", "__nvidia_driver_pins", system, **settings)[source] == pins
    assert variable("nvidia_driver", "__nvidia_driver_signed", system, **settings) is signed


@pytest.mark.parametrize(
    ("system", "settings", "package"),
    [
        ("debian13", {}, "nvidia-fabricmanager"),
        ("debian12", {"nvidia_driver_branch": "570"}, "nvidia-fabricmanager-570"),
        ("ubuntu2404", {"fabric_manager_source": "distribution"}, "nvidia-fabricmanager-580"),
        ("rocky9", {"nvidia_driver_branch": "570"}, "nvidia-fabricmanager"),
    ],
)
def test_fabric_manager_package(system: str, settings: dict[str, Any], package: str) -> None:
    assert variable("fabric_manager", "__fabric_manager_package", system, **settings) == package


@pytest.mark.parametrize(
    ("system", "source", "url", "packages"),
    [
        ("debian13", "distribution", "https://download.docker.com/linux/debian", {"docker.io", "docker-cli"}),
        ("debian12", "repository", "https://download.docker.com/linux/debian", {"docker-ce", "containerd.io"}),
        ("ubuntu2204", "repository", "https://download.docker.com/linux/ubuntu", {"docker-ce", "containerd.io"}),
        ("rhel9", "repository", "https://download.docker.com/linux/rhel/9/x86_64/stable", {"docker-ce"}),
        ("rocky9", "repository", "https://download.docker.com/linux/rhel/9/x86_64/stable", {"docker-ce"}),
    ],
)
def test_docker(system: str, source: str, url: str, packages: set[str]) -> None:
    assert packages <= set(variable("docker_engine", "__docker_engine_package_sets", system)[source])
    assert variable("docker_engine", "__docker_engine_vendor_url", system) == url
    assert variable("docker_engine", "__docker_engine_suites", system) == SYSTEMS[system]["codename"]


@pytest.mark.parametrize(
    ("system", "packaged"), [("debian13", True), ("debian12", False), ("ubuntu2204", False), ("ubuntu2404", False)]
)
def test_dockers_client_is_a_package_of_its_own_since_debian_13(system: str, packaged: bool) -> None:
    packages = variable("docker_engine", "__docker_engine_package_sets", system)["distribution"]
    assert "docker.io" in packages and ("docker-cli" in packages) is packaged


def test_images_are_pulled_through_a_proxy_of_their_own() -> None:
    name = "__docker_engine_registries"
    assert "proxies" not in variable("docker_engine", name, "debian13")
    proxy = {
        "docker_engine_proxy_url": "http://proxy.example:3128",
        "docker_engine_no_proxy": [".example", "10.0.0.1"],
    }
    assert variable("docker_engine", name, "debian13", **proxy)["proxies"] == {
        "http-proxy": "http://proxy.example:3128",
        "https-proxy": "http://proxy.example:3128",
        "no-proxy": ".example,10.0.0.1",
    }


@pytest.mark.parametrize("system", SYSTEMS)
def test_container_toolkit(system: str) -> None:
    family = SYSTEMS[system]["family"]
    pinned = variable(
        "nvidia_container_toolkit",
        "__nvidia_container_toolkit_pinned",
        system,
        nvidia_container_toolkit_version="1.20.1-1",
    )
    separator = "=" if family == "Debian" else "-"
    assert pinned[0] == f"nvidia-container-toolkit{separator}1.20.1-1" and len(pinned) == 4
    urls = variable("nvidia_container_toolkit", "__nvidia_container_toolkit_urls", system)
    assert urls[family].startswith("https://nvidia.github.io/libnvidia-container/stable/")


@pytest.mark.parametrize("system", SYSTEMS)
def test_rdma(system: str) -> None:
    assert "rdma-core" in variable("rdma", "__rdma_package_set", system)
