#!/usr/bin/python3 -IS
"""The simulated kernel of a lab host: PCI GPUs, HCAs, drivers and a boot of its own.

A SIMULATION, part of the deploy-dsv3 lab. The container of a lab host starts here (`boot`), before systemd, as
firmware and kernel do on a server. It shows the hardware that hardware.json describes under the real paths
(/sys/bus/pci/devices, /sys/class/infiniband, /dev/infiniband, /proc/driver/nvidia, /sys/module), and answers
`modprobe`, `lsmod` and `modinfo` for the modules of that hardware.

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

HARDWARE = Path("/var/lib/dsv3-lab/hardware.json")  # mounted read-only from the lab's state; edited there
STATE = Path("/run/dsv3-lab")  # on tmpfs: a reboot forgets it, as a kernel does
DRIVER = STATE / "driver.json"  # what is loaded: {"version", "flavour"}
MODULES = STATE / "modules.json"  # names of the simulated modules that are loaded
INITRAMFS = Path("/var/lib/dsv3-initramfs/modprobe.d")  # what update-initramfs copied
DKMS = Path("/var/lib/dkms/nvidia")  # <version>/<kernel>: modules that were built

NVIDIA_MODULES = ("nvidia", "nvidia_modeset", "nvidia_uvm", "nvidia_peermem")
RDMA_MODULES = ("ib_core", "ib_uverbs", "ib_umad", "rdma_cm", "rdma_ucm", "mlx5_core", "mlx5_ib")
NVIDIA_MAJOR, UVM_MAJOR, NVSWITCH_MAJOR, IB_MAJOR = 195, 511, 510, 231
RDMA_CM_DEVICE = (10, 60)
UMAD_MINOR, ISSM_MINOR, UVERBS_MINOR = 0, 64, 192


def hardware():
    return json.loads(HARDWARE.read_text())


# ---------------------------------------------------------------- helpers


def run(*argv):
    subprocess.run(argv, check=True)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def node(path, major, minor, mode=0o666):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        os.mknod(path, stat.S_IFCHR | mode, os.makedev(major, minor))
        path.chmod(mode)


def link(path, target):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        path.unlink()
    path.symlink_to(target)


def overlay(path):
    """Make a folder of sysfs writable, in memory and for this host alone."""
    if os.path.ismount(path) and path != Path("/sys"):
        return
    work = STATE / "overlay" / path.name
    for part in ("upper", "work"):
        (work / part).mkdir(parents=True, exist_ok=True)
    options = f"lowerdir={path},upperdir={work}/upper,workdir={work}/work"
    run("mount", "-t", "overlay", "-o", options, "overlay", str(path))


# ---------------------------------------------------------------- boot


def boot():
    """What a machine does before its init: a fresh boot, hardware on the bus, drivers for it; then systemd."""
    STATE.mkdir(parents=True, exist_ok=True)
    write(STATE / "boot_id", str(uuid.uuid4()))  # the kernel's own is the machine's, and never changes
    run("mount", "--bind", str(STATE / "boot_id"), "/proc/sys/kernel/random/boot_id")
    own_network_settings()
    for path in ("/sys/class", "/sys/bus", "/sys/module"):
        overlay(Path(path))
    run("mount", "-t", "tmpfs", "-o", "mode=755", "driver", "/proc/driver")
    apply()
    machine = hardware()
    if machine["nouveau"] and machine["gpus"] and not blacklisted("nouveau", INITRAMFS):
        insert("nouveau")
    elif machine["gpus"]:
        load_nvidia(quiet=True)
    os.execv("/sbin/init", ["/sbin/init"])


def own_network_settings():
    """/proc/sys is read-only in a container; its net/ belongs to this host alone and may be written."""
    fresh = STATE / "proc"
    fresh.mkdir(exist_ok=True)
    run("mount", "-t", "proc", "proc", str(fresh))
    run("mount", "--bind", f"{fresh}/sys/net", "/proc/sys/net")
    run("umount", str(fresh))


def apply():
    """Make the bus look as hardware.json says now; run again after a change, as a hot plug would."""
    machine = hardware()
    apply_gpus(machine)
    apply_hcas(machine)
    if "nvidia" in loaded():
        nvidia_devices(machine)


def pci_device(slot, vendor, device, class_, numa):
    path = Path("/sys/bus/pci/devices") / slot
    write(path / "vendor", vendor)
    write(path / "device", device)
    write(path / "class", class_)
    write(path / "subsystem_vendor", vendor)
    write(path / "subsystem_device", device)
    write(path / "revision", "0xa1")
    write(path / "numa_node", str(numa))
    write(path / "enable", "1")
    write(path / "irq", "0")
    write(path / "resource", "\n".join(["0x0000000000000000 0x0000000000000000 0x0000000000000000"] * 7))
    number = int(class_, 16)
    # The first 64 bytes of configuration space: what lspci reads.
    config = struct.pack(
        "<HHHHBBBB", int(vendor, 16), int(device, 16), 0x0006, 0x0010, 0xA1, number & 0xFF, number >> 8 & 0xFF, number >> 16
    )
    (path / "config").write_bytes(config.ljust(44, b"\0") + struct.pack("<HH", int(vendor, 16), int(device, 16)) + bytes(16))
    return path


def forget_pci(vendor, keep):
    for path in Path("/sys/bus/pci/devices").iterdir():
        try:
            ours = (path / "vendor").read_text().strip() == vendor and not path.is_symlink()
        except OSError:
            continue
        if ours and path.name not in keep:
            shutil.rmtree(path)


def apply_gpus(machine):
    present = [gpu for gpu in machine["gpus"] if gpu["present"]]
    switches = machine["nvswitches"]
    forget_pci("0x10de", {unit["pci_slot"] for unit in present + switches})
    for gpu in present:
        pci_device(gpu["pci_slot"], "0x10de", gpu["pci_device"], "0x030200", gpu["numa"])
    for switch in switches:
        pci_device(switch["pci_slot"], "0x10de", switch["pci_device"], "0x068000", 0)


def apply_hcas(machine):
    hcas = machine["hcas"]
    classes = Path("/sys/class")
    for name in ("infiniband", "infiniband_verbs", "infiniband_mad"):
        shutil.rmtree(classes / name, ignore_errors=True)
    shutil.rmtree("/dev/infiniband", ignore_errors=True)
    forget_pci("0x15b3", {hca["pci_slot"] for hca in hcas})
    for module in RDMA_MODULES:
        (insert if hcas else remove)(module)
    if not hcas:
        return
    node(Path("/dev/infiniband/rdma_cm"), *RDMA_CM_DEVICE)
    for number, hca in enumerate(hcas):
        apply_hca(number, hca)


def apply_hca(number, hca):
    pci = pci_device(hca["pci_slot"], "0x15b3", hca["pci_device"], "0x020700", hca["numa"])
    (pci / "net").mkdir(exist_ok=True)
    base = Path("/sys/class/infiniband") / hca["name"]
    write(base / "node_guid", hca["guid"])
    write(base / "sys_image_guid", hca["guid"])
    write(base / "node_type", "1: CA")
    write(base / "fw_ver", hca["firmware"])
    write(base / "hca_type", "MT4129")
    write(base / "board_id", "MT_0000000838")
    write(base / "node_desc", f"{os.uname().nodename} {hca['name']}")
    link(base / "device", pci)
    for port in hca["ports"]:
        apply_port(pci, base / "ports" / str(port["port"]), port)
    for kind, minor, folder in (
        ("uverbs", UVERBS_MINOR, "infiniband_verbs"),
        ("umad", UMAD_MINOR, "infiniband_mad"),
        ("issm", ISSM_MINOR, "infiniband_mad"),
    ):
        entry = Path("/sys/class") / folder / f"{kind}{number}"
        write(entry / "ibdev", hca["name"])
        write(entry / "dev", f"{IB_MAJOR}:{minor + number}")
        if kind != "uverbs":
            write(entry / "port", "1")
        link(entry / "device", pci)
        node(Path("/dev/infiniband") / entry.name, IB_MAJOR, minor + number, 0o666 if kind == "uverbs" else 0o600)


def apply_port(pci, path, port):
    for name in ("state", "phys_state", "rate", "link_layer", "lid", "sm_lid"):
        write(path / name, str(port[name]))
    for counter in ("symbol_error", "link_downed", "port_rcv_errors", "port_xmit_wait"):
        write(path / "counters" / counter, "0")
    write(path / "hw_counters" / "out_of_sequence", "0")
    write(path / "pkeys" / "0", "0xffff")
    for gid in port["gids"]:
        write(path / "gids" / str(gid["index"]), gid["gid"])
        if gid["type"]:
            write(path / "gid_attrs" / "types" / str(gid["index"]), gid["type"])
            write(path / "gid_attrs" / "ndevs" / str(gid["index"]), gid["ndev"])
    interface = port["interface"]
    if interface:
        (pci / "net" / interface["name"]).mkdir(parents=True, exist_ok=True)
        ethernet(interface, up=port["state"].startswith("4"))


def ethernet(interface, *, up):
    """The network interface of a RoCE port: a real one, on the lab's network."""
    name = interface["name"]
    if not (Path("/sys/class/net") / name).exists():
        made = subprocess.run(
            ["ip", "link", "add", "link", "eth0", "name", name, "type", "macvlan", "mode", "bridge"], check=False
        )
        if made.returncode != 0:
            print(f"dsv3-lab: no interface {name}: this kernel has no macvlan", file=sys.stderr)
            return
        run("ip", "address", "add", interface["address"], "dev", name)
    run("ip", "link", "set", name, "up" if up else "down")


# ---------------------------------------------------------------- modules


def loaded():
    return json.loads(MODULES.read_text()) if MODULES.exists() else []


def insert(name, version=""):
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


def remove(name):
    names = [other for other in loaded() if other != name]
    write(MODULES, json.dumps(names))
    shutil.rmtree(Path("/sys/module") / name, ignore_errors=True)
    if name in ("nouveau", "nvidia"):
        bind(None)


def bind(driver):
    for gpu in hardware()["gpus"]:
        path = Path("/sys/bus/pci/devices") / gpu["pci_slot"] / "driver"
        if driver and gpu["present"]:
            folder = Path("/sys/bus/pci/drivers") / driver
            folder.mkdir(parents=True, exist_ok=True)
            link(path, folder)
        elif path.is_symlink():
            path.unlink()


def blacklisted(name, *folders):
    for folder in folders:
        for path in sorted(folder.glob("*.conf")) if folder.is_dir() else ():
            for line in path.read_text().splitlines():
                words = line.split("#")[0].split()
                if words[:1] == ["blacklist"] and words[1:2] == [name]:
                    return True
                if words[:2] == ["install", name] and words[2:] and words[2].endswith(("/true", "/false")):
                    return True
    return False


def built_driver():
    """Version and flavour of the newest NVIDIA module that dkms built for this kernel, or None."""
    kernel = os.uname().release
    built = [path.parent for path in DKMS.glob(f"*/{kernel}")] if DKMS.is_dir() else []
    newest = max(built, key=lambda path: [int(part) for part in path.name.split(".")], default=None)
    if newest is None:
        return None
    return {"version": newest.name, "flavour": (newest / kernel / "flavour").read_text().strip()}


def load_nvidia(*, quiet=False):
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
        # nvidia's probe refuses GPUs that another driver holds (dmesg: "NVRM: The NVIDIA probe routine was not called")
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


def nvidia_devices(machine):
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


def unload_nvidia():
    users = [path for path in ("nvidia-persistenced", "nv-fabricmanager") if (Path("/run") / path).exists()]
    if users:
        print(f"modprobe: FATAL: Module nvidia is in use by {', '.join(users)}.", file=sys.stderr)
        return 1
    for name in NVIDIA_MODULES:
        remove(name)
    DRIVER.unlink(missing_ok=True)
    shutil.rmtree("/proc/driver/nvidia", ignore_errors=True)
    for path in Path("/dev").glob("nvidia*"):
        path.unlink()
    return 0


def simulated(name):
    return name in NVIDIA_MODULES or name == "nouveau" or (name in RDMA_MODULES and bool(hardware()["hcas"]))


def load(name):
    if blacklisted(name, Path("/etc/modprobe.d")) and name == "nouveau":
        return 0
    if name in NVIDIA_MODULES:
        code = load_nvidia()
        if code == 0 and name not in loaded():
            insert(name, json.loads(DRIVER.read_text())["version"])
        return code
    insert(name)
    return 0


def unload(name):
    if name == "nvidia":
        return unload_nvidia()
    remove(name)
    return 0


def real(tool, arguments):
    os.execv("/usr/bin/kmod", [tool, *arguments])


def modprobe(arguments):
    names = [word.replace("-", "_") for word in arguments if not word.startswith("-") and "=" not in word]
    if not names or not any(map(simulated, names)):
        real("modprobe", arguments)
    if {"-n", "--dry-run", "--show", "-D", "--show-depends"} & set(arguments):
        return 0
    act = unload if {"-r", "--remove"} & set(arguments) else load
    return max([act(name) for name in names if simulated(name)], default=0)


def lsmod(_arguments):
    print("Module                  Size  Used by")
    for name in reversed(loaded()):
        print(f"{name:<22} 65536  0")
    if Path("/proc/modules").exists():
        sys.stdout.flush()
        subprocess.run("kmod list | tail -n +2", shell=True, check=False)
    return 0


def modinfo(arguments):
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


def modules_load(_arguments):
    """What systemd-modules-load does, for the simulated modules; others belong to the machine's own kernel."""
    for folder in ("/usr/lib/modules-load.d", "/run/modules-load.d", "/etc/modules-load.d"):
        for path in sorted(Path(folder).glob("*.conf")) if Path(folder).is_dir() else ():
            for line in path.read_text().splitlines():
                name = re.split(r"[#;]", line)[0].strip().replace("-", "_")
                if name and simulated(name):
                    load(name)
    return 0


def update_initramfs(_arguments):
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


def main():
    name = Path(sys.argv[0]).name
    arguments = sys.argv[1:]
    if name in ("kernel.py", "kernel"):
        name, *arguments = arguments
    if name == "boot":
        boot()
    if name == "apply":
        return apply()
    return COMMANDS[name](arguments)


if __name__ == "__main__":
    sys.exit(main())
