"""What role nvidia_driver makes of a host, what that costs, and what forbids it. Pure: facts and settings in.

A loaded kernel module is replaced only by a reboot: its users (persistence daemon, fabric manager, containers)
cannot all be taken away safely while the host runs. So every change of a loaded driver is a reboot, and every
reboot needs the consent of `nvidia_driver_allow_reboot`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from .facts import HostFacts
from .findings import Finding

Modules = Literal["open", "proprietary"]

# Oldest driver branch for an image's CUDA: minor-version compatibility for a tag that names only the major
# (CUDA release notes), else the branch that came with it, since kernels compiled at run time need that one.
MIN_DRIVER = {"cu12": 525, "cu12.8": 570, "cu13": 580}
# Branches that distributions carry themselves. Ubuntu has several, with the branch in the packages' names.
DISTRIBUTION_DRIVER = {("debian", "12"): "535", ("debian", "13"): "550"}
# NVIDIA's PCI device IDs grow with the generations: TU102 is the first Turing, GB100 the first Blackwell.
_FIRST_TURING = 0x1E02
_FIRST_BLACKWELL = 0x2900


def min_driver(image: str) -> int:
    """Return the oldest driver branch for an image whose tag names its CUDA (…-cu12.8), else 0."""
    match = re.search(r"-(cu\d+)(\.\d+)?", image.rpartition(":")[2])
    if not match:
        return 0
    exact = match.group(1) + (match.group(2) or "")
    return MIN_DRIVER.get(exact, MIN_DRIVER.get(match.group(1), 0))


def is_of_branch(version: str, branch: str) -> bool:
    """Whether a driver's version belongs to `nvidia_driver_branch`, which is a branch or an exact version."""
    return f"{version}.".startswith(f"{branch}.")


def kernel_modules(facts: HostFacts, settings: Mapping[str, Any]) -> Modules:
    """Return the flavour of the kernel modules that a host gets.

    `auto` keeps a flavour that is loaded and fits the GPUs. Otherwise it is open from Turing on, as NVIDIA
    recommends, and proprietary before, which the open modules do not know (installation guide, chapter Kernel
    Modules).
    """
    wish: Literal["auto", "open", "proprietary"] = settings["nvidia_driver_kernel_modules"]
    if wish != "auto":
        return wish
    devices = _gpu_devices(facts)
    if any(device < _FIRST_TURING for device in devices):
        return "proprietary"
    needs_open = any(device >= _FIRST_BLACKWELL for device in devices)
    kept = facts.driver.loaded_version and is_of_branch(facts.driver.loaded_version, settings["nvidia_driver_branch"])
    return "proprietary" if kept and facts.driver.flavour == "proprietary" and not needs_open else "open"


def reboot_reasons(facts: HostFacts, settings: Mapping[str, Any]) -> list[str]:
    """Return why a host has to be rebooted before the driver that is wanted runs; none for a host as wanted."""
    if settings["nvidia_driver_source"] == "preinstalled":
        return []
    loaded, installed = facts.driver.loaded_version, facts.driver.installed_version
    reasons = []
    if facts.driver.nouveau_loaded:
        reasons.append("nouveau holds the GPUs")
    if loaded and not is_of_branch(loaded, settings["nvidia_driver_branch"]):
        reasons.append(f"driver {loaded} is loaded, {settings['nvidia_driver_branch']} is wanted")
    elif loaded and installed and loaded != installed:
        reasons.append(f"driver {loaded} is loaded, {installed} is installed")
    elif loaded and facts.driver.flavour and facts.driver.flavour != (wanted := kernel_modules(facts, settings)):
        reasons.append(f"the {facts.driver.flavour} kernel modules are loaded, the {wanted} ones are wanted")
    return reasons


def check_driver(host: str, facts: HostFacts, settings: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what is wrong with a host's driver, or with the one that it is to get."""
    if settings["nvidia_driver_source"] == "preinstalled":
        yield from _check_preinstalled(host, facts, settings)
    else:
        yield from _check_source(host, facts, settings)
        yield from _check_modules(host, facts, settings)
        yield from _check_secure_boot(host, facts, settings)
        yield from _check_reboot(host, facts, settings)
        yield from _check_fabric_manager(host, facts, settings)


def _check_preinstalled(host: str, facts: HostFacts, settings: Mapping[str, Any]) -> Iterator[Finding]:
    version = facts.driver.loaded_version
    if facts.driver.nouveau_loaded:
        yield Finding(
            code="nouveau",
            host=host,
            severity="error",
            message=f"{host}: the kernel module nouveau is loaded and holds the GPUs",
            cause="the distribution loads it where no other driver is installed",
            remedy="blacklist nouveau and reboot",
        )
    if not version and facts.gpu_count:
        yield Finding(
            code="driver-none",
            host=host,
            severity="error",
            message=f"{host}: no NVIDIA driver is loaded, and nvidia_driver_source is preinstalled",
            cause="the driver is not installed, or its module is not loaded",
            remedy="install the driver, or set nvidia_driver_source to vendor or distribution",
        )
    required = min_driver(settings["engine_image_name"])
    if version and required and int(version.split(".")[0]) < required:
        yield Finding(
            code="driver-old",
            host=host,
            severity="error",
            message=f"{host}: driver {version}, {settings['engine_image_name']} needs branch {required} or newer",
            cause="the CUDA in the image does not run on an older driver",
            remedy=f"install driver branch {required} or newer, or choose an image of an older CUDA",
        )


def _check_source(host: str, facts: HostFacts, settings: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether the source has the branch, and the branch is enough for the image."""
    branch, required = settings["nvidia_driver_branch"], min_driver(settings["engine_image_name"])
    if required and int(branch.split(".")[0]) < required:
        yield Finding(
            code="driver-old",
            host=host,
            severity="error",
            message=f"{host}: nvidia_driver_branch is {branch}, "
            f"{settings['engine_image_name']} needs {required} or newer",
            cause="the CUDA in the image does not run on an older driver",
            remedy=f"set nvidia_driver_branch to {required} or newer, or choose an image of an older CUDA",
        )
    if settings["nvidia_driver_source"] != "distribution":
        return
    carried = DISTRIBUTION_DRIVER.get((facts.os.id, facts.os.version_id), "")
    if facts.os.family == "RedHat" or (carried and branch != carried):
        yield Finding(
            code="driver-source",
            host=host,
            severity="error",
            message=f"{host}: {facts.os.id} {facts.os.version_id} itself carries "
            + (f"driver {carried}" if carried else "no driver")
            + f", nvidia_driver_branch is {branch}",
            cause="nvidia_driver_source is distribution",
            remedy="set nvidia_driver_source to vendor"
            + (f", or nvidia_driver_branch to {carried}" if carried else ""),
        )


def _check_modules(host: str, facts: HostFacts, settings: Mapping[str, Any]) -> Iterator[Finding]:
    wish = settings["nvidia_driver_kernel_modules"]
    devices = _gpu_devices(facts)
    too_old = [device for device in devices if wish == "open" and device < _FIRST_TURING]
    too_new = [device for device in devices if wish == "proprietary" and device >= _FIRST_BLACKWELL]
    if too_old or too_new:
        older = "older than Turing, which the open modules do not know"
        newer = "Blackwell or newer, which the proprietary modules do not know"
        yield Finding(
            code="driver-modules",
            host=host,
            severity="error",
            message=f"{host}: nvidia_driver_kernel_modules is {wish}, "
            f"and GPUs (PCI device {(too_old or too_new)[0]:#06x}) are {older if too_old else newer}",
            cause="the setting was made for other GPUs",
            remedy="set nvidia_driver_kernel_modules to auto",
        )


def _check_secure_boot(host: str, facts: HostFacts, settings: Mapping[str, Any]) -> Iterator[Finding]:
    """Modules that DKMS builds are signed with a key that the firmware does not know."""
    version = facts.driver.loaded_version
    stays = version and is_of_branch(version, settings["nvidia_driver_branch"])
    signed = settings["nvidia_driver_source"] == "distribution" and facts.os.id == "ubuntu"
    if facts.os.secure_boot and not stays and not signed:
        yield Finding(
            code="secure-boot",
            host=host,
            severity="error",
            message=f"{host}: Secure Boot is on, and the driver's modules are built on the host",
            cause="they are signed with a key of the host's own, and enrolling it needs the console at boot",
            remedy="switch Secure Boot off; on Ubuntu use signed modules (nvidia_driver_source=distribution); or enrol "
            "a key and install the driver yourself (nvidia_driver_source=preinstalled)",
        )


def _check_reboot(host: str, facts: HostFacts, settings: Mapping[str, Any]) -> Iterator[Finding]:
    reasons = reboot_reasons(facts, settings)
    if not reasons:
        return
    stopped = ", ".join(one.name for one in facts.docker.containers if one.state == "running")
    consent = settings["nvidia_driver_allow_reboot"]
    yield Finding(
        code="driver-reboot",
        host=host,
        severity="warning" if consent else "error",
        message=f"{host}: "
        + ("is rebooted" if consent else "would have to be rebooted, and nobody consented")
        + f": {'; '.join(reasons)}"
        + (f". Running containers stop: {stopped}" if stopped else ""),
        cause="a loaded kernel module is replaced only by a reboot",
        remedy="nothing: nvidia_driver_allow_reboot is set"
        if consent
        else "set nvidia_driver_allow_reboot=true when the host may go away"
        + (
            f", or nvidia_driver_branch={facts.driver.loaded_version.split('.')[0]} to stay with the driver that runs"
            if facts.driver.loaded_version
            else ""
        ),
    )


def _check_fabric_manager(host: str, facts: HostFacts, settings: Mapping[str, Any]) -> Iterator[Finding]:
    found, loaded = facts.fabric_manager_version, facts.driver.loaded_version
    if not (facts.pci_nvswitches and found and loaded) or found == loaded:
        return
    prepared = settings["fabric_manager_source"] == "preinstalled"
    stays = is_of_branch(loaded, settings["nvidia_driver_branch"])
    yield Finding(
        code="fabric-mismatch",
        host=host,
        severity="error" if prepared else "warning",
        message=f"{host}: the fabric manager is {found}, the driver {loaded}",
        cause="one was upgraded without the other; the fabric manager ends at once, and CUDA with error 802",
        remedy=f"install the fabric manager {loaded}"
        if prepared
        else "nothing: the host stage installs the fabric manager of "
        + (f"the driver's version, {loaded}" if stays else "the new driver's version after it"),
    )


def _gpu_devices(facts: HostFacts) -> list[int]:
    """PCI device IDs of the GPUs."""
    return [int(gpu.device, 16) for gpu in facts.pci_gpus if gpu.device]
