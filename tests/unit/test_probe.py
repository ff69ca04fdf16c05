"""The probe: run for real as script and as module, and on made-up hosts below a folder."""

from __future__ import annotations

import ast
import http.server
import json
import os
import shlex
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import modules
import pytest

from deploy_dsv3.facts import HostFacts, Section, load_facts

PROBE = modules.LIBRARY / "dsv3_probe.py"
OURS = "ab12" * 16
probe = modules.load("dsv3_probe")


def no_iproute(*_: str) -> None:
    """A host without iproute2."""


def write(root: Path, files: dict[str, str]) -> Path:
    """Write files below `root`; a name that ends in a slash is a folder."""
    for name, content in files.items():
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
    return root


def as_script(arguments: str = "{}") -> dict[str, Any]:
    """What the probe prints when it comes in on standard input."""
    done = subprocess.run(
        [sys.executable, "-IS", "-", arguments], input=PROBE.read_bytes(), capture_output=True, check=True
    )
    answer = json.loads(done.stdout)
    assert answer["changed"] is False
    return answer["dsv3_facts"]


# --- for real, on this machine


def test_the_script_reads_this_machine() -> None:
    facts = as_script(json.dumps({"paths": ["/", "/nowhere/at/all"]}))
    assert facts["errors"] == {}
    assert facts["hostname"] == socket.gethostname()
    assert facts["os"]["kernel"] == os.uname().release
    assert facts["memory"]["total_bytes"] > facts["memory"]["available_bytes"] > 0
    assert [disk["exists_path"] for disk in facts["disks"]] == ["/", "/"]
    loopback = next(i for i in facts["network"]["interfaces"] if i["name"] == "lo")
    assert loopback["kind"] == "loopback"
    assert "127.0.0.1" in [entry["address"] for entry in loopback["addresses"]]
    assert 0 <= facts["time_end"] - facts["time"] < 30


def test_the_module_takes_its_arguments_from_a_file(tmp_path: Path) -> None:
    arguments = tmp_path / "args"
    arguments.write_text(json.dumps({"paths": ["/"], "only": ["disks"], "_ansible_check_mode": True}))
    done = subprocess.run([sys.executable, PROBE, arguments], capture_output=True, check=True)
    facts = json.loads(done.stdout)["dsv3_facts"]
    assert [disk["path"] for disk in facts["disks"]] == ["/"]
    assert "network" not in facts


def test_the_model_knows_every_field_and_the_probe_reads_every_field(tmp_path: Path) -> None:
    """Compare key by key, as far as this machine has something in each list."""
    write(tmp_path, {"config.json": '{"model_type": "deepseek_v3"}'})
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        facts = as_script(
            json.dumps(
                {
                    "paths": ["/"],
                    "reach": [{"host": "x", "address": "127.0.0.1", "port": port}],
                    "model": str(tmp_path),
                    "image": {"name": "127.0.0.1:1/engine", "insecure": ["127.0.0.1:1"]},
                }
            )
        )
    facts["clock"] = {"offset_low": 0, "offset_high": 0}  # the controller's part
    assert load_facts(facts).reach[0].reachable
    assert list(differences(HostFacts, facts)) == []


def differences(model: type[Section], data: dict[str, Any], where: str = "") -> Iterator[str]:
    """Yield fields that only one of model and data has."""
    fields = {info.alias or name: info for name, info in model.model_fields.items()}
    for name in fields.keys() ^ data.keys():
        yield f"{where}{name}"
    for name in fields.keys() & data.keys():
        value = data[name][0] if isinstance(data[name], list) and data[name] else data[name]
        annotation = fields[name].annotation
        if get_origin(annotation) is dict:  # the keys are data
            value = next(iter(value.values()), None)
        parts = [annotation, *get_args(annotation)]
        nested = [part for part in parts if isinstance(part, type) and issubclass(part, Section)]
        if nested and isinstance(value, dict):
            yield from differences(nested[0], value, f"{where}{name}.")


def test_it_runs_on_python_3_6() -> None:
    ast.parse(PROBE.read_text(encoding="utf-8"), feature_version=(3, 6))


def test_ansible_hands_it_a_file_of_arguments() -> None:
    source = PROBE.read_text(encoding="utf-8")
    assert "WANT_JSON" in source
    assert "from ansible" not in source and "import ansible" not in source


def test_addresses_without_iproute2() -> None:
    facts = probe.probe({"only": ["network"]}, ask=no_iproute)
    interfaces = {interface["name"]: interface for interface in facts["network"]["interfaces"]}
    assert facts["errors"] == {}
    assert interfaces["lo"]["addresses"][0] == {
        "address": "127.0.0.1",
        "prefix": 8,
        "family": "inet",
        "scope": "host",
    }


def test_reach() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_server(("127.0.0.1", 0)) as closed:
        answered, refused = server.getsockname()[1], closed.getsockname()[1]
        closed.close()
        results = probe.probe_reach(
            [
                {"host": "answers", "address": "127.0.0.1", "port": answered},
                {"host": "refuses", "address": "127.0.0.1", "port": refused, "source": "127.0.0.1"},
                # Nothing leads from loopback to another network.
                {"host": "far", "address": "192.0.2.1", "port": 9, "source": "127.0.0.1"},
            ]
        )
    assert [(result["host"], result["reachable"]) for result in results] == [
        ("answers", True),
        ("refuses", True),
        ("far", False),
    ]
    assert results[2]["error"]


def test_a_listener_is_told_with_its_process() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (found,) = [entry for entry in probe.probe_listening("/") if entry["port"] == port]
    assert (found["address"], found["pid"]) == ("127.0.0.1", os.getpid())
    assert found["process"] == Path("/proc/self/comm").read_text().strip()


# --- on a made-up host

DEBIAN = 'PRETTY_NAME="Debian GNU/Linux 13 (trixie)"\nID=debian\nVERSION_ID="13"\nVERSION_CODENAME=trixie\n'
ROCKY = 'NAME="Rocky Linux"\nVERSION_ID="9.5"\nID="rocky"\nID_LIKE="rhel centos fedora"\n'


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        (DEBIAN, ("debian", "13", "trixie", "Debian")),
        (ROCKY, ("rocky", "9.5", "", "RedHat")),
        ("", ("", "", "", "other")),
    ],
)
def test_operating_system(tmp_path: Path, release: str, expected: tuple[str, ...]) -> None:
    write(tmp_path, {"etc/os-release": release, "run/systemd/system/": ""})
    found = probe.probe_os(str(tmp_path))
    assert (found["id"], found["version_id"], found["codename"], found["family"]) == expected
    assert found["init"] == "systemd" and found["secure_boot"] is None


@pytest.mark.parametrize(("value", "state"), [(b"\x06\0\0\0\x01", True), (b"\x06\0\0\0\0", False)])
def test_secure_boot(tmp_path: Path, value: bytes, state: bool) -> None:
    variables = tmp_path / "sys/firmware/efi/efivars"
    variables.mkdir(parents=True)
    (variables / "SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c").write_bytes(value)
    assert probe.secure_boot(str(tmp_path)) is state


def test_one_unreadable_section_does_not_hide_the_others(tmp_path: Path) -> None:
    write(tmp_path, {"proc/meminfo": "MemTotal:", "etc/os-release": DEBIAN, "etc/machine-id": "0a1b\n"})
    facts = probe.probe({}, str(tmp_path), no_iproute)
    assert "memory" in facts["errors"] and "memory" not in facts
    assert facts["os"]["id"] == "debian" and facts["machine_id"] == "0a1b"
    assert load_facts(facts).memory.total_bytes == 0


def test_a_host_without_anything_is_read(tmp_path: Path) -> None:
    facts = probe.probe({"only": ["pci", "driver", "infiniband", "docker", "cdi", "listening"]}, str(tmp_path))
    assert facts["errors"] == {}
    host = load_facts(facts)
    assert host.gpu_count == 0 and host.infiniband.ports == () and not host.docker.installed
    assert host.driver.loaded_version == "" and host.listening == ()


def test_interfaces_and_routes(tmp_path: Path) -> None:
    net = "sys/devices/pci0000:00/net/"
    write(
        tmp_path,
        {
            f"{net}eno1/type": "1",
            f"{net}eno1/speed": "25000",
            f"{net}eno1/mtu": "9000",
            f"{net}eno1/operstate": "up",
            f"{net}eno1/address": "3c:ec:ef:00:00:01",
            f"{net}ib0/type": "32",
            f"{net}ib0/speed": "-1",
            "sys/devices/virtual/net/lo/type": "772",
            "sys/devices/virtual/net/veth1/type": "1",
            "sys/devices/virtual/net/bond0/type": "1",
            "sys/devices/virtual/net/bond0/bonding/": "",
            "sys/devices/virtual/net/docker0/bridge/": "",
            "sys/devices/virtual/net/bond0.7/uevent": "DEVTYPE=vlan\nINTERFACE=bond0.7",
            "sys/class/net/bonding_masters": "bond0",
        },
    )
    for path in (*tmp_path.glob("sys/devices/*/net/*"),):
        (tmp_path / "sys/class/net" / path.name).symlink_to(path)
    answers = {
        ("addr", "show"): [
            {
                "ifname": "eno1",
                "addr_info": [{"local": "192.0.2.1", "prefixlen": 24, "family": "inet", "scope": "global"}],
            }
        ],
        ("route", "show"): [
            {"dst": "default", "gateway": "192.0.2.254", "dev": "eno1", "metric": 100},
            {"dst": "192.0.2.0/24", "dev": "eno1", "prefsrc": "192.0.2.1"},
            {"type": "blackhole", "dst": "203.0.113.0/24", "dev": "lo"},
        ],
        ("-6", "route", "show"): [{"dst": "default", "gateway": "fe80::1", "dev": "eno1"}],
    }
    network = probe.probe_network(str(tmp_path), lambda *words: answers[words])
    kinds = {interface["name"]: interface["kind"] for interface in network["interfaces"]}
    assert kinds == {
        "bond0": "bond",
        "bond0.7": "vlan",
        "docker0": "bridge",
        "eno1": "physical",
        "ib0": "infiniband",
        "lo": "loopback",
        "veth1": "virtual",
    }
    by_name = {interface["name"]: interface for interface in network["interfaces"]}
    assert (by_name["eno1"]["speed_mbps"], by_name["ib0"]["speed_mbps"]) == (25000, 0)
    assert by_name["eno1"]["addresses"][0]["address"] == "192.0.2.1"
    assert [(route["destination"], route["metric"]) for route in network["routes"]] == [
        ("0.0.0.0/0", 100),
        ("192.0.2.0/24", 0),
        ("::/0", 0),
    ]


def test_routes_without_iproute2(tmp_path: Path) -> None:
    if sys.byteorder != "little":
        pytest.skip("the recorded table is of a little-endian host")
    header = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
    rows = (
        "eno1\t00000000\tFE0200C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n"
        "eno1\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
        "eno2\t007100CB\t00000000\t0201\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
    )
    write(tmp_path, {"proc/net/route": header + rows})
    routes = probe.routes_from_kernel(str(tmp_path))
    assert [(route["destination"], route["gateway"], route["interface"]) for route in routes] == [
        ("0.0.0.0/0", "192.0.2.254", "eno1"),
        ("192.0.2.0/24", "", "eno1"),
    ]


def test_gpus_and_switches_on_the_bus(tmp_path: Path) -> None:
    bus = "sys/bus/pci/devices/"
    write(
        tmp_path,
        {
            f"{bus}0000:18:00.0/vendor": "0x10de\n",
            f"{bus}0000:18:00.0/class": "0x030200\n",
            f"{bus}0000:18:00.0/device": "0x2324\n",
            f"{bus}0000:86:00.0/vendor": "0x10de\n",
            f"{bus}0000:86:00.0/class": "0x068000\n",
            f"{bus}0000:01:00.0/vendor": "0x1a03\n",
            f"{bus}0000:01:00.0/class": "0x030000\n",
            f"{bus}0000:18:00.1/vendor": "0x10de\n",
            f"{bus}0000:18:00.1/class": "0x040300\n",
        },
    )
    found = probe.probe_pci(str(tmp_path))
    assert [(gpu["slot"], gpu["device"]) for gpu in found["pci_gpus"]] == [("0000:18:00.0", "0x2324")]
    assert [switch["slot"] for switch in found["pci_nvswitches"]] == ["0000:86:00.0"]


def smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The answer of the probe where nvidia-smi is this shell script."""
    command = folder / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return probe.probe_nvidia_smi(str(folder))


def test_gpus_by_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "0, NVIDIA H800, GPU-5a10c001-0000-4c1e-9d2f-000000000100, 81559, 580.82.07"
    found = smi(tmp_path, f"echo '{line}'", monkeypatch)
    assert found["nvidia_smi"]["rc"] == 0
    assert found["gpus"] == [
        {
            "index": 0,
            "name": "NVIDIA H800",
            "uuid": "GPU-5a10c001-0000-4c1e-9d2f-000000000100",
            "memory_total_mib": 81559,
            "driver_version": "580.82.07",
        }
    ]


def test_an_nvidia_smi_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = smi(tmp_path, "echo 'Driver/library version mismatch'; exit 18", monkeypatch)
    assert found["gpus"] == []
    assert found["nvidia_smi"] == {
        "path": str(tmp_path / "nvidia-smi"),
        "rc": 18,
        "error": "Driver/library version mismatch",
    }


def test_an_nvidia_smi_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "NVIDIA_SMI_TIMEOUT_S", 0.2)
    found = smi(tmp_path, "exec sleep 30", monkeypatch)
    assert found["gpus"] == [] and "no answer" in found["nvidia_smi"]["error"]


@pytest.mark.parametrize(
    ("files", "version", "flavour"),
    [
        ({"sys/module/nvidia/version": "580.82.07\n"}, "580.82.07", ""),
        (
            {
                "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64"
                "  570.133.20  Release Build\n"
            },
            "570.133.20",
            "open",
        ),
        (
            {
                "sys/module/nvidia/version": "535.261.03\n",
                "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.261.03  Release\n",
            },
            "535.261.03",
            "proprietary",
        ),
    ],
)
def test_the_loaded_driver(tmp_path: Path, files: dict[str, str], version: str, flavour: str) -> None:
    write(tmp_path, {**files, "sys/module/nouveau/": ""})
    asked = []

    def ask(*command: str) -> str:
        asked.append(command)
        return "580.95.05\n"

    assert probe.probe_driver(str(tmp_path), ask) == {
        "loaded_version": version,
        "flavour": flavour,
        "installed_version": "580.95.05",
        "nouveau_loaded": True,
    }
    assert asked == [("modinfo", "--field", "version", "nvidia")]


GPU = "NVIDIA H800, GPU-5a10c001-0000-4c1e-9d2f-00000000010{0}, 81559, 580.82.07"
NVSWITCH = {
    f"sys/bus/pci/devices/0000:d0:00.0/{name}": value
    for name, value in {"vendor": "0x10de\n", "class": "0x068000\n", "device": "0x22a3\n"}.items()
}


@pytest.mark.parametrize(
    ("fabrics", "state", "status"),
    [
        (("Completed, Success", "Completed, Success"), "Completed", "Success"),
        (("Completed, Success", "In Progress, N/A"), "In Progress", "N/A"),
        (("Completed, Insufficient Resources",), "Completed", "Insufficient Resources"),
    ],
)
def test_the_fabric_is_that_of_the_gpu_that_is_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fabrics: tuple[str, ...], state: str, status: str
) -> None:
    write(tmp_path, NVSWITCH)
    lines = [f"{index}, {GPU.format(index)}, {fabric}" for index, fabric in enumerate(fabrics)]
    asked = tmp_path / "asked"
    found = smi(tmp_path, f'echo "$1" >>{asked}\nprintf "%s\\n" {shlex.join(lines)}', monkeypatch)
    assert found["fabric"] == {"state": state, "status": status}
    assert [gpu["index"] for gpu in found["gpus"]] == list(range(len(fabrics)))
    assert asked.read_text().splitlines() == [
        "--query-gpu=index,name,uuid,memory.total,driver_version,fabric.state,fabric.status"
    ]


def test_without_nvswitch_there_is_no_fabric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert smi(tmp_path, f"echo '0, {GPU.format(0)}'", monkeypatch)["fabric"] is None


def test_a_driver_that_knows_no_fabric_is_asked_for_the_gpus_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, NVSWITCH)
    script = f"""case $1 in
  *fabric*) echo 'Field "fabric.state" is not a valid field to query.'; exit 2 ;;
  *) echo '0, {GPU.format(0)}' ;;
esac"""
    found = smi(tmp_path, script, monkeypatch)
    assert len(found["gpus"]) == 1 and found["nvidia_smi"]["rc"] == 0
    assert found["fabric"] == {"state": "", "status": ""}


def test_the_fabric_of_a_host_without_driver_is_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, NVSWITCH)
    found = smi(tmp_path, "echo 'NVIDIA-SMI has failed because it could not communicate'; exit 9", monkeypatch)
    assert found["gpus"] == [] and found["nvidia_smi"]["rc"] == 9
    assert found["fabric"] == {"state": "", "status": ""}


def test_hca_ports(tmp_path: Path) -> None:
    hca = "sys/class/infiniband/mlx5_10/"
    port = f"{hca}ports/1/"
    zero = "0000:0000:0000:0000:0000:0000:0000:0000"
    v4 = "0000:0000:0000:0000:0000:ffff:c000:0201"
    write(
        tmp_path,
        {
            f"{hca}hca_type": "MT4129",
            f"{hca}device/net/ens10np0/dev_port": "0",
            f"{port}state": "4: ACTIVE\n",
            f"{port}phys_state": "5: LinkUp\n",
            f"{port}rate": "400 Gb/sec (4X NDR)\n",
            f"{port}link_layer": "Ethernet\n",
            f"{port}gids/0": "fe80:0000:0000:0000:0ac0:ebff:fe00:0001",
            f"{port}gids/1": zero,
            f"{port}gids/10": v4,
            f"{port}gids/3": v4,
            f"{port}gid_attrs/types/0": "IB/RoCE v1",
            f"{port}gid_attrs/types/3": "IB/RoCE v1",
            f"{port}gid_attrs/types/10": "RoCE v2",
            f"{port}gid_attrs/ndevs/10": "ens10np0",
            "sys/class/infiniband/mlx5_2/ports/1/state": "1: DOWN",
            "sys/class/infiniband/mlx5_2/ports/1/rate": "2.5 Gb/sec (1X SDR)",
            "dev/infiniband/uverbs0": "",
            "dev/infiniband/rdma_cm": "",
            "dev/infiniband/by-ibdev/": "",
        },
    )
    found = probe.probe_infiniband(str(tmp_path))
    assert found["devices"] == ["rdma_cm", "uverbs0"]
    down, active = found["ports"]  # mlx5_2 comes before mlx5_10
    assert (down["device"], down["state"], down["rate_gbps"]) == ("mlx5_2", "DOWN", 2.5)
    assert (active["state"], active["phys_state"], active["rate_gbps"]) == ("ACTIVE", "LinkUp", 400.0)
    assert (active["link_layer"], active["model"], active["netdevs"]) == ("Ethernet", "MT4129", ["ens10np0"])
    assert [(gid["index"], gid["type"], gid["ndev"]) for gid in active["gids"]] == [
        (0, "IB/RoCE v1", ""),
        (3, "IB/RoCE v1", ""),
        (10, "RoCE v2", "ens10np0"),
    ]


def test_hcas_before_they_have_a_driver_and_the_software_that_drives_them(tmp_path: Path) -> None:
    bus = "sys/bus/pci/devices/0000:"
    devices = {"19:00.0": ("0x15b3", "0x020700"), "1a:00.0": ("0x15b3", "0x020000"), "1b:00.0": ("0x15b3", "0x0c0500")}
    files = {
        f"{bus}{slot}/{name}": f"{value}\n"
        for slot, (vendor, kind) in {**devices, "01:00.0": ("0x8086", "0x020000")}.items()
        for name, value in (("vendor", vendor), ("class", kind))
    }
    write(tmp_path, {**files, "sys/module/ib_core/": "", "sys/module/nvidia_peermem/": ""})
    found = probe.probe_infiniband(str(tmp_path), lambda *_: "OFED-internal-25.07-0.9.7:\n")
    assert found["pci_hcas"] == 2, "the management function of a DPU is no network controller"
    assert found["modules"] == ["ib_core", "nvidia_peermem"]
    assert found["ofed"] == "OFED-internal-25.07-0.9.7"
    assert found["ports"] == [] and found["devices"] == []


def test_listeners_with_container_and_unit(tmp_path: Path) -> None:
    if sys.byteorder != "little":
        pytest.skip("the recorded tables are of a little-endian host")
    header = "  sl  local_address rem_address st tx_queue rx_queue tr tm->when retrnsmt uid timeout inode\n"
    row = "   0: {local} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000 0 0 {inode} 1\n"
    write(
        tmp_path,
        {
            "proc/net/tcp": header
            + row.format(local="0100007F:18EB", state="0A", inode=111)
            + row.format(local="0100007F:9999", state="01", inode=112),
            "proc/net/tcp6": header + row.format(local="00000000000000000000000000000000:1F40", state="0A", inode=113),
            "proc/77/comm": "gcs_server",
            "proc/77/cgroup": f"1:cpu:/other\n0::/system.slice/docker-{OURS}.scope\n",
            "proc/77/fd/": "",
            "proc/78/comm": "haproxy",
            "proc/78/cgroup": "0::/system.slice/dsv3-endpoint.service\n",
            "proc/78/fd/": "",
        },
    )
    (tmp_path / "proc/77/fd/5").symlink_to("socket:[111]")
    (tmp_path / "proc/78/fd/6").symlink_to("socket:[113]")
    first, second = probe.probe_listening(str(tmp_path))
    assert first == {
        "address": "127.0.0.1",
        "port": 6379,
        "process": "gcs_server",
        "pid": 77,
        "container_id": OURS,
        "unit": "",
    }
    assert (second["address"], second["port"], second["process"]) == ("::", 8000, "haproxy")
    assert (second["container_id"], second["unit"]) == ("", "dsv3-endpoint.service")


@pytest.mark.parametrize(
    ("cgroup", "container"),
    [
        (f"0::/system.slice/docker-{OURS}.scope", OURS),
        (f"12:memory:/docker/{OURS}\n0::/", OURS),
        # A host that is itself a container: the innermost one counts.
        (f"1:name=systemd:/docker/{'c' * 64}\n0::/docker/{'c' * 64}/system.slice/docker-{OURS}.scope", OURS),
        ("0::/user.slice/user-1000.slice/session-4.scope", ""),
    ],
)
def test_the_container_of_a_process(tmp_path: Path, cgroup: str, container: str) -> None:
    write(tmp_path, {"proc/5/cgroup": cgroup})
    assert probe.process_home(str(tmp_path), 5)[0] == container


def test_the_address_that_ssh_came_in_on(tmp_path: Path) -> None:
    pid = os.getpid()
    write(
        tmp_path,
        {
            f"proc/{pid}/stat": f"{pid} (python3) S 41 1 1",
            f"proc/{pid}/environ": "PATH=/usr/bin\0",
            "proc/41/stat": "41 (a (strange) name) S 40 1 1",
            "proc/41/environ": "",
            "proc/40/stat": "40 (bash) S 1 1 1",
            "proc/40/environ": "HOME=/root\0SSH_CONNECTION=198.51.100.9 51234 192.0.2.11 22\0",
        },
    )
    assert probe.probe_connection(str(tmp_path)) == {"server_address": "192.0.2.11"}


def test_a_local_run_has_no_ssh_address(tmp_path: Path) -> None:
    write(tmp_path, {f"proc/{os.getpid()}/stat": f"{os.getpid()} (python3) S 1 1 1"})
    assert probe.probe_connection(str(tmp_path)) == {"server_address": ""}


@pytest.mark.parametrize(
    ("content", "settings", "error"),
    [
        (None, None, ""),
        ("", {}, ""),
        ('{"live-restore": true}', {"live-restore": True}, ""),
        ('{"live-restore": true,}', None, "line 1"),
        ('["a"]', None, "found list"),
    ],
)
def test_daemon_json(tmp_path: Path, content: str | None, settings: Any, error: str) -> None:
    if content is not None:
        write(tmp_path, {"etc/docker/daemon.json": content})
    found, said = probe.probe_daemon_json(str(tmp_path))
    assert found == settings
    assert error in said if error else said == ""


class DockerApi(http.server.BaseHTTPRequestHandler):
    """The Docker engine's answers that the probe asks for, in the shape of its API 1.51."""

    answers: dict[str, Any]

    def do_GET(self) -> None:
        answer = self.answers.get(self.path)
        body = json.dumps(answer if answer is not None else {"message": "page not found"}).encode()
        self.send_response(200 if answer is not None else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: Any) -> None:
        pass


def docker(root: Path, answers: dict[str, Any]) -> dict[str, Any]:
    """What the probe reads from a Docker engine with these answers."""
    write(root, {"var/run/": "", "usr/bin/dockerd": ""})
    handler = type("Handler", (DockerApi,), {"answers": answers})
    with socketserver.ThreadingUnixStreamServer(str(root / "var/run/docker.sock"), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            return probe.probe_docker(str(root))
        finally:
            server.shutdown()
            thread.join()


def test_docker(tmp_path: Path) -> None:
    listed = [
        {
            "Id": OURS,
            "Names": ["/lmdeploy"],
            "Image": "openmmlab/lmdeploy:latest-cu12",
            "ImageID": "sha256:1",
            "Labels": {"io.deploy-dsv3.managed": "true"},
            "State": "running",
        },
        {
            "Id": "cd" * 32,
            "Names": ["/db"],
            "Image": "postgres:17",
            "ImageID": "sha256:2",
            "Labels": None,
            "State": "exited",
        },
    ]
    found = docker(
        tmp_path,
        {
            "/version": {"Version": "28.4.0"},
            "/info": {"DockerRootDir": "/var/lib/docker"},
            "/containers/json?all=1": listed,
            "/images/json": [
                {"Id": "sha256:1", "RepoTags": None, "RepoDigests": ["openmmlab/lmdeploy@sha256:a"], "Size": 9}
            ],
            f"/containers/{OURS}/json": {
                "State": {"StartedAt": "2026-01-02T03:04:05.6Z"},
                "HostConfig": {},
                "Config": {},
            },
        },
    )
    assert found["error"] == ""
    assert (found["installed"], found["running"], found["version"]) == (True, True, "28.4.0")
    assert found["root_dir"] == "/var/lib/docker"
    ours, other = found["containers"]
    assert (ours["name"], ours["state"], ours["started_at"]) == (
        "lmdeploy",
        "running",
        "2026-01-02T03:04:05.6Z",
    )
    assert (other["name"], other["labels"], other["started_at"], other["config"]) == ("db", {}, "", None)
    assert found["images"] == [{"id": "sha256:1", "names": ["openmmlab/lmdeploy@sha256:a"], "size_bytes": 9}]
    assert load_facts({"schema": 1, "docker": found}).docker.containers[0].image_id == "sha256:1"


def test_a_docker_that_does_not_answer_says_so(tmp_path: Path) -> None:
    found = docker(tmp_path, {})
    assert found["installed"] and not found["running"]
    assert "/version answered 404" in found["error"]


def test_a_stale_docker_socket(tmp_path: Path) -> None:
    (tmp_path / "var/run").mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "var/run/docker.sock"))
    found = probe.probe_docker(str(tmp_path))
    assert not found["running"] and "refused" in found["error"]


def test_cdi_and_what_a_run_left(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "etc/cdi/nvidia.yaml": "",
            "etc/cdi/README": "",
            "var/run/cdi/nvidia.json": "",
            "etc/deploy-dsv3/release.json": '{"schema": 1}',
            "etc/deploy-dsv3/endpoint/haproxy.cfg": "",
        },
    )
    assert probe.probe_cdi(str(tmp_path)) == {"specs": ["/etc/cdi/nvidia.yaml", "/var/run/cdi/nvidia.json"]}
    left = probe.probe_deployment(str(tmp_path))
    assert left.pop("release") == {"schema": 1}
    assert left.pop("endpoint") is True
    assert left.pop("runs") == []
    assert set(left.values()) == {None}


def test_what_runs_left_is_told_though_a_file_is_broken(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "etc/deploy-dsv3/manifest.json": '{"schema": 1',
            "etc/deploy-dsv3/image.json": "[]",
            "var/lib/deploy-dsv3/history.jsonl": "".join(f'{{"run": "{number}"}}\n' for number in range(9)) + '{"ru',
        },
    )
    left = probe.probe_deployment(str(tmp_path))
    assert "delimiter" in left["manifest"]["error"] and "object" in left["image"]["error"]
    assert [run["run"] for run in left["runs"]] == ["5", "6", "7", "8"]


INSPECT = {
    "Image": "sha256:1",
    "Config": {
        "Image": "openmmlab/lmdeploy@sha256:a",
        "Entrypoint": [],
        "Cmd": ["python3", "/etc/deploy-dsv3/engine/launcher.py", "run"],
        "Env": ["NCCL_IB_HCA==mlx5_0:1", "S3_KEY=very-secret", "RAY_AUTH_TOKEN=very-secret", "BROKEN"],
        "Labels": {"io.deploy-dsv3.managed": "true"},
        "Healthcheck": {"Test": ["CMD", "true"]},
        "StopTimeout": 60,
    },
    "HostConfig": {
        "Binds": ["/b:/b:ro", "/a:/a"],
        "Devices": [{"PathOnHost": "/dev/infiniband/uverbs0"}],
        "DeviceRequests": [{"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=all"]}],
        "Ulimits": [{"Name": "memlock", "Soft": -1, "Hard": -1}],
        "CapAdd": ["IPC_LOCK"],
        "CapDrop": None,
        "RestartPolicy": {"Name": "unless-stopped"},
        "LogConfig": {"Type": "json-file", "Config": {"max-size": "100m"}},
    },
}


def test_how_a_container_was_made() -> None:
    config = probe.container_config(INSPECT)
    assert (config["mounts"], config["devices"]) == (["/a:/a", "/b:/b:ro"], ["/dev/infiniband/uverbs0"])
    assert (config["ulimits"], config["device_requests"]) == (["memlock:-1:-1"], ["cdi: nvidia.com/gpu=all"])
    assert (config["restart_policy"], config["privileged"]) == ("unless-stopped", False)
    assert config["log"] == {"driver": "json-file", "max-size": "100m"}
    assert config["environment"]["NCCL_IB_HCA"] == "=mlx5_0:1"


def test_no_secret_of_a_containers_environment_leaves_the_host() -> None:
    config = probe.container_config(INSPECT)
    assert "very-secret" not in json.dumps(config)
    assert config["environment"]["S3_KEY"] == probe.sha256("very-secret")


def test_files_that_a_person_could_change(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "etc/deploy-dsv3/engine/secrets/ray_token": "token",
            "etc/deploy-dsv3/manifest.json": "{}",
            "etc/deploy-dsv3/endpoint/": "",
            "etc/systemd/system/dsv3-endpoint.service.d/mine.conf": "",
            "etc/systemd/system/other.service": "",
        },
    )
    (tmp_path / "etc/deploy-dsv3/endpoint/tls.crt").symlink_to("/etc/ssl/a.pem")
    (tmp_path / "etc/deploy-dsv3/engine/secrets/ray_token").chmod(0o600)
    found = probe.probe_files(str(tmp_path))
    assert list(found) == [
        "/etc/deploy-dsv3/endpoint/tls.crt",
        "/etc/deploy-dsv3/engine/secrets/ray_token",
        "/etc/systemd/system/dsv3-endpoint.service.d/mine.conf",
    ]
    assert found["/etc/deploy-dsv3/endpoint/tls.crt"]["link"] == "/etc/ssl/a.pem"
    token = found["/etc/deploy-dsv3/engine/secrets/ray_token"]
    assert token["mode"] == "0600" and f"sha256:{token['sha256']}" == probe.sha256("token")


def test_units_that_exist(tmp_path: Path) -> None:
    shown = (
        "Id=docker.service\nLoadState=loaded\nActiveState=active\nUnitFileState=enabled\n\n"
        "Id=dsv3-endpoint.service\nLoadState=masked\nActiveState=inactive\nUnitFileState=masked\n\n"
        "Id=nvidia-fabricmanager.service\nLoadState=not-found\nActiveState=inactive\nUnitFileState=\n"
    )
    assert probe.probe_units(str(tmp_path), lambda *_: shown) == {
        "docker.service": {"active": "active", "enabled": "enabled", "reload_due": False},
        "dsv3-endpoint.service": {"active": "inactive", "enabled": "masked", "reload_due": False},
    }


@pytest.mark.parametrize(("written", "due"), [(9.0, False), (11.0, True)])
def test_an_endpoint_that_runs_with_older_files(tmp_path: Path, written: float, due: bool) -> None:
    write(tmp_path, {"run/dsv3-endpoint/loaded": "", "etc/deploy-dsv3/endpoint/haproxy.cfg": "", "etc/ssl/a.pem": ""})
    (tmp_path / "etc/deploy-dsv3/endpoint/tls.crt").symlink_to(tmp_path / "etc/ssl/a.pem")
    os.utime(tmp_path / "run/dsv3-endpoint/loaded", (10, 10))
    os.utime(tmp_path / "etc/deploy-dsv3/endpoint/haproxy.cfg", (9, 9))
    os.utime(tmp_path / "etc/ssl/a.pem", (written, written))
    shown = "Id=dsv3-endpoint.service\nLoadState=loaded\nActiveState=active\nUnitFileState=enabled\n"
    assert probe.probe_units(str(tmp_path), lambda *_: shown)["dsv3-endpoint.service"]["reload_due"] is due


@pytest.mark.parametrize(
    ("family", "program", "listing", "expected"),
    [
        ("Debian", "dpkg-query", "haproxy 3.0.11-1 installed\ndocker.io 26.1 config-files\n", {"haproxy": "3.0.11-1"}),
        ("RedHat", "rpm", "haproxy 2.4.22-3.el9 installed\n", {"haproxy": "2.4.22-3.el9"}),
        ("Debian", "dpkg-query", "", {}),
    ],
)
def test_packages(family: str, program: str, listing: str, expected: dict[str, str]) -> None:
    asked: list[tuple[str, ...]] = []

    def ask(*command: str) -> str:
        asked.append(command)
        return listing

    assert probe.probe_packages(family, ask) == expected
    assert asked[0][0] == program


def test_kernel_settings_are_told_with_single_blanks(tmp_path: Path) -> None:
    write(tmp_path, {"proc/sys/net/ipv4/ip_local_port_range": "32768\t60999\n"})
    assert probe.probe_sysctls(str(tmp_path)) == {"net.ipv4.ip_local_port_range": "32768 60999"}


def test_the_models_numbers(tmp_path: Path) -> None:
    config = {"vocab_size": 129280, "rope_scaling": {"x": 1}, "quantization_config": {"quant_method": "fp8", "y": 2}}
    write(tmp_path, {"data/model/config.json": json.dumps(config)})
    assert probe.probe_model(str(tmp_path), "/data/model") == {
        "vocab_size": 129280,
        "quantization_config": {"quant_method": "fp8"},
    }
    assert probe.probe_model(str(tmp_path), "/nowhere") is None


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("openmmlab/lmdeploy:latest-cu12", ("", "openmmlab/lmdeploy", "latest-cu12")),
        ("ubuntu", ("", "library/ubuntu", "latest")),
        ("registry.example:5000/a/b:1", ("registry.example:5000", "a/b", "1")),
        ("localhost/engine", ("localhost", "engine", "latest")),
    ],
)
def test_names_of_images(name: str, parts: tuple[str, str, str]) -> None:
    assert probe.split_image(name) == parts


class RegistryApi(DockerApi):
    """A registry that wants an anonymous token, with an image for two architectures."""

    def do_GET(self) -> None:
        if self.path.startswith("/v2/") and self.headers.get("Authorization") != "Bearer t":
            self.send_response(401)
            realm = f"http://127.0.0.1:{self.server.server_address[1]}/token"
            self.send_header("WWW-Authenticate", f'Bearer realm="{realm}",service="r",scope="s"')
            self.end_headers()
            return
        super().do_GET()


@pytest.fixture
def registry() -> Iterator[str]:
    machine = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
    layers = [
        {"digest": "sha256:l1", "size": 100},
        {"digest": "sha256:l2", "size": 20},
        {"digest": "sha256:l1", "size": 100},
    ]
    RegistryApi.answers = {
        "/token?service=r&scope=s": {"token": "t"},
        "/v2/a/b/manifests/1": {
            "manifests": [
                {"digest": "sha256:other", "platform": {"architecture": "mips"}},
                {"digest": "sha256:mine", "platform": {"architecture": machine}},
            ]
        },
        "/v2/a/b/manifests/sha256:mine": {"config": {"digest": "sha256:c", "size": 3}, "layers": layers},
    }
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), RegistryApi) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_registry_tells_what_a_pull_would_download(tmp_path: Path, registry: str) -> None:
    asked = {"name": f"{registry}/a/b:1", "insecure": [registry]}
    found = probe.probe_registry(str(tmp_path), asked, [])
    assert (found["registry"], found["bytes"], found["error"]) == (f"http://{registry}", 123, "")


def test_no_registry_is_asked_for_an_image_that_is_there(tmp_path: Path) -> None:
    write(tmp_path, {"etc/deploy-dsv3/image.json": '{"name": "127.0.0.1:1/a:1", "digest": "sha256:d"}'})
    asked = {"name": "127.0.0.1:1/a:1", "insecure": ["127.0.0.1:1"]}
    assert probe.probe_registry(str(tmp_path), asked, ["127.0.0.1:1/a@sha256:d"]) is None
    missing = probe.probe_registry(str(tmp_path), {**asked, "name": "127.0.0.1:1/a:2"}, ["127.0.0.1:1/a@sha256:d"])
    assert missing["digest"] == "" and "refused" in missing["error"]


def test_disks_of_missing_paths_are_those_of_their_parents(tmp_path: Path) -> None:
    write(tmp_path, {"data/": ""})
    (disk,) = probe.probe_disks(str(tmp_path), ["/data/models/DeepSeek-V3"])
    assert disk["exists_path"] == "/data"
    assert 0 < disk["free_bytes"] <= disk["total_bytes"]
