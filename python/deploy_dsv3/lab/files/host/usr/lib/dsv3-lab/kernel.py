#!/usr/bin/python3 -IS
"""The simulated kernel of a lab host: PCI GPUs, HCAs, drivers and a boot of its own.

A SIMULATION, part of the deploy-dsv3 lab. The container of a lab host starts here (`boot`), before
systemd, as firmware and kernel do on a server. It shows the hardware that hardware.json describes under
the real paths (/sys/bus/pci/devices, /sys/class/infiniband, /dev/infiniband, /proc/driver/nvidia,
/sys/module), and answers `modprobe`, `lsmod` and `modinfo` for the modules of that hardware.

Standard library only: it runs on bare hosts.
"""

import json
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any, NoReturn

HARDWARE = Path("/var/lib/dsv3-lab/hardware.json")  # mounted read-only from the lab's state; edited there
STATE = Path("/run/dsv3-lab")  # on tmpfs: a reboot forgets it, as a kernel does
PLUGGED = STATE / "plugged.json"  # slots of the simulated PCI devices
DRIVER = STATE / "driver.json"  # what is loaded: {"version", "flavour"}
FABRIC = STATE / "fabric"  # there once the fabric manager has trained the NVLinks
MODULES = STATE / "modules.json"  # names of the simulated modules that are loaded
INITRAMFS = Path("/var/lib/dsv3-initramfs/modprobe.d")  # what update-initramfs copied
DKMS = Path("/var/lib/dkms/nvidia")  # <version>/<kernel>: modules that were built

# The real sysfs, beside the overlays: an overlay goes on believing that a name is absent once it was looked up.
REAL_SYS = STATE / "sys"
VIRTUAL_INTERFACES = REAL_SYS / "devices/virtual/net"  # where the kernel keeps those of a container

NVIDIA_MODULES = ("nvidia", "nvidia_modeset", "nvidia_uvm", "nvidia_peermem")
RDMA_MODULES = ("ib_core", "ib_uverbs", "ib_umad", "rdma_cm", "rdma_ucm", "mlx5_core", "mlx5_ib")
NVIDIA_MAJOR, UVM_MAJOR, NVSWITCH_MAJOR, IB_MAJOR = 195, 511, 510, 231
RDMA_CM_DEVICE = (10, 60)
UMAD_MINOR, ISSM_MINOR, UVERBS_MINOR = 0, 64, 192


def hardware() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(HARDWARE.read_text())
    return found


# ---------------------------------------------------------------- helpers


def run(*argv: str) -> None:
    subprocess.run(argv, check=True)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def read_json(path: Path, default: Any) -> Any:
    return json.loads(path.read_text()) if path.exists() else default


def node(path: Path, major: int, minor: int, mode: int = 0o666) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        os.mknod(path, stat.S_IFCHR | mode, os.makedev(major, minor))
        path.chmod(mode)


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def overlay(path: str) -> None:
    """Make a folder of sysfs writable, in memory and for this host alone."""
    work = STATE / "overlay" / Path(path).name
    for part in ("upper", "work"):
        (work / part).mkdir(parents=True)
    options = f"lowerdir={path},upperdir={work}/upper,workdir={work}/work"
    run("mount", "-t", "overlay", "-o", options, "overlay", path)


# ---------------------------------------------------------------- boot


def boot() -> None:
    """What a machine does before its init: a fresh boot, hardware on the buses, drivers; then systemd."""
    STATE.mkdir(parents=True, exist_ok=True)
    write(STATE / "boot_id", str(uuid.uuid4()))  # the kernel's own is the machine's, and never changes
    run("mount", "--bind", f"{STATE}/boot_id", "/proc/sys/kernel/random/boot_id")
    own_network_settings()
    REAL_SYS.mkdir()
    run("mount", "--bind", "/sys", str(REAL_SYS))
    for path in ("/sys/devices", "/sys/class", "/sys/bus", "/sys/module"):
        overlay(path)
    run("mount", "-t", "tmpfs", "-o", "mode=755", "driver", "/proc/driver")
    apply()
    machine = hardware()
    if machine["nouveau"] and machine["gpus"] and not blacklisted("nouveau", INITRAMFS):
        insert("nouveau")
    elif machine["gpus"]:
        load_nvidia(quiet=True)
    os.execv("/sbin/init", ["/sbin/init"])


def own_network_settings() -> None:
    """/proc/sys is read-only in a container; its net/ belongs to this host alone and may be written."""
    fresh = STATE / "proc"
    fresh.mkdir()
    run("mount", "-t", "proc", "proc", str(fresh))
    run("mount", "--bind", f"{fresh}/sys/net", "/proc/sys/net")
    run("umount", str(fresh))


# ---------------------------------------------------------------- buses


def apply() -> None:
    """Make the buses look as hardware.json says now; run again after a change, as a hot plug would."""
    machine = hardware()
    unplug()
    for gpu in machine["gpus"]:
        if gpu["present"]:
            plug(gpu, "0x10de", "0x030200")
    for switch in machine["nvswitches"]:
        plug(switch, "0x10de", "0x068000")
    remove_interfaces(machine)
    management = plug(machine["management"], "0x8086", "0x020000")
    show_interface(management, "eth0")
    for module in RDMA_MODULES:
        (insert if machine["hcas"] else remove)(module)
    if machine["hcas"]:
        node(Path("/dev/infiniband/rdma_cm"), *RDMA_CM_DEVICE)
    for number, hca in enumerate(machine["hcas"]):
        plug_hca(number, hca)
    names = loaded()
    if "nvidia" in names:
        nvidia_devices(machine)
    bind(next((name for name in ("nouveau", "nvidia") if name in names), None))


def unplug() -> None:
    """Take everything simulated off the buses."""
    for slot in read_json(PLUGGED, []):
        path = pci_path(slot)
        for interface in (path / "net").glob("*"):
            run("umount", str(interface))
            (Path("/sys/class/net") / interface.name).unlink()
        shutil.rmtree(path)
        (Path("/sys/bus/pci/devices") / slot).unlink()
    PLUGGED.unlink(missing_ok=True)
    for name in ("infiniband", "infiniband_verbs", "infiniband_mad"):
        shutil.rmtree(Path("/sys/class") / name, ignore_errors=True)
    shutil.rmtree("/dev/infiniband", ignore_errors=True)


def pci_path(slot: str) -> Path:
    """Where a device is in /sys/devices: a GPU and the HCA next to it share a root complex."""
    bus = int(slot.split(":")[1], 16)
    return Path(f"/sys/devices/pci0000:{max(bus & ~7, 1) - 1:02x}") / slot


def plug(unit: dict[str, Any], vendor: str, class_: str) -> Path:
    """Put a PCI device on the bus; returns its folder."""
    path, device = pci_path(unit["pci_slot"]), unit["pci_device"]
    files = {
        "vendor": vendor,
        "device": device,
        "subsystem_vendor": vendor,
        "subsystem_device": device,
        "class": class_,
        "revision": "0xa1",
        "numa_node": str(unit["numa"]),
        "enable": "1",
        "irq": "0",
        "resource": "\n".join(["0x0000000000000000 0x0000000000000000 0x0000000000000000"] * 7),
    }
    for name, text in files.items():
        write(path / name, text)
    maker, product, kind = int(vendor, 16), int(device, 16), int(class_, 16)
    # The first 64 bytes of configuration space: what lspci reads.
    head = struct.pack("<HHHHBBBB", maker, product, 0x0006, 0x0010, 0xA1, kind & 0xFF, kind >> 8 & 0xFF, kind >> 16)
    (path / "config").write_bytes(head.ljust(44, b"\0") + struct.pack("<HH", maker, product) + bytes(16))
    link(Path("/sys/bus/pci/devices") / path.name, path)
    write(PLUGGED, json.dumps([*read_json(PLUGGED, []), path.name]))
    return path


def plug_hca(number: int, hca: dict[str, Any]) -> None:
    pci = plug(hca, "0x15b3", "0x020700" if hca["ports"][0]["link_layer"] == "InfiniBand" else "0x020000")
    base = pci / "infiniband" / hca["name"]
    files = {
        "node_guid": hca["guid"],
        "sys_image_guid": hca["guid"],
        "node_type": "1: CA",
        "fw_ver": hca["firmware"],
        "hca_type": "MT4129",
        "board_id": "MT_0000000838",
        "node_desc": f"{os.uname().nodename} {hca['name']}",
    }
    for name, text in files.items():
        write(base / name, text)
    link(base / "device", pci)
    link(Path("/sys/class/infiniband") / hca["name"], base)
    for port in hca["ports"]:
        show_port(base / "ports" / str(port["port"]), port)
        if port["interface"]:
            add_interface(port["interface"], up=port["state"].startswith("4"))
            show_interface(pci, port["interface"]["name"])
    for kind, minor, class_, mode in (
        ("uverbs", UVERBS_MINOR, "infiniband_verbs", 0o666),
        ("umad", UMAD_MINOR, "infiniband_mad", 0o600),
        ("issm", ISSM_MINOR, "infiniband_mad", 0o600),
    ):
        entry = pci / class_ / f"{kind}{number}"
        write(entry / "ibdev", hca["name"])
        write(entry / "dev", f"{IB_MAJOR}:{minor + number}")
        if kind != "uverbs":
            write(entry / "port", "1")
        link(entry / "device", pci)
        link(Path("/sys/class") / class_ / entry.name, entry)
        node(Path("/dev/infiniband") / entry.name, IB_MAJOR, minor + number, mode)


def show_port(path: Path, port: dict[str, Any]) -> None:
    for name in ("state", "phys_state", "rate", "link_layer", "lid", "sm_lid"):
        write(path / name, port[name])
    for counter in ("symbol_error", "link_downed", "port_rcv_errors", "port_xmit_wait"):
        write(path / "counters" / counter, "0")
    write(path / "hw_counters" / "out_of_sequence", "0")
    write(path / "pkeys" / "0", "0xffff")
    for gid in port["gids"]:
        index = str(gid["index"])
        write(path / "gids" / index, gid["gid"])
        if gid["type"]:
            write(path / "gid_attrs" / "types" / index, gid["type"])
            write(path / "gid_attrs" / "ndevs" / index, gid["ndev"])


def add_interface(interface: dict[str, str], *, up: bool) -> None:
    """The network interface of a RoCE port: a real one, on the lab's network."""
    name = interface["name"]
    if not (VIRTUAL_INTERFACES / name).exists():
        run("ip", "link", "add", "link", "eth0", "name", name, "type", "macvlan", "mode", "bridge")
        run("ip", "address", "add", interface["address"], "dev", name)
    run("ip", "link", "set", name, "up" if up else "down")


def remove_interfaces(machine: dict[str, Any]) -> None:
    """Take away the interfaces of ports that are gone."""
    ports = [port for hca in machine["hcas"] for port in hca["ports"] if port["interface"]]
    kept = {"lo", "eth0", *(port["interface"]["name"] for port in ports)}
    for path in VIRTUAL_INTERFACES.iterdir():
        if path.name not in kept and (path / "lower_eth0").exists():
            run("ip", "link", "delete", path.name)


def show_interface(pci: Path, name: str) -> None:
    """Let an interface belong to a PCI device: the live entries of sysfs, in that device's folder."""
    place = pci / "net" / name
    place.mkdir(parents=True)
    run("mount", "--bind", str(VIRTUAL_INTERFACES / name), str(place))
    link(Path("/sys/class/net") / name, place)


# ---------------------------------------------------------------- modules


def loaded() -> list[str]:
    names: list[str] = read_json(MODULES, [])
    return names


def insert(name: str, version: str = "") -> None:
    names = loaded()
    if name not in names:
        write(MODULES, json.dumps([*names, name]))
    folder = Path("/sys/module") / name
    write(folder / "initstate", "live")
    write(folder / "refcnt", "0")
    if version:
        write(folder / "version", version)
    if name in ("nouveau", "nvidia"):
        bind(name)


def remove(name: str) -> None:
    names = [other for other in loaded() if other != name]
    write(MODULES, json.dumps(names))
    shutil.rmtree(Path("/sys/module") / name, ignore_errors=True)
    if name in ("nouveau", "nvidia"):
        bind(None)


def bind(driver: str | None) -> None:
    """Let a driver hold the GPUs, or none."""
    for gpu in hardware()["gpus"]:
        if not gpu["present"]:
            continue
        path = pci_path(gpu["pci_slot"]) / "driver"
        path.unlink(missing_ok=True)
        if driver:
            folder = Path("/sys/bus/pci/drivers") / driver
            folder.mkdir(parents=True, exist_ok=True)
            link(path, folder)


def blacklisted(name: str, *folders: Path) -> bool:
    """Whether modprobe.d files in these folders forbid a module."""
    for folder in folders:
        for path in sorted(folder.glob("*.conf")) if folder.is_dir() else ():
            for line in path.read_text().splitlines():
                words = line.split("#")[0].split()
                if words[:1] == ["blacklist"] and words[1:2] == [name]:
                    return True
                if words[:2] == ["install", name] and words[2:] and words[2].endswith(("/true", "/false")):
                    return True
    return False


def built_driver() -> dict[str, str] | None:
    """Version and flavour of the newest NVIDIA module that dkms built for this kernel, or None."""
    kernel = os.uname().release
    built = [path.parent for path in DKMS.glob(f"*/{kernel}")] if DKMS.is_dir() else []
    newest = max(built, key=lambda path: [int(part) for part in path.name.split(".")], default=None)
    if newest is None:
        return None
    return {"version": newest.name, "flavour": (newest / kernel / "flavour").read_text().strip()}


def load_nvidia(*, quiet: bool = False) -> int:
    """Load nvidia with its companions. Returns the exit code of modprobe."""
    if "nvidia" in loaded():
        return 0
    driver = built_driver()
    if driver is None:
        if not quiet:
            print(
                f"modprobe: FATAL: Module nvidia not found in directory /lib/modules/{os.uname().release}",
                file=sys.stderr,
            )
        return 1
    machine = hardware()
    if not any(gpu["present"] for gpu in machine["gpus"]) or "nouveau" in loaded():
        # nvidia's probe is not called for GPUs that another driver holds.
        if not quiet:
            print("modprobe: ERROR: could not insert 'nvidia': No such device", file=sys.stderr)
        return 1
    write(DRIVER, json.dumps(driver))
    for name in NVIDIA_MODULES[:3]:
        insert(name, driver["version"])
    flavour = "Open Kernel Module for x86_64" if driver["flavour"] == "open" else "Kernel Module for x86_64"
    write(
        Path("/proc/driver/nvidia/version"),
        f"NVRM version: NVIDIA UNIX {flavour}  {driver['version']}  Release Build  (dvs-builder@lab)  "
        "Thu Jan  1 00:00:00 UTC 2026\nGCC version:  gcc version 14.2.0 (Debian 14.2.0-19)",
    )
    nvidia_devices(machine)
    return 0


def nvidia_devices(machine: dict[str, Any]) -> None:
    for path in Path("/dev").glob("nvidia[0-9]*"):
        path.unlink()
    shutil.rmtree("/proc/driver/nvidia/gpus", ignore_errors=True)
    for gpu in machine["gpus"]:
        if gpu["present"]:
            node(Path(f"/dev/nvidia{gpu['index']}"), NVIDIA_MAJOR, gpu["index"])
            write(
                Path("/proc/driver/nvidia/gpus") / gpu["pci_slot"] / "information",
                f"Model: \t\t {gpu['name']}\nGPU UUID: \t {gpu['uuid']}\nBus Location: \t {gpu['pci_slot']}\n"
                f"Device Minor: \t {gpu['index']}",
            )
    node(Path("/dev/nvidiactl"), NVIDIA_MAJOR, 255)
    node(Path("/dev/nvidia-modeset"), NVIDIA_MAJOR, 254)
    node(Path("/dev/nvidia-uvm"), UVM_MAJOR, 0)
    node(Path("/dev/nvidia-uvm-tools"), UVM_MAJOR, 1)
    if machine["nvswitches"]:
        node(Path("/dev/nvidia-nvswitchctl"), NVSWITCH_MAJOR, 255)
        for number, _ in enumerate(machine["nvswitches"]):
            node(Path(f"/dev/nvidia-nvswitch{number}"), NVSWITCH_MAJOR, number)


def unload_nvidia() -> int:
    users = [path for path in ("nvidia-persistenced", "nv-fabricmanager") if (Path("/run") / path).exists()]
    if users:
        print(f"modprobe: FATAL: Module nvidia is in use by {', '.join(users)}.", file=sys.stderr)
        return 1
    for name in NVIDIA_MODULES:
        remove(name)
    DRIVER.unlink(missing_ok=True)
    FABRIC.unlink(missing_ok=True)
    shutil.rmtree("/proc/driver/nvidia", ignore_errors=True)
    for path in Path("/dev").glob("nvidia*"):
        path.unlink()
    return 0


def simulated(name: str) -> bool:
    return name in NVIDIA_MODULES or name == "nouveau" or (name in RDMA_MODULES and bool(hardware()["hcas"]))


def load(name: str) -> int:
    if blacklisted(name, Path("/etc/modprobe.d")) and name == "nouveau":
        return 0
    if name in NVIDIA_MODULES:
        code = load_nvidia()
        if code == 0 and name not in loaded():
            insert(name, json.loads(DRIVER.read_text())["version"])
        return code
    insert(name)
    return 0


def unload(name: str) -> int:
    if name == "nvidia":
        return unload_nvidia()
    remove(name)
    return 0


def real(tool: str, arguments: list[str]) -> NoReturn:
    os.execv("/usr/bin/kmod", [tool, *arguments])


def modprobe(arguments: list[str]) -> int:
    names = [word.replace("-", "_") for word in arguments if not word.startswith("-") and "=" not in word]
    if not names or not any(map(simulated, names)):
        real("modprobe", arguments)
    if {"-n", "--dry-run", "--show", "-D", "--show-depends"} & set(arguments):
        return 0
    act = unload if {"-r", "--remove"} & set(arguments) else load
    return max([act(name) for name in names if simulated(name)], default=0)


def lsmod(_arguments: list[str]) -> int:
    print("Module                  Size  Used by")
    for name in reversed(loaded()):
        print(f"{name:<22} 65536  0")
    if Path("/proc/modules").exists():
        sys.stdout.flush()
        subprocess.run("kmod list | tail -n +2", shell=True, check=False)
    return 0


def modinfo(arguments: list[str]) -> int:
    names = [word.replace("-", "_") for word in arguments if not word.startswith("-")]
    driver = built_driver()
    if not names or names[-1] not in NVIDIA_MODULES or driver is None:
        real("modinfo", arguments)
    fields = {
        "filename": f"/lib/modules/{os.uname().release}/updates/dkms/{names[-1].replace('_', '-')}.ko",
        "version": driver["version"],
        "license": "Dual MIT/GPL" if driver["flavour"] == "open" else "NVIDIA",
    }
    wanted = [arguments[place + 1] for place, word in enumerate(arguments[:-1]) if word in ("-F", "--field")]
    for field in wanted or fields:
        print(fields.get(field, "") if wanted else f"{field + ':':<16}{fields[field]}")
    return 0


def modules_load(_arguments: list[str]) -> int:
    """What systemd-modules-load does, for simulated modules; others belong to the machine's kernel."""
    for folder in ("/usr/lib/modules-load.d", "/run/modules-load.d", "/etc/modules-load.d"):
        for path in sorted(Path(folder).glob("*.conf")) if Path(folder).is_dir() else ():
            for line in path.read_text().splitlines():
                name = re.split(r"[#;]", line)[0].strip().replace("-", "_")
                if name and simulated(name):
                    load(name)
    return 0


def update_initramfs(_arguments: list[str]) -> int:
    """Copy /etc/modprobe.d to where the next boot looks before the root file system is there."""
    shutil.rmtree(INITRAMFS, ignore_errors=True)
    INITRAMFS.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree("/etc/modprobe.d", INITRAMFS, dirs_exist_ok=True)
    print(f"update-initramfs: Generating /boot/initrd.img-{os.uname().release}")
    return 0


COMMANDS = {
    "modprobe": modprobe,
    "lsmod": lsmod,
    "modinfo": modinfo,
    "modules-load": modules_load,
    "update-initramfs": update_initramfs,
}


def main() -> int:
    name = Path(sys.argv[0]).name
    arguments = sys.argv[1:]
    if name in ("kernel.py", "kernel"):
        name, *arguments = arguments
    if name == "boot":
        boot()
    if name == "apply":
        apply()
        return 0
    return COMMANDS[name](arguments)


if __name__ == "__main__":
    sys.exit(main())
