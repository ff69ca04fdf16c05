#!/usr/bin/python3
"""Read one host's state and print it as JSON. Read-only.

It runs in two ways and needs nothing but Python 3.6 and its standard library:

- as an Ansible module (the marker WANT_JSON makes Ansible pass its arguments in a file), and
- as a plain script, also from standard input: ``ssh HOST python3 - '{"paths": ["/data"]}' < dsv3_probe.py``.

A section that cannot be read is left at its empty value and says why in ``errors``; the probe as a whole
does not fail. The schema is documented in docs/reference/probe-facts.md.
"""

import glob
import hashlib
import json
import os
import re
import shlex
import shutil
import socket
import stat
import struct
import subprocess
import sys
import threading
import time

DOCUMENTATION = """
module: dsv3_probe
short_description: Read the state of a GPU host
description:
  - Reads operating system, memory, disks, network, listening ports, GPUs, HCAs, containers and what an earlier
    deployment left, in one pass.
  - Changes nothing, in check mode or not. What cannot be read is reported, not fatal.
options:
  paths:
    description: Paths whose file systems are measured; a parent stands in for a missing one.
    type: list
    elements: str
    default: []
  reach:
    description: Addresses to connect to over TCP. An answer and a refusal both count as reachable.
    type: list
    elements: dict
    default: []
    suboptions:
      host: {description: Name given back in the result., type: str}
      address: {description: Address to connect to., type: str, required: true}
      port: {description: TCP port to connect to., type: int, required: true}
      source: {description: Local address to connect from; any when empty., type: str}
  model:
    description: Folder of the model's weights, for its config.json.
    type: str
    default: ""
  image:
    description: Engine image. Where the host lacks it, its registry is asked for digest and size.
    type: dict
    default: {}
    suboptions:
      name: {description: Name with tag., type: str, required: true}
      digest: {description: Digest it must have; empty means that of the last deploy., type: str}
      mirrors: {description: Addresses to ask before Docker Hub., type: list, elements: str}
      insecure: {description: Registries that speak plain HTTP., type: list, elements: str}
      ask: {description: Ask for the tag's digest even where an image is there., type: bool}
  only:
    description: Names of the sections to read; all when empty.
    type: list
    elements: str
    default: []
author: [deploy-dsv3]
"""

EXAMPLES = """
- name: Read the host
  dsv3_probe:
    paths: [/var/lib/docker, /data/models]
"""

RETURN = """
dsv3_facts:
  description: What was read; docs/reference/probe-facts.md has the schema.
  returned: always
  type: dict
"""

SCHEMA = 1
NVIDIA_SMI_TIMEOUT_S = 20
GPU_FIELDS = ("index", "name", "uuid", "memory.total", "driver_version")
FABRIC_FIELDS = ("fabric.state", "fabric.status")
DOCKER_TIMEOUT_S = 5
REACH_TIMEOUT_S = 3
REGISTRY_TIMEOUT_S = 5
COMMAND_TIMEOUT_S = 20
NVIDIA = "0x10de"
MELLANOX = "0x15b3"
# PCI class codes, first four digits: VGA and 3D controllers are GPUs, "other bridge" is an NVSwitch.
GPU_CLASSES = ("0x0300", "0x0302")
NVSWITCH_CLASS = "0x0680"
# Controllers of networks: Ethernet and InfiniBand.
NETWORK_CLASSES = ("0x0200", "0x0207")
RDMA_MODULES = ("ib_core", "ib_umad", "ib_uverbs", "mlx5_ib", "nvidia_peermem", "rdma_ucm")
MANAGED_LABEL = "io.deploy-dsv3.managed"
CONFIG = "etc/deploy-dsv3"
KEPT = "var/lib/deploy-dsv3"
ENDPOINT_STAMP = "run/dsv3-endpoint/loaded"
LAST_RUNS = 5
MODEL_CONFIG_LIMIT = 1 << 20
# Besides CONFIG: files that roles write elsewhere, and drop-ins that change what our services do.
FILES = (
    "etc/apt/keyrings/deploy-dsv3-*",
    "etc/apt/sources.list.d/deploy-dsv3-*",
    "etc/apt/apt.conf.d/deploy-dsv3-*",
    "etc/yum.repos.d/deploy-dsv3-*",
    "etc/systemd/system/dsv3-*.service",
    "etc/systemd/system/dsv3-*.service.d/*",
    "etc/systemd/system/docker.service.d/*",
    "etc/systemd/system/nvidia-*.service.d/*",
    "etc/modprobe.d/deploy-dsv3-*",
    "etc/modules-load.d/deploy-dsv3-*",
    "etc/sysctl.d/*deploy-dsv3*",
    "etc/cdi/*",
)
UNITS = (
    "docker.service",
    "dsv3-endpoint.service",
    "dsv3-engine.service",
    "nvidia-persistenced.service",
    "nvidia-fabricmanager.service",
)
PACKAGES = (
    "nvidia-*",
    "libnvidia-*",
    "cuda-drivers*",
    "docker.io",
    "docker-cli",
    "docker-ce*",
    "containerd*",
    "haproxy",
    "rdma-core",
    "ibverbs-*",
    "libibverbs*",
)
# What hundreds of processes with pinned memory depend on, and what decides where their connections go.
SYSCTLS = (
    "kernel.numa_balancing",
    "kernel.pid_max",
    "kernel.shmall",
    "kernel.shmmax",
    "net.core.rmem_max",
    "net.core.somaxconn",
    "net.core.wmem_max",
    "net.ipv4.conf.all.rp_filter",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_wmem",
    "vm.max_map_count",
    "vm.nr_hugepages",
    "vm.overcommit_memory",
    "vm.swappiness",
)
# Any other variable may be a secret: only a hash of it leaves the host.
PLAIN_VARIABLES = ("NCCL_", "GLOO_", "RAY_", "LMDEPLOY_", "HF_HUB_", "CUDA_", "NVIDIA_", "UCX_")
TOKEN_VARIABLE = "RAY_AUTH_TOKEN"
CONTAINER_ID = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")


def read(*parts):
    """Return the stripped text of a file, or "" when it is absent or cannot be read."""
    try:
        with open(os.path.join(*parts), encoding="utf-8", errors="replace") as handle:
            return handle.read().strip()
    except OSError:
        return ""


def entries(*parts):
    """Return the sorted names in a directory, none when it is absent. Numbers sort by value."""
    try:
        names = os.listdir(os.path.join(*parts))
    except OSError:
        return []
    return sorted(names, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])


def integer(text, default=0):
    """Return `text` as an int, `default` when it is not one."""
    try:
        return int(text, 0) if text.startswith("0x") else int(text)
    except ValueError:
        return default


def key_values(text):
    """Return the assignments of an os-release file, unquoted."""
    values = {}
    for line in text.splitlines():
        key, separator, value = line.partition("=")
        if separator and not key.startswith("#"):
            words = shlex.split(value)
            values[key.strip()] = words[0] if words else ""
    return values


def probe_os(root):
    """Return the operating system, its family, kernel and init."""
    release = key_values(read(root, "etc/os-release") or read(root, "usr/lib/os-release"))
    like = [release.get("ID", ""), *release.get("ID_LIKE", "").split()]
    family = "other"
    if "debian" in like or "ubuntu" in like:
        family = "Debian"
    elif "rhel" in like or "fedora" in like or "centos" in like:
        family = "RedHat"
    uname = os.uname()
    return {
        "id": release.get("ID", ""),
        "version_id": release.get("VERSION_ID", ""),
        "codename": release.get("VERSION_CODENAME", ""),
        "family": family,
        "arch": uname.machine,
        "kernel": uname.release,
        "init": "systemd" if os.path.isdir(os.path.join(root, "run/systemd/system")) else "other",
        "python": ".".join(str(part) for part in sys.version_info[:3]),
        "secure_boot": secure_boot(root),
    }


def secure_boot(root):
    """Return whether firmware enforces signed kernel modules; None where there is no such firmware."""
    for path in glob.glob(os.path.join(root, "sys/firmware/efi/efivars/SecureBoot-*")):
        with open(path, "rb") as handle:
            content = handle.read()
        return bool(content) and content[-1:] == b"\x01"  # four bytes of attributes, then the value
    return None


def probe_connection(root):
    """Return the address that SSH came in on: sudo drops it, a parent process still has it."""
    pid = os.getpid()
    while pid > 1:
        environment = read(root, "proc", str(pid), "environ").split("\0")
        found = [entry.split() for entry in environment if entry.startswith("SSH_CONNECTION=")]
        if found and len(found[0]) == 4:
            return {"server_address": found[0][2]}
        # The name, in parentheses, may hold spaces; state and parent follow it.
        pid = integer(read(root, "proc", str(pid), "stat").rpartition(")")[2].split()[1])
    return {"server_address": ""}


def probe_memory(root):
    """Return total and available memory in bytes."""
    sizes = {}
    for line in read(root, "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        sizes[name] = integer(value.split()[0]) * 1024
    return {"total_bytes": sizes.get("MemTotal", 0), "available_bytes": sizes.get("MemAvailable", 0)}


def probe_disks(root, paths):
    """Return size and free space of the file system that holds (or would hold) each path."""
    disks = []
    for path in paths:
        existing = path
        while existing not in ("/", "") and not os.path.exists(os.path.join(root, existing.lstrip("/"))):
            existing = os.path.dirname(existing)
        stat = os.statvfs(os.path.join(root, existing.lstrip("/")))
        disks.append(
            {
                "path": path,
                "exists_path": existing,
                "total_bytes": stat.f_frsize * stat.f_blocks,
                "free_bytes": stat.f_frsize * stat.f_bavail,
            }
        )
    return disks


def interface_kind(directory):
    """Return what kind of network interface a /sys/class/net entry is."""
    kind = integer(read(directory, "type"), -1)
    device_type = re.search(r"^DEVTYPE=(\w+)", read(directory, "uevent"), re.MULTILINE)
    if kind == 772:
        return "loopback"
    if os.path.isdir(os.path.join(directory, "bonding")):
        return "bond"
    if os.path.isdir(os.path.join(directory, "bridge")):
        return "bridge"
    if device_type and device_type.group(1) in ("vlan", "bond", "bridge"):
        return device_type.group(1)
    if kind == 32:
        return "infiniband"
    if "/devices/virtual/" in os.path.realpath(directory):
        return "virtual"
    return "physical"


def probe_interfaces(root, addresses):
    """Return the interfaces of /sys/class/net with the addresses given by interface name."""
    base = os.path.join(root, "sys/class/net")
    interfaces = []
    for name in entries(base):
        directory = os.path.join(base, name)
        if not os.path.isdir(directory):  # /sys/class/net/bonding_masters is a file
            continue
        interfaces.append(
            {
                "name": name,
                "mac": read(directory, "address"),
                "mtu": integer(read(directory, "mtu")),
                "operstate": read(directory, "operstate"),
                "kind": interface_kind(directory),
                "speed_mbps": max(integer(read(directory, "speed")), 0),  # -1 when the link is down
                "addresses": addresses.get(name, []),
            }
        )
    return interfaces


def ip_json(*arguments):
    """Return what `ip -j` prints, None when iproute2 is missing or too old for JSON."""
    command = shutil.which("ip", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if command is None:
        return None
    done = subprocess.run([command, "-j", *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=5)
    try:
        return json.loads(done.stdout.decode() or "[]") if done.returncode == 0 else None
    except ValueError:
        return None


def addresses_from_ip(links):
    """Return addresses by interface name from the output of `ip -j addr`."""
    return {
        link["ifname"]: [
            {
                "address": entry["local"],
                "prefix": entry["prefixlen"],
                "family": entry["family"],
                "scope": entry.get("scope", ""),
            }
            for entry in link.get("addr_info", [])
            if "local" in entry
        ]
        for link in links
        if "ifname" in link
    }


def ipv4_scope(address):
    """Return the scope that the kernel gives an IPv4 address."""
    if address.startswith("127."):
        return "host"
    return "link" if address.startswith("169.254.") else "global"


def addresses_from_kernel(root):
    """Return addresses by interface name without iproute2: the primary IPv4 address and all of IPv6."""
    import fcntl

    def ask(request, name):
        packed = struct.pack("256s", name.encode()[:15])
        return socket.inet_ntoa(fcntl.ioctl(handle.fileno(), request, packed)[20:24])

    addresses = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        for name in entries(root, "sys/class/net"):
            try:
                address, mask = ask(0x8915, name), ask(0x891B, name)  # SIOCGIFADDR, SIOCGIFNETMASK
            except OSError:
                continue
            prefix = bin(struct.unpack("!I", socket.inet_aton(mask))[0]).count("1")
            addresses[name] = [{"address": address, "prefix": prefix, "family": "inet", "scope": ipv4_scope(address)}]
    for line in read(root, "proc/net/if_inet6").splitlines():
        raw, _, prefix, scope, _, name = line.split()
        addresses.setdefault(name, []).append(
            {
                "address": socket.inet_ntop(socket.AF_INET6, bytes.fromhex(raw)),
                "prefix": int(prefix, 16),
                "family": "inet6",
                "scope": {"00": "global", "10": "host", "20": "link"}.get(scope, scope),
            }
        )
    return addresses


def routes_from_ip(routes, default):
    """Return routes from the output of `ip -j route`; `default` is the network of the default route."""
    return [
        {
            "destination": default if route["dst"] == "default" else route["dst"],
            "interface": route["dev"],
            "source": route.get("prefsrc", ""),
            "gateway": route.get("gateway", ""),
            "metric": route.get("metric", 0),
        }
        for route in routes
        if "dst" in route and "dev" in route and route.get("type", "unicast") == "unicast"
    ]


def routes_from_kernel(root):
    """Return the IPv4 routes of /proc/net/route."""

    def dotted(word):
        return socket.inet_ntoa(struct.pack("=I", int(word, 16)))

    routes = []
    for line in read(root, "proc/net/route").splitlines()[1:]:
        name, destination, gateway, flags, _, _, metric, mask = line.split()[:8]
        if int(flags, 16) & 0x201 != 0x1:  # up, and not a rejecting route
            continue
        prefix = bin(int(mask, 16)).count("1")
        routes.append(
            {
                "destination": "%s/%d" % (dotted(destination), prefix),
                "interface": name,
                "source": "",
                "gateway": "" if gateway == "00000000" else dotted(gateway),
                "metric": int(metric),
            }
        )
    return routes


def probe_network(root, ask=ip_json):
    """Return interfaces with their addresses, and routes of the main table.

    `ask` runs iproute2 with the words given and returns its JSON, None when there is no such answer.
    """
    links, routes, routes6 = ask("addr", "show"), ask("route", "show"), ask("-6", "route", "show")
    addresses = addresses_from_kernel(root) if links is None else addresses_from_ip(links)
    ipv4 = routes_from_kernel(root) if routes is None else routes_from_ip(routes, "0.0.0.0/0")
    return {
        "interfaces": probe_interfaces(root, addresses),
        "routes": ipv4 + routes_from_ip(routes6 or [], "::/0"),
    }


def socket_address(text):
    """Return (address, port) of a /proc/net/tcp or tcp6 local_address column."""
    raw, port = text.split(":")
    # Each 32-bit word is printed in host byte order.
    packed = b"".join(struct.pack("=I", int(raw[i : i + 8], 16)) for i in range(0, len(raw), 8))
    return socket.inet_ntop(socket.AF_INET6 if len(packed) == 16 else socket.AF_INET, packed), int(port, 16)


def socket_owners(root, inodes):
    """Return the pid that holds each of the socket inodes, as far as this user may see."""
    owners = {}
    wanted = {"socket:[%s]" % inode: inode for inode in inodes}
    for pid in entries(root, "proc"):
        if not pid.isdigit():
            continue
        directory = os.path.join(root, "proc", pid, "fd")
        try:
            descriptors = os.listdir(directory)
        except OSError:
            continue
        for descriptor in descriptors:
            try:
                target = os.readlink(os.path.join(directory, descriptor))
            except OSError:
                continue
            if target in wanted:
                owners.setdefault(wanted[target], int(pid))
        if len(owners) == len(wanted):
            break
    return owners


def process_home(root, pid):
    """Return (container id, systemd unit) of a process from its control groups; "" for none."""
    lines = read(root, "proc", str(pid), "cgroup").splitlines()
    # The unified hierarchy (0::) is what systemd and a current Docker use; older ones have several.
    lines.sort(key=lambda line: not line.startswith("0::"))
    container = unit = ""
    for line in lines:
        path = line.split(":", 2)[-1]
        container = container or (CONTAINER_ID.findall(path) or [""])[-1]
        units = [part for part in path.split("/") if part.endswith(".service")]
        unit = unit or (units[-1] if units else "")
    return container, unit


def probe_listening(root):
    """Return every listening TCP socket with the process, container and unit that own it."""
    found = []
    for table in ("proc/net/tcp", "proc/net/tcp6"):
        for line in read(root, table).splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A":
                found.append((socket_address(columns[1]), columns[9]))
    owners = socket_owners(root, {inode for _, inode in found}) if found else {}
    listening = []
    for (address, port), inode in found:
        pid = owners.get(inode, 0)
        container, unit = process_home(root, pid) if pid else ("", "")
        listening.append(
            {
                "address": address,
                "port": port,
                "process": read(root, "proc", str(pid), "comm") if pid else "",
                "pid": pid,
                "container_id": container,
                "unit": unit,
            }
        )
    return sorted(listening, key=lambda entry: (entry["port"], entry["address"]))


def probe_pci(root):
    """Return NVIDIA's PCI devices of the GPU and NVSwitch classes; needs no driver."""
    base = os.path.join(root, "sys/bus/pci/devices")
    gpus, switches = [], []
    for slot in entries(base):
        if read(base, slot, "vendor") != NVIDIA:
            continue
        code = read(base, slot, "class")
        entry = {"slot": slot, "vendor": NVIDIA, "device": read(base, slot, "device"), "class": code}
        if code.startswith(GPU_CLASSES):
            gpus.append(entry)
        elif code.startswith(NVSWITCH_CLASS):
            switches.append(entry)
    return {"pci_gpus": gpus, "pci_nvswitches": switches}


def probe_nvidia_smi(root):
    """Return the GPUs that nvidia-smi lists, how calling it ended, and with NVSwitches the state of their fabric.

    It is asked once: on a host with eight GPUs a call takes a second. A driver before R525 knows no fabric.
    """
    path = shutil.which("nvidia-smi", path=os.environ.get("PATH", "") + ":/usr/bin:/usr/local/bin") or ""
    switched = bool(probe_pci(root)["pci_nvswitches"])
    answer = {
        "gpus": [],
        "nvidia_smi": {"path": path, "rc": -1, "error": ""},
        "fabric": {"state": "", "status": ""} if switched else None,
    }
    if not path:
        return answer
    try:
        rc, output = query_gpus(path, GPU_FIELDS + FABRIC_FIELDS if switched else GPU_FIELDS)
        if switched and rc != 0 and "not a valid field" in output:
            rc, output = query_gpus(path, GPU_FIELDS)
    except subprocess.TimeoutExpired:
        answer["nvidia_smi"]["error"] = "no answer within %d s" % NVIDIA_SMI_TIMEOUT_S
        return answer
    answer["nvidia_smi"]["rc"] = rc
    if rc != 0:
        answer["nvidia_smi"]["error"] = output[-500:]
        return answer
    rows = [[column.strip() for column in line.split(",")] for line in output.splitlines()]
    answer["gpus"] = [
        {
            "index": integer(row[0]),
            "name": row[1],
            "uuid": row[2],
            "memory_total_mib": integer(row[3]),
            "driver_version": row[4],
        }
        for row in rows
        if len(row) in (len(GPU_FIELDS), len(GPU_FIELDS + FABRIC_FIELDS))
    ]
    fabrics = [row[len(GPU_FIELDS) :] for row in rows if len(row) == len(GPU_FIELDS + FABRIC_FIELDS)]
    if fabrics:
        # That of the first GPU that is behind the others.
        behind = [fabric for fabric in fabrics if fabric != ["Completed", "Success"]]
        state, status = (behind or fabrics)[0]
        answer["fabric"] = {"state": state, "status": status}
    return answer


def query_gpus(path, fields):
    """Return exit status and output of nvidia-smi, asked for these fields of every GPU."""
    done = subprocess.run(
        [path, "--query-gpu=" + ",".join(fields), "--format=csv,noheader,nounits"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=NVIDIA_SMI_TIMEOUT_S,
    )
    return done.returncode, done.stdout.decode(errors="replace").strip()


def probe_driver(root, ask=None):
    """Return version and flavour of the loaded NVIDIA kernel module, the version that is installed, and nouveau.

    `ask` as in `probe_units`.
    """
    told = read(root, "proc/driver/nvidia/version")
    version = read(root, "sys/module/nvidia/version")
    if not version:
        match = re.search(r"Kernel Module.*?(\d+\.\d+(?:\.\d+)?)", told)
        version = match.group(1) if match else ""
    flavour = "open" if "Open Kernel Module" in told else "proprietary" if told else ""
    return {
        "loaded_version": version,
        "flavour": flavour if version else "",
        "installed_version": (ask or run)("modinfo", "--field", "version", "nvidia").strip(),
        "nouveau_loaded": os.path.isdir(os.path.join(root, "sys/module/nouveau")),
    }


def probe_port(base, device, port):
    """Return one HCA port with its state, rate in Gb/s and GID table."""
    directory = os.path.join(base, device, "ports", port)
    rate = re.match(r"[\d.]+", read(directory, "rate"))
    gids = []
    for index in entries(directory, "gids"):
        gid = read(directory, "gids", index)
        if not gid.replace(":", "").strip("0"):
            continue  # an empty slot
        gids.append(
            {
                "index": int(index),
                "gid": gid,
                "type": read(directory, "gid_attrs/types", index),
                "ndev": read(directory, "gid_attrs/ndevs", index),
            }
        )
    netdevs = {gid["ndev"] for gid in gids if gid["ndev"]}
    for name in entries(base, device, "device/net"):
        # Two ports of one PCI function tell their interfaces apart by dev_port.
        if integer(read(base, device, "device/net", name, "dev_port")) in (0, int(port) - 1):
            netdevs.add(name)
    return {
        "device": device,
        "port": int(port),
        "model": read(base, device, "hca_type"),
        "state": read(directory, "state").partition(": ")[2],
        "phys_state": read(directory, "phys_state").partition(": ")[2],
        "rate_gbps": float(rate.group(0)) if rate else 0.0,
        "link_layer": read(directory, "link_layer"),
        "netdevs": sorted(netdevs),
        "gids": gids,
    }


def probe_infiniband(root, ask=None):
    """Return the device files of /dev/infiniband, every port of every HCA, and the software that drives them.

    `ask` as in `probe_units`.
    """
    base = os.path.join(root, "sys/class/infiniband")
    files = os.path.join(root, "dev/infiniband")
    bus = os.path.join(root, "sys/bus/pci/devices")
    return {
        # rdma-core also makes the directories by-ibdev and by-path there.
        "devices": [name for name in entries(files) if not os.path.isdir(os.path.join(files, name))],
        "ports": [
            probe_port(base, device, port) for device in entries(base) for port in entries(base, device, "ports")
        ],
        "pci_hcas": sum(
            read(bus, slot, "vendor") == MELLANOX and read(bus, slot, "class").startswith(NETWORK_CLASSES)
            for slot in entries(bus)
        ),
        "modules": [name for name in RDMA_MODULES if os.path.isdir(os.path.join(root, "sys/module", name))],
        # MLNX_OFED and DOCA-OFED both bring this command.
        "ofed": (ask or run)("ofed_info", "-s").strip().rstrip(":"),
    }


def docker_get(path, resource):
    """Return the decoded answer of the Docker engine's API on its unix socket."""
    from http.client import HTTPConnection

    connection = HTTPConnection("localhost", timeout=DOCKER_TIMEOUT_S)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.settimeout(DOCKER_TIMEOUT_S)
    try:
        connection.sock.connect(path)
        connection.request("GET", resource)
        answer = connection.getresponse()
        body = answer.read().decode()
        if answer.status != 200:
            raise ValueError("%s answered %d: %s" % (resource, answer.status, body[:200]))
        return json.loads(body)
    finally:
        connection.close()


def probe_daemon_json(root):
    """Return (settings, error) of /etc/docker/daemon.json: (None, "") when there is none."""
    path = os.path.join(root, "etc/docker/daemon.json")
    try:
        with open(path, encoding="utf-8") as handle:
            text = handle.read()
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError) as error:
        return None, str(error)
    if not text.strip():
        return {}, ""  # dockerd takes an empty file for no settings
    try:
        settings = json.loads(text)
    except ValueError as error:
        return None, str(error)
    if not isinstance(settings, dict):
        return None, "a JSON object is expected, found %s" % type(settings).__name__
    return settings, ""


def sha256(text):
    """Return the hash of a text as `sha256:...`."""
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def shown_variable(name, value):
    """Return the value of an environment variable, or its hash where it may be a secret."""
    return value if name.startswith(PLAIN_VARIABLES) and name != TOKEN_VARIABLE else sha256(value)


def container_config(inspect):
    """Return how a container was made, from `docker inspect`: what a person could have made otherwise."""
    host, config = inspect["HostConfig"], inspect["Config"]
    variables = dict(entry.split("=", 1) for entry in config.get("Env") or [] if "=" in entry)
    log = host.get("LogConfig") or {}
    requests = [
        "%s: %s" % (request.get("Driver") or "", ", ".join(request.get("DeviceIDs") or []))
        for request in host.get("DeviceRequests") or []
    ]
    return {
        "image": config.get("Image") or "",
        "image_id": inspect.get("Image") or "",
        "command": [*(config.get("Entrypoint") or []), *(config.get("Cmd") or [])],
        "user": config.get("User") or "",
        "environment": {name: shown_variable(name, value) for name, value in sorted(variables.items())},
        "devices": sorted(device["PathOnHost"] for device in host.get("Devices") or []),
        "device_requests": sorted(requests),
        "mounts": sorted(host.get("Binds") or []),
        "ulimits": sorted("%(Name)s:%(Soft)s:%(Hard)s" % limit for limit in host.get("Ulimits") or []),
        "capabilities": sorted(host.get("CapAdd") or []),
        "privileged": bool(host.get("Privileged")),
        "ipc_mode": host.get("IpcMode") or "",
        "network_mode": host.get("NetworkMode") or "",
        "pid_mode": host.get("PidMode") or "",
        "memory_bytes": host.get("Memory") or 0,
        "cpus": host.get("CpusetCpus") or "",
        "restart_policy": (host.get("RestartPolicy") or {}).get("Name") or "",
        "log": dict(log.get("Config") or {}, driver=log.get("Type") or ""),
        "init": bool(host.get("Init")),
        "stop_timeout_s": config.get("StopTimeout") or 0,
        "healthcheck": " ".join((config.get("Healthcheck") or {}).get("Test") or []),
        "labels": dict(sorted((config.get("Labels") or {}).items())),
    }


def probe_docker(root):
    """Return the Docker engine's version, data directory, daemon.json, images and all containers."""
    settings, error = probe_daemon_json(root)
    path = os.path.join(root, "var/run/docker.sock")
    answer = {
        "installed": any(
            os.path.exists(os.path.join(root, directory, "dockerd"))
            for directory in ("usr/bin", "usr/sbin", "usr/local/bin")
        ),
        "version": "",
        "running": False,
        "root_dir": "",
        "error": "",
        "daemon_json": settings,
        "daemon_json_error": error,
        "images": [],
        "containers": [],
    }
    if not os.path.exists(path):
        return answer
    try:
        answer["version"] = docker_get(path, "/version").get("Version", "")
        answer["running"] = True
        answer["root_dir"] = docker_get(path, "/info").get("DockerRootDir", "")
        for entry in docker_get(path, "/images/json"):
            image = {"id": entry["Id"], "size_bytes": entry.get("Size") or 0}
            image["names"] = [*(entry.get("RepoTags") or []), *(entry.get("RepoDigests") or [])]
            answer["images"].append(image)
        for entry in docker_get(path, "/containers/json?all=1"):
            labels = entry.get("Labels") or {}
            started, config = "", None
            if labels.get(MANAGED_LABEL) == "true":
                inspect = docker_get(path, "/containers/%s/json" % entry["Id"])
                started, config = inspect["State"].get("StartedAt", ""), container_config(inspect)
            answer["containers"].append(
                {
                    "name": (entry.get("Names") or ["/"])[0].lstrip("/"),
                    "id": entry["Id"],
                    "image": entry.get("Image", ""),
                    "image_id": entry.get("ImageID", ""),
                    "labels": labels,
                    "state": entry.get("State", ""),
                    "started_at": started,
                    "config": config,
                }
            )
    except (OSError, ValueError, KeyError) as problem:
        answer["error"] = "%s: %s" % (path, problem)
    return answer


def probe_cdi(root):
    """Return the CDI specifications that a container engine would read."""
    specs = []
    for directory in ("etc/cdi", "var/run/cdi"):
        specs += [
            "/%s/%s" % (directory, name)
            for name in entries(root, directory)
            if name.endswith((".json", ".yaml", ".yml"))
        ]
    return {"specs": specs}


def document(*parts):
    """Return the JSON object of a file, None without one; a broken one says why under `error`."""
    text = read(*parts)
    if not text:
        return None
    try:
        content = json.loads(text)
    except ValueError as error:
        return {"error": str(error)}
    return content if isinstance(content, dict) else {"error": "a JSON object is expected"}


def probe_deployment(root):
    """Return what runs of deploy-dsv3 left: records, the launcher's files and state, lock and last runs."""
    runs = []
    for line in read(root, KEPT, "history.jsonl").splitlines()[-LAST_RUNS:]:
        try:
            runs.append(json.loads(line))
        except ValueError:
            continue  # a write that was cut off
    return {
        "release": document(root, CONFIG, "release.json"),
        "image": document(root, CONFIG, "image.json"),
        "node_file": document(root, CONFIG, "engine/node.json"),
        "serve_file": document(root, CONFIG, "engine/serve.json"),
        "manifest": document(root, CONFIG, "manifest.json"),
        "status": document(root, KEPT, "state/status.json"),
        "lock": document(root, KEPT, "lock.json"),
        "runs": runs,
        "endpoint": os.path.exists(os.path.join(root, CONFIG, "endpoint/haproxy.cfg")),
    }


def file_state(path):
    """Return mode, owner and hash of a file, or the target of a link."""
    about = os.lstat(path)
    state = {
        "mode": "%04o" % stat.S_IMODE(about.st_mode),
        "owner": "%d:%d" % (about.st_uid, about.st_gid),
        "sha256": "",
        "link": "",
    }
    if stat.S_ISLNK(about.st_mode):
        state["link"] = os.readlink(path)
    else:
        with open(path, "rb") as handle:
            state["sha256"] = hashlib.sha256(handle.read()).hexdigest()
    return state


def probe_files(root):
    """Return the state of every file of a deployment by path; nothing but the hash of a secret."""
    paths = [path for pattern in FILES for path in glob.glob(os.path.join(root, pattern))]
    for folder, _, names in os.walk(os.path.join(root, CONFIG)):
        paths += [os.path.join(folder, name) for name in names]
    found = {}
    for path in sorted(paths):
        name = "/" + os.path.relpath(path, root)
        if name != "/%s/manifest.json" % CONFIG and not os.path.isdir(path):
            found[name] = file_state(path)
    return found


def run(*command):
    """Return what a command prints, "" when it is missing; its exit status does not matter."""
    path = shutil.which(command[0], path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    if path is None:
        return ""
    done = subprocess.run(
        [path, *command[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        timeout=COMMAND_TIMEOUT_S,
        env=dict(os.environ, LC_ALL="C"),
    )
    return done.stdout.decode(errors="replace")


def newer_than(path, folder):
    """Return whether a file in a folder, or the target of a link there, was written after `path` was."""
    if not os.path.exists(path):
        return False
    files = [os.path.join(folder, name) for name in entries(folder)]
    return any(os.path.isfile(name) and os.stat(name).st_mtime > os.stat(path).st_mtime for name in files)


def probe_units(root="/", ask=run):
    """Return the services of a deployment that exist on this host: whether active and enabled.

    The endpoint touches a file when it reads its configuration.
    """
    units = {}
    shown = ask("systemctl", "show", "--property=Id,LoadState,ActiveState,UnitFileState", *UNITS)
    for block in shown.split("\n\n"):
        values = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        if values.get("LoadState") in ("loaded", "masked"):
            units[values["Id"]] = {
                "active": values.get("ActiveState", ""),
                "enabled": values.get("UnitFileState", ""),
                "reload_due": values["Id"] == "dsv3-endpoint.service"
                and newer_than(os.path.join(root, ENDPOINT_STAMP), os.path.join(root, CONFIG, "endpoint")),
            }
    return units


def probe_packages(family, ask=run):
    """Return the versions of the installed packages of interest by name."""
    if family == "RedHat":
        listing = ask("rpm", "-qa", "--queryformat", "%{NAME} %{VERSION}-%{RELEASE} installed\n", *PACKAGES)
    else:
        columns = "${Package} ${Version} ${db:Status-Status}\n"
        listing = ask("dpkg-query", "--show", "--showformat=" + columns, *PACKAGES)
    rows = [line.split() for line in listing.splitlines()]
    return {row[0]: row[1] for row in rows if len(row) == 3 and row[2] == "installed"}


def probe_sysctls(root):
    """Return the kernel settings of interest that this kernel has, blanks made single."""
    paths = {name: os.path.join(root, "proc/sys", name.replace(".", "/")) for name in SYSCTLS}
    return {name: " ".join(read(path).split()) for name, path in paths.items() if os.path.exists(path)}


def probe_state(root):
    """Return the files, services, packages and kernel settings that a person could change by hand."""
    return {
        "files": probe_files(root),
        "units": probe_units(root),
        "packages": probe_packages(probe_os(root)["family"]),
        "sysctls": probe_sysctls(root),
    }


def probe_model(root, path):
    """Return the numbers and names in the model's config.json; None where there is none."""
    text = read(root, path.lstrip("/"), "config.json")
    if not text or len(text) > MODEL_CONFIG_LIMIT:
        return None
    config = json.loads(text)
    kept = {key: value for key, value in config.items() if isinstance(value, (int, float, str))}
    method = (config.get("quantization_config") or {}).get("quant_method")
    return dict(kept, quantization_config={"quant_method": method}) if method else kept


def split_image(name):
    """Return (registry, repository, tag) of an image's name as Docker reads it; "" is Docker Hub."""
    name = name.partition("@")[0]
    first, slash, rest = name.partition("/")
    registry = first if slash and ("." in first or ":" in first or first == "localhost") else ""
    path = rest if registry else name
    repository, colon, tag = path.rpartition(":")
    repository, tag = (repository, tag) if colon else (path, "latest")
    return registry, repository if registry or slash else "library/" + repository, tag


def registry_get(url, headers):
    """Return (headers, JSON) of a registry's answer; fetches the anonymous token that it may want first."""
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    try:
        with urlopen(Request(url, headers=headers), timeout=REGISTRY_TIMEOUT_S) as answer:
            return answer.headers, json.loads(answer.read().decode())
    except HTTPError as error:
        wish = error.headers.get("WWW-Authenticate", "")
        if error.code != 401 or "Authorization" in headers or not wish.lower().startswith("bearer "):
            raise
    fields = dict(re.findall(r'(\w+)="([^"]*)"', wish))
    where = "%s?service=%s&scope=%s" % (fields["realm"], fields.get("service", ""), fields.get("scope", ""))
    with urlopen(where, timeout=REGISTRY_TIMEOUT_S) as answer:
        token = json.loads(answer.read().decode())
    bearer = "Bearer %s" % (token.get("token") or token["access_token"])
    return registry_get(url, dict(headers, Authorization=bearer))


def registry_image(base, repository, reference, get=registry_get):
    """Return (digest, bytes to download) of an image in a registry for this host's architecture."""
    kinds = ("docker.distribution.manifest.list.v2", "docker.distribution.manifest.v2")
    kinds += ("oci.image.index.v1", "oci.image.manifest.v1")
    accept = {"Accept": ", ".join("application/vnd.%s+json" % kind for kind in kinds)}
    url = "%s/v2/%s/manifests/" % (base.rstrip("/"), repository)
    headers, manifest = get(url + reference, accept)
    digest = headers.get("Docker-Content-Digest", "")
    if "manifests" in manifest:
        machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine)
        fitting = [
            entry["digest"]
            for entry in manifest["manifests"]
            if (entry.get("platform") or {}).get("architecture") == machine
        ]
        _, manifest = get(url + fitting[0], accept)
    parts = {part["digest"]: part["size"] for part in [manifest["config"], *manifest["layers"]]}
    return digest, sum(parts.values())


def probe_registry(root, image, known):
    """Return what the registry says of an image that is not among the `known` ones; None if it is there."""
    registry, repository, tag = split_image(image["name"])
    recorded = document(root, CONFIG, "image.json") or {}
    digest = image.get("digest") or (recorded.get("digest") if recorded.get("name") == image["name"] else "")
    if digest and not image.get("ask") and any(name.endswith("@" + digest) for name in known):
        return None
    bases = [*(image.get("mirrors") or []), "https://registry-1.docker.io"]
    if registry:
        bases = ["http%s://%s" % ("" if registry in (image.get("insecure") or []) else "s", registry)]
    errors = []
    for base in bases:
        try:
            found, size = registry_image(base, repository, tag if image.get("ask") else digest or tag)
            return {"registry": base, "digest": found, "bytes": size, "error": ""}
        except Exception as error:  # the next one may have it
            errors.append("%s: %s" % (base, error))
    return {"registry": "", "digest": "", "bytes": 0, "error": "; ".join(errors)}


def known_images(facts):
    """Return every name of every image that the section `docker` found."""
    return [name for image in facts.get("docker", {}).get("images", []) for name in image["names"]]


def connect(target, results, position):
    """Try one TCP connection and store its outcome at `position` of `results`."""
    address, port = str(target["address"]), int(target["port"])
    outcome = {
        "host": target.get("host", ""),
        "address": address,
        "port": port,
        "reachable": True,
        "error": "",
    }
    source = (str(target["source"]), 0) if target.get("source") else None
    try:
        socket.create_connection((address, port), REACH_TIMEOUT_S, source).close()
    except ConnectionRefusedError:
        pass  # the host answered that nobody listens there: it is reachable
    except OSError as error:
        outcome["reachable"] = False
        outcome["error"] = str(error)
    results[position] = outcome


def probe_reach(targets):
    """Return for each target whether its host answers, all tried at the same time."""
    results = [None] * len(targets)
    threads = [
        threading.Thread(target=connect, args=(target, results, position)) for position, target in enumerate(targets)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [result for result in results if result is not None]


def probe(arguments, root="/", ask=ip_json):
    """Return the facts of this host.

    `arguments` are the module's options; `root` stands for "/"; `ask` as in `probe_network`.
    """
    only = arguments.get("only") or []
    facts = {
        "schema": SCHEMA,
        "time": time.time(),
        "hostname": socket.gethostname(),
        "machine_id": read(root, "etc/machine-id"),
        "boot_id": read(root, "proc/sys/kernel/random/boot_id"),
        "user": {"uid": os.geteuid()},
        "errors": {},
    }
    sections = [
        ("os", lambda: {"os": probe_os(root)}),
        ("connection", lambda: {"connection": probe_connection(root)}),
        ("memory", lambda: {"memory": probe_memory(root)}),
        ("cpus", lambda: {"cpus": os.sysconf("SC_NPROCESSORS_ONLN")}),
        ("disks", lambda: {"disks": probe_disks(root, arguments.get("paths") or [])}),
        ("network", lambda: {"network": probe_network(root, ask)}),
        ("listening", lambda: {"listening": probe_listening(root)}),
        ("pci", lambda: probe_pci(root)),
        ("gpus", lambda: probe_nvidia_smi(root)),
        ("driver", lambda: {"driver": probe_driver(root)}),
        ("infiniband", lambda: {"infiniband": probe_infiniband(root)}),
        ("docker", lambda: {"docker": probe_docker(root)}),
        ("cdi", lambda: {"cdi": probe_cdi(root)}),
        ("deployment", lambda: {"deployment": probe_deployment(root)}),
        ("state", lambda: {"state": probe_state(root)}),
        ("model", lambda: {"model": probe_model(root, arguments["model"])}),
        ("registry", lambda: {"registry": probe_registry(root, arguments["image"], known_images(facts))}),
        ("reach", lambda: {"reach": probe_reach(arguments.get("reach") or [])}),
    ]
    options = {"reach": "reach", "model": "model", "registry": "image"}
    for name, section in sections:
        if (only and name not in only) or (name in options and not arguments.get(options[name])):
            continue
        try:
            facts.update(section())
        except Exception as error:  # one unreadable section must not hide the others
            facts["errors"][name] = "%s: %s" % (type(error).__name__, error)
    facts["time_end"] = time.time()
    return facts


def read_arguments(argv):
    """Return the options from the command line: a JSON object, or the path of a file that holds one."""
    if len(argv) < 2:
        return {}
    if argv[1].lstrip().startswith("{"):
        return json.loads(argv[1])
    with open(argv[1], encoding="utf-8") as handle:  # Ansible's WANT_JSON convention
        return json.load(handle)


if __name__ == "__main__":
    print(json.dumps({"changed": False, "dsv3_facts": probe(read_arguments(sys.argv))}))
