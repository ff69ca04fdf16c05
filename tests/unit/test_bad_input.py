"""Malformed inventories and settings: each is refused with exit 2, says where and what, and touches no host.

Every case goes through the command itself, in this process. Running a playbook would fail the test.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploy_dsv3 import cli, runner

HOSTS = "[dsv3_head]\ngpu-a ansible_host=192.0.2.11\n[dsv3_workers]\ngpu-b ansible_host=192.0.2.12\n"
DIGEST = "sha256:" + "0a" * 32


@dataclass(frozen=True, kw_only=True)
class Case:
    """An input and what is told of it.

    `files` are written below a fresh directory, `prepare` does what text cannot; the first file is the
    inventory unless `inventory` names another path. `where` and `told` must be in the message.
    """

    id: str
    files: dict[str, str | bytes] = field(default_factory=dict)
    inventory: str = ""
    prepare: Callable[[Path], None] | None = None
    args: tuple[str, ...] = ()
    where: str = ""
    told: str


def text(name: str, found: str, content: str | bytes, *, where: str | None = None, **more: Any) -> Case:
    """A case of one file, `hosts.ini` unless the name says YAML."""
    file = "hosts.yml" if ".yml" in name else "hosts.ini"
    return Case(id=name, files={file: content}, told=found, where=file if where is None else where, **more)


def setting(name: str, value: Any, found: str, *, more: dict[str, Any] | None = None, case: str = "") -> Case:
    """A case of one setting in group_vars; it is told with file, line and key."""
    variables = {name: value, **(more or {})}
    return Case(
        id=f"{name}: {case or found}",
        files={"hosts.ini": HOSTS, "group_vars/all.yml": yaml.safe_dump(variables, sort_keys=False)},
        where="group_vars/all.yml:" if more else "group_vars/all.yml:1:",
        told=found,
    )


def yaml_inventory(**groups: Any) -> str:
    """A YAML inventory; a group is a list of hosts or a dictionary."""
    return yaml.safe_dump(
        {name: {"hosts": {host: {} for host in g}} if isinstance(g, list) else g for name, g in groups.items()}
    )


def _mode(name: str, mode: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).chmod(mode)


def _link(name: str, target: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).symlink_to(target)


def _executable(name: str) -> Callable[[Path], None]:
    return _mode(name, stat.S_IRWXU)


def _encrypted(plain: str) -> str:
    from ansible.parsing.vault import VaultLib, VaultSecret

    secret = VaultSecret(b"right")
    encrypted: str = VaultLib([("default", secret)]).encrypt(plain, secret).decode()
    return encrypted


def _inline(name: str, plain: str) -> str:
    body = "\n".join(f"    {line}" for line in _encrypted(plain).splitlines())
    return f"{name}: !vault |\n{body}\n"


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdef", "bcdefg", strict=True)
)

PATHS = [
    Case(id="missing", inventory="nowhere.ini", where="nowhere.ini", told="there is no such inventory"),
    Case(
        id="missing, another ending is there",
        files={"prod.yml": "x"},
        inventory="prod.ini",
        told="Did you mean",
        where="prod.yml",
    ),
    Case(id="list of hosts", inventory="a,b", told="says nothing of head and workers"),
    Case(id="empty directory", inventory=".", told="has no inventory file"),
    Case(id="directory of other files", files={"d/notes.md": "x"}, inventory="d", told="has no inventory file"),
    Case(id="pipe", inventory="p", prepare=lambda d: os.mkfifo(d / "p"), told="neither a file nor a directory"),
    Case(id="link to nowhere", inventory="l", prepare=_link("l", "gone"), told="leads nowhere"),
    Case(id="link to itself", inventory="l", prepare=_link("l", "l"), told="cannot be read"),
    Case(
        id="directory within itself",
        files={"d/hosts.ini": HOSTS},
        inventory="d",
        prepare=_link("d/again", "."),
        told="leads back to a directory above it",
    ),
    Case(
        id="broken link in a directory",
        files={"d/hosts.ini": HOSTS},
        inventory="d",
        prepare=_link("d/more.ini", "gone"),
        where="more.ini",
        told="leads nowhere",
    ),
    Case(
        id="directory where variables belong",
        files={"hosts.ini": HOSTS, "group_vars/all.yml/x": ""},
        where="group_vars/all.yml",
        told="a directory is where a file belongs",
    ),
]

TEXTS = [
    text("empty", "is empty", ""),
    text("only comments", "has no hosts", "# nothing\n; here\n"),
    text("only comments .yml", "is empty", "# nothing\n"),
    text("UTF-16", "is UTF-16", HOSTS.encode("utf-16")),
    text("Latin-1", "is not UTF-8", b"[dsv3_head]\nn\xfcrnberg\n", where="hosts.ini:2"),
    text("byte order mark", "byte order mark", b"\xef\xbb\xbf" + HOSTS.encode()),
    text("CRLF", "CRLF", HOSTS.replace("\n", "\r\n")),
    text("CRLF .yml", "CRLF", "all:\r\n  hosts: {}\r\n"),
    text("NUL", "binary", HOSTS + "\x00"),
    text("huge", "too large", "#" * (4 * 1024 * 1024 + 1)),
    text("section not closed", "section header is not valid", "[dsv3_head\na\n", where="hosts.ini:1"),
    text("space in section", "section header is not valid", "[dsv3 head]\na\n", where="hosts.ini:1"),
    text("unknown section kind", "of no known kind", "[dsv3_head:var]\na=1\n", where="hosts.ini:1"),
    text("host twice", "host 'gpu-a' is there twice", HOSTS + "[dsv3_head]\ngpu-a\n", where="hosts.ini:6"),
    text("variable twice on a host", "'x' is there twice", "[dsv3_head]\na x=1 x=2\n", where="hosts.ini:2"),
    text(
        "variable twice in vars",
        "variable 'x' is there twice",
        HOSTS + "[all:vars]\nx=1\nx=2\n",
        where="hosts.ini:7",
    ),
    text("no value", "is not a variable", HOSTS + "[all:vars]\nlmdeploy_tp: 16\n", where="hosts.ini:6"),
    text("words after a host", "'lmdeploy_tp' after host 'a'", "[dsv3_head]\na lmdeploy_tp = 16\n"),
    text("open quote", "No closing quotation", '[dsv3_head]\na x="1\n', where="hosts.ini:2"),
    text("undefined child", "names group 'gone'", HOSTS + "[dsv3:children]\ngone\n", where="hosts.ini:6"),
    text("vars of nothing", "names group 'gone'", HOSTS + "[gone:vars]\nx=1\n", where="hosts.ini:5"),
    text("host name with a slash", "no host name has", "[dsv3_head]\ngpu/a\n", where="hosts.ini:2"),
    text("host name of another script", "no host name has", "[dsv3_head]\ngpu-а\n", where="hosts.ini:2"),
    text("host name with a shell word", "no host name has", "[dsv3_head]\n$(id)\n", where="hosts.ini:2"),
    text("YAML named .ini", "not a variable", "all:\n  hosts: x\n"),
    text("YAML marker in .ini", "looks like YAML", "---\nall:\n", where="hosts.ini:1"),
    text("group within itself", "recursive", HOSTS + "[a:children]\nb\n[b:children]\na\n"),
    text("bracket .yml", "not valid YAML", "all: [\n", where="hosts.yml:2"),
    text("tab .yml", "a tab is where YAML wants spaces", "all:\n\thosts:\n", where="hosts.yml:2"),
    text("key twice .yml", "key 'dsv3_head' is there twice", "dsv3_head: {}\ndsv3_head: {}\n"),
    text("two documents .yml", "more than one YAML document", "a: {}\n---\nb: {}\n"),
    text("list .yml", "not a mapping", "- a\n- b\n", where="hosts.yml:1"),
    text("scalar .yml", "not a mapping", "hello\n", where="hosts.yml:1"),
    text("alias within itself .yml", "contains itself", "all: &a\n  hosts: *a\n"),
    text("billion laughs .yml", "aliases make this file too large", LAUGHS),
    text("deep .yml", "nested too deeply", "a: " + "[" * 101 + "]" * 101, where="hosts.yml:1"),
    text("bottomless .yml", "nested too deeply", "a: " + "[" * 1_000_000, where="hosts.yml:1"),
    text("hosts as a list .yml", "cannot be read", "dsv3_head:\n  hosts: [a, b]\n"),
    text("unknown group key .yml", "would be dropped", "dsv3_head:\n  host: {a: {}}\n"),
    text("foreign tag .yml", "cannot be read", "dsv3_head: !!python/object:os.system {}\n"),
    Case(
        id="variables are a list",
        files={"hosts.ini": HOSTS, "group_vars/all.yml": "- lmdeploy_tp: 16\n"},
        where="group_vars/all.yml:1",
        told="not a mapping",
    ),
    Case(
        id="variables do not parse",
        files={"hosts.ini": HOSTS, "host_vars/gpu-a.yml": "a: b: c\n"},
        where="host_vars/gpu-a.yml:1",
        told="not valid YAML",
    ),
    Case(
        id="variable file with a key twice",
        files={"hosts.ini": HOSTS, "group_vars/dsv3_head/a.yml": "x: 1\nx: 2\n"},
        where="group_vars/dsv3_head/a.yml:2",
        told="key 'x' is there twice",
    ),
    Case(
        id="script without permission",
        files={"inv.sh": "#!/bin/sh\necho '{}'\n"},
        where="inv.sh",
        told="it is not executable",
    ),
    Case(
        id="script that fails",
        files={"inv.sh": "#!/bin/sh\necho broken >&2\nexit 3\n"},
        prepare=_executable("inv.sh"),
        where="inv.sh",
        told="cannot be read",
    ),
    Case(
        id="script that prints no JSON",
        files={"inv.sh": "#!/bin/sh\necho hello\n"},
        prepare=_executable("inv.sh"),
        where="inv.sh",
        told="cannot be read",
    ),
]

GROUPS = [
    text("no groups", "replica 'dsv3' has no head", "gpu-a\ngpu-b\n"),
    text("workers only", "replica 'dsv3' has no head", "[dsv3_workers]\ngpu-b\n"),
    text("empty head", "group dsv3_head is empty", "[dsv3_head]\n[dsv3_workers]\ngpu-b\n"),
    text("misspelt head", "did you mean it by [dsv3_heads]", "[dsv3_heads]\na\n[dsv3_workers]\nb\n"),
    text("two heads", "has 2 heads", "[dsv3_head]\na\nb\n"),
    text("head also a worker", "both head and worker", "[dsv3_head]\na\n[dsv3_workers]\na\nb\n"),
    text("host in dsv3", "has hosts of its own", HOSTS + "[dsv3]\nc\n"),
    text("unknown group", "neither a replica nor a role", HOSTS + "[dsv3:children]\nweb\n[web]\nw\n"),
    text(
        "host in two replicas .yml",
        "b belongs to two replicas",
        yaml_inventory(
            dsv3={"children": {"one": {}, "two": {}}},
            one={"children": {"one_head": {}, "one_workers": {}}},
            two={"children": {"two_head": {}, "two_workers": {}}},
            one_head=["a"],
            one_workers=["b"],
            two_head=["c"],
            two_workers=["b"],
        ),
    ),
    text("limit without the head", "cuts replica 'dsv3' in two", HOSTS, where="", args=("-l", "gpu-b")),
    text("limit without a worker", "without gpu-b", HOSTS, where="", args=("--limit", "gpu-a")),
    text("limit of nothing", "does not have", HOSTS, where="--limit", args=("-l", "gpu-x")),
    text("limit of a missing file", "cannot be read", HOSTS, where="--limit", args=("-l", "@gone")),
]

MACHINES = [
    text("one address twice", "gpu-a and gpu-b are the same machine", HOSTS.replace(".12", ".11")),
    text(
        "one IPv6 address in two spellings",
        "a and b are the same machine",
        "[dsv3_head]\na ansible_host=2001:db8::1\n[dsv3_workers]\nb ansible_host=2001:DB8:0::0:1\n",
        where="hosts.ini:4",
    ),
    text(
        "a name that is another's address",
        "are the same machine",
        "[dsv3_head]\n192.0.2.11\n[dsv3_workers]\nb ansible_host=192.0.2.11\n",
    ),
    text("bad IP address", "no valid IP address", HOSTS.replace(".11", ".300"), where="hosts.ini:2"),
    text("unspecified address", "no machine has it", HOSTS.replace("192.0.2.11", "0.0.0.0")),
    text("address with a shell word", "no address has", HOSTS.replace("192.0.2.11", "a;b")),
    text("bad SSH port", "ansible_port is not a port", HOSTS.replace(".11", ".11 ansible_port=ssh")),
    text(
        "missing SSH key",
        "there is no such SSH private key",
        HOSTS + "[all:vars]\nansible_ssh_private_key_file=/nowhere/id\n",
        where="hosts.ini:6",
    ),
    Case(
        id="SSH key that others can read",
        files={
            "hosts.ini": HOSTS,
            "group_vars/all.yml": "ansible_ssh_private_key_file: '{{ inventory_dir }}/id'\n",
            "id": "key",
        },
        prepare=_mode("id", 0o644),
        where="group_vars/all.yml:1",
        told="can be read by other users",
    ),
]

NAMES = [
    setting("lmdeploy_tpp", 16, "Did you mean 'lmdeploy_tp'?"),
    setting("engine_enviroment", {}, "Did you mean 'engine_environment'?"),
    setting("lmdeply_server_port", 1, "Did you mean 'lmdeploy_server_port'?"),
    setting("model_weight_path", "/data/x", "Did you mean 'model_weights_path'?"),
    setting("ray_cluster_colour", "red", "is no setting"),
    setting("dsv3_node", {}, "is worked out from the host"),
    setting("dsv3_tp", 16, "is no setting"),
    setting("__engine_image_release", {}, "is internal to its role"),
    setting("lmdeploy_api_keys", ["k"], "is handed to its role by the playbooks"),
]

TYPES = [
    setting("rdma_required", "yes", "wrong type", case="text for bool"),
    setting("rdma_required", 1, "wrong type", case="number for bool"),
    setting("endpoint_port", "8000", "without quotes", case="text for int"),
    setting("endpoint_port", "８０００", "wrong type", case="digits of another script"),
    setting("endpoint_port", 8000.0, "wrong type", case="float for int"),
    setting("endpoint_port", True, "wrong type", case="bool for int"),
    setting("lmdeploy_tp", None, "wrong type", case="null"),
    setting("lmdeploy_cache_max_entry_count", "0.8", "wrong type", case="text for float"),
    setting("lmdeploy_cache_max_entry_count", float("nan"), "wrong type", case="not a number"),
    setting("nvidia_driver_branch", 580, 'in quotes: "580"', case="number for text"),
    setting("endpoint_routes", "/v1", "a list", case="text for list"),
    setting("endpoint_routes", [1], "a list of text", case="number in a list"),
    setting("engine_environment", ["A=b"], "a mapping", case="list for dict"),
    text(
        "INI bool in lower case",
        "Write True or False",
        HOSTS + "[all:vars]\nrdma_required=true\n",
        where="hosts.ini:6: rdma_required",
    ),
    text(
        "INI version that is a number",
        "in quotes",
        HOSTS + "[all:vars]\nnvidia_driver_branch=580.10\n",
        where="hosts.ini:6: nvidia_driver_branch",
    ),
    setting("endpoint_mode", "proxi", "Did you mean 'proxy'?"),
    setting("nvidia_driver_source", "vendour", "Did you mean 'vendor'?"),
]

RANGES = [
    setting("endpoint_port", 0, "out of range", case="zero"),
    setting("endpoint_port", 65536, "out of range", case="too high"),
    setting("endpoint_port", -1, "is negative"),
    setting("lmdeploy_tp", -8, "is negative"),
    setting("rdma_gid_index", -2, "at least -1"),
    setting("ray_cluster_join_timeout_s", 0, "more than zero"),
    setting("preflight_max_clock_skew_s", -1.0, "is negative"),
    setting("lmdeploy_cache_max_entry_count", 1.5, "between 0 and 1"),
    setting("model_weights_path", "models/v3", "is not absolute"),
    setting("model_weights_path", "~/models", "is not absolute", case="home"),
    setting("model_weights_path", "/data/../etc", "goes upwards"),
    setting("model_weights_path", "/", "root of the file system"),
    setting("model_weights_path", "/data/v3; rm -rf x", "a shell or Docker would read otherwise"),
    setting("docker_engine_data_path", "/var/lib", "directory of the system itself"),
    setting("nvidia_container_toolkit_cdi_spec_path", "/etc/cdi/a b", "read otherwise", case="space"),
    setting("endpoint_tls_ca_path", "/nowhere/ca.pem", "does not exist on this machine"),
    setting("engine_image_digest", "sha256:0A" + "0" * 62, "is malformed", case="capitals"),
    setting("engine_image_digest", DIGEST[:-1], "is malformed", case="cut off"),
    setting("engine_image_digest", "latest", "is malformed", case="tag"),
    setting("engine_image_name", f"a/b@{DIGEST}", "goes into engine_image_digest"),
    setting("engine_image_name", "Open MMLab/lmdeploy", "no image name"),
    setting("nvidia_driver_repository_url", "ftp://192.0.2.1/x", "no http or https URL"),
    setting("docker_engine_registry_mirrors", ["https://u:p@192.0.2.1"], "holds a user or password"),
    setting("docker_engine_insecure_registries", ["http://192.0.2.1"], "without http://"),
    setting("docker_engine_registry_ca_paths", {"https://192.0.2.1": "/etc/ca.pem"}, "no registry"),
    setting("docker_engine_registry_ca_paths", {"192.0.2.1:5000": "ca.pem"}, "is not absolute"),
    setting("endpoint_metrics_allow", ["192.0.2.0/33"], "no network in CIDR form"),
    setting("endpoint_metrics_allow", ["192.0.2.7/24"], "beyond its prefix"),
    setting("endpoint_address", "192.0.2", "no IP address"),
    setting("endpoint_address", "0.0.0.0", "no host has"),
    setting("node_network_address", "127.0.0.1", "loopback"),
    setting("node_network_address", "fe80::1", "link-local"),
    setting("node_network_address", "gpu-a", "no IP address", case="name"),
    setting("node_network_interface", "a-name-of-17-chars", "at most 15"),
    setting("model_weights_name", "deepseek-ai/DeepSeek-V3\n", "a line break"),
    setting("lmdeploy_model_name", "deepseek v3", "a model's name"),
    setting("engine_container_name", "-x", "malformed"),
    setting("engine_log_max_size", "100 MB", "malformed"),
    setting("engine_ulimits", ["memlock=-1"], "name:soft:hard"),
    setting("engine_capabilities", ["ipc_lock"], "in capitals"),
    setting("engine_gpu_devices", ["all"], "a CDI name"),
    setting("engine_volumes", ["cache:/cache"], "from a path that is not absolute"),
    setting("engine_volumes", ["/cache:.cache"], "which Docker refuses"),
    setting("rdma_hcas", ["mlx5_0"], "DEVICE:PORT"),
    setting("rdma_devices", ["uverbs0"], "a device file"),
    setting("endpoint_routes", ["v1/models"], "begins with /"),
]

SECRETS = [
    setting("endpoint_api_keys", ["changeme"], "is a placeholder"),
    setting("endpoint_api_keys", [""], "holds an empty secret"),
    setting("endpoint_api_keys", ["0123 4567 89ab cdef"], "no HTTP header can carry"),
    setting("endpoint_api_keys", ["0123456789abcdef"] * 2, "each key once"),
    setting(
        "engine_image_registry_password",
        "<your password>",
        "is a placeholder",
        more={"engine_image_registry_username": "u"},
    ),
]

TOGETHER = [
    setting("endpoint_port", 6379, "are the same port", more={"ray_cluster_port": 6379}),
    setting("endpoint_port", 23333, "lmdeploy_server_port", case="default of another"),
    setting("lmdeploy_dist_port", 10500, "range of Ray's worker ports"),
    setting("ray_cluster_max_worker_port", 10050, "range of Ray's worker ports is too small"),
    setting("ray_cluster_min_worker_port", 20000, "too small", case="lowest above highest"),
    setting("endpoint_tls_key_path", "/etc/tls/key.pem", "no certificate"),
    setting("engine_image_registry_username", "u", "user and password"),
    setting("engine_environment", {"A": "b\nc"}, "a line break in A"),
    setting("engine_environment", {"A": True}, "a boolean for A"),
    setting("engine_environment", {"A B": "c"}, "no name of an environment variable"),
    setting("engine_environment", {"LMDEPLOY_X": ""}, "at which LMDeploy stops"),
    setting("lmdeploy_options", {"api-keys": ["k"]}, "is the setting endpoint_api_keys"),
    setting("lmdeploy_options", {"tp": 8}, "is the setting lmdeploy_tp"),
    setting("lmdeploy_options", {"--x y": 1}, "is no option of"),
    setting("lmdeploy_options", {"dp": 2}, "belongs to another layout"),
    setting("lmdeploy_options", {"nnodes": 2}, "has no effect on tensor parallelism"),
    setting("docker_engine_options", {"data-root": "/x"}, "is the setting docker_engine_data_path"),
    Case(
        id="one host of a replica differs",
        files={"hosts.ini": HOSTS, "host_vars/gpu-b.yml": "engine_image_name: x/y:1\n"},
        where="host_vars/gpu-b.yml:1",
        told="engine_image_name differs within replica 'dsv3'",
    ),
    Case(
        id="one node address twice",
        files={
            "hosts.ini": HOSTS,
            "host_vars/gpu-a.yml": "node_network_address: 198.51.100.1\n",
            "host_vars/gpu-b.yml": "node_network_address: 198.51.100.1\n",
        },
        where="host_vars/gpu-b.yml:1",
        told="have the same node_network_address",
    ),
    Case(
        id="IPv4 and IPv6 mixed",
        files={
            "hosts.ini": HOSTS,
            "host_vars/gpu-a.yml": "node_network_address: 198.51.100.1\n",
            "host_vars/gpu-b.yml": "node_network_address: '2001:db8::2'\n",
        },
        where="host_vars/gpu-b.yml:1",
        told="IPv4 and IPv6 are mixed",
    ),
]

TEMPLATES = [
    setting("model_weights_path", "{{ data_root }}/v3", "refers to 'data_root', which nothing defines"),
    setting("model_weights_name", "{% if %}", "template cannot be read"),
    setting("engine_environment", {"A": "{{ 1 / 0 }}"}, "template cannot be read"),
]

OPTIONS = [
    text("-e without a value", "sets no variable", HOSTS, where="-e", args=("-e", "lmdeploy_tp")),
    text("-e of a missing file", "there is no such", HOSTS, where="gone.yml", args=("-e", "@gone.yml")),
    text("-e of broken JSON", "-e cannot be read", HOSTS, where="", args=("-e", '{"a": ')),
    text("-e that is bottomless", "nested too deeply", HOSTS, where="-e", args=("-e", "[" * 100_000)),
    text("-e of a list", "sets no variable", HOSTS, where="", args=("-e", "[1, 2]")),
    text("-e of a wrong type", "lmdeploy_tp has the wrong type", HOSTS, where="-e", args=("-e", "lmdeploy_tp=x")),
    text("-e of an unknown setting", "lmdeploy_tpp is no setting", HOSTS, where="-e", args=("-e", "lmdeploy_tpp=8")),
    Case(
        id="-e of a file with a key twice",
        files={"hosts.ini": HOSTS, "more.yml": "x: 1\nx: 2\n"},
        args=("-e", "@{folder}/more.yml"),
        where="more.yml:2",
        told="is there twice",
    ),
    text("no such verb", "Did you mean 'status'", HOSTS, where="", args=("stauts",)),
    text("no such option", "--check", HOSTS, where="", args=("--chek",)),
    text("option of another verb", "--check means nothing to 'status'", HOSTS, where="", args=("-C", "status")),
    text("destroy without a word", "Add --yes", HOSTS, where="", args=("destroy",)),
]


def released(name: str, told: str, content: str, where: str = "release.yml:1") -> Case:
    """A case of a release file."""
    return Case(
        id=f"release: {name}",
        files={"hosts.ini": HOSTS, "release.yml": content},
        args=("--release", "{folder}/release.yml"),
        where=where,
        told=told,
    )


RELEASES = [
    released("a setting of a site", "endpoint_port is no part of a release", "endpoint_port: 1\n"),
    released("a setting of a host", "node_network_address is no part", "node_network_address: 192.0.2.7\n"),
    released("a misspelt setting", "Did you mean 'engine_image_digest'?", f"engine_image_digst: {DIGEST}\n"),
    released("a secret", "a release holds no secrets", "endpoint_api_keys: [0123456789abcdef]\n"),
    released("without a name", "this release has no name", "lmdeploy_tp: 16\n", where="release.yml"),
    released("empty", "this release has no name", "", where="release.yml"),
    released("a list", "not a mapping", "- lmdeploy_tp: 16\n"),
    released("encrypted", "a release holds no secrets", "$ANSIBLE_VAULT;1.1;AES256\n00\n", where="release.yml"),
    released(
        "a wrong value",
        "is out of range",
        "lmdeploy_release_name: a\nlmdeploy_cache_max_entry_count: 1.5\n",
        where="release.yml:2",
    ),
    Case(
        id="release: missing",
        files={"hosts.ini": HOSTS},
        args=("--release", "gone.yml"),
        where="gone.yml",
        told="there is no such",
    ),
    Case(
        id="release: a directory",
        files={"hosts.ini": HOSTS},
        args=("--release", "{folder}"),
        where="",
        told="a directory is where a file belongs",
    ),
]


def vaulted(name: str, told: str, *args: str, inline: bool = False, **more: Any) -> Case:
    """A case of an encrypted file, or of one encrypted value."""
    file = "group_vars/all.yml"
    secret = _inline("endpoint_api_keys", "x") if inline else _encrypted("endpoint_port: 8000\n")
    return Case(
        id=name,
        files={"hosts.ini": HOSTS, file: secret, "password": "wrong", **more.pop("files", {})},
        args=args,
        told=told,
        prepare=more.pop("prepare", _mode("password", 0o600)),
        where=more.pop("where", file),
    )


PASSWORD = ("--vault-password-file", "{folder}/password")
VAULTS = [
    vaulted("encrypted file, no password", "no vault password is given"),
    vaulted("encrypted value, no password", "no vault password is given", inline=True, where="all.yml:1"),
    vaulted("encrypted file, wrong password", "does not open this", *PASSWORD),
    vaulted("encrypted value, wrong password", "does not open this", *PASSWORD, inline=True),
    vaulted(
        "password file for everybody",
        "can be read by other users",
        *PASSWORD,
        prepare=_mode("password", 0o640),
        where="password",
    ),
    vaulted("password file is empty", "is empty", *PASSWORD, files={"password": "\n"}, where="password"),
    vaulted("password file is a directory", "is a directory", "--vault-password-file", "{folder}", where=""),
    vaulted("password file is missing", "no such vault password file", "--vault-password-file", "/nowhere", where=""),
]

CASES = [
    *PATHS,
    *TEXTS,
    *GROUPS,
    *MACHINES,
    *NAMES,
    *TYPES,
    *RANGES,
    *SECRETS,
    *TOGETHER,
    *TEMPLATES,
    *OPTIONS,
    *RELEASES,
    *VAULTS,
]


class Touched(BaseException):
    """A playbook would have been run."""


@pytest.fixture(autouse=True)
def _no_playbook(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise Touched

    monkeypatch.setattr(runner, "run", refuse)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_is_refused(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "site"
    folder.mkdir()
    for name, content in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if case.prepare:
        case.prepare(folder)
    inventory = folder / (case.inventory or next(iter(case.files)))
    args = [argument.replace("{folder}", str(folder)) for argument in case.args]

    began = time.process_time()
    assert cli.run(["--inventory", str(inventory), *args]) == 2
    # Of this process alone, so that a busy machine does not count.
    assert time.process_time() - began < 2

    told = capsys.readouterr()
    assert told.out == ""
    assert case.told in told.err
    assert case.where in told.err
    assert "Traceback" not in told.err
    assert "remedy:" in told.err or "Usage:" in told.err


def test_enough_cases() -> None:
    assert len({case.id for case in CASES}) == len(CASES) >= 60


def test_all_mistakes_are_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hosts.ini").write_text(HOSTS.replace(".12", ".11") + "[dsv3_head]\ngpu-c\n")
    (tmp_path / "group_vars").mkdir()
    (tmp_path / "group_vars" / "all.yml").write_text("lmdeploy_tpp: 1\nendpoint_port: 0\n")
    assert cli.run(["-i", str(tmp_path / "hosts.ini"), "--json"]) == 2
    errors = json.loads(capsys.readouterr().out)["error"]["errors"]
    assert [error["key"] for error in errors] == [
        "dsv3_head",
        "ansible_host",
        "lmdeploy_tpp",
        "endpoint_port",
    ]


def test_unreadable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "hosts.ini"
    path.write_text(HOSTS)
    path.chmod(0)
    assert cli.run(["-i", "/dev/null"]) == 2  # imports everything while that is still allowed
    capsys.readouterr()
    root = os.geteuid() == 0
    if root:  # root reads everything
        os.seteuid(65534)
    try:
        status = cli.run(["-i", str(path)])
    finally:
        if root:
            os.seteuid(0)
    assert status == 2
    assert "cannot be read: Permission denied" in capsys.readouterr().err


def test_a_secret_in_a_mistake_is_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hosts.ini").write_text(HOSTS)
    (tmp_path / "group_vars").mkdir()
    (tmp_path / "group_vars" / "all.yml").write_text("endpoint_api_keys: hunter2-hunter2\n")
    assert cli.run(["-i", str(tmp_path / "hosts.ini")]) == 2
    told = capsys.readouterr()
    assert "(hidden)" in told.err
    assert "hunter2" not in told.err + told.out


_CHARACTERS = st.characters(codec="utf-8", exclude_categories=()) | st.sampled_from("[]{}:=,\n \t'\"#&*!|>%-$\\")
_LINES = st.sampled_from([*HOSTS.splitlines(), "[dsv3:children]", "[dsv3:vars]", "dsv3:", "  hosts:", "---", ""])
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.just("{{ x }}"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_NAMES = st.sampled_from(
    ["dsv3", "dsv3_head", "dsv3_workers", "all", "hosts", "children", "vars", "lmdeploy_tp", "endpoint_api_keys"]
)
_TREES = st.recursive(_VALUES, lambda inner: st.dictionaries(_NAMES, inner, max_size=4), max_leaves=12)


class TestNoInputMakesATraceback:
    """Whatever a file holds, the answer is exit 2 with a message, or that the playbook would be run."""

    def _read(self, folder: Path, name: str, content: str) -> None:
        path = folder / name
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
        try:
            status = cli.run(["-i", str(path)])
        except Touched:
            status = 0
        assert status in (0, 2)

    _quick = settings(
        max_examples=60,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )

    @_quick
    @given(content=st.text(_CHARACTERS, max_size=200), ending=st.sampled_from([".ini", ".yml", ""]))
    def test_any_text(self, tmp_path: Path, content: str, ending: str) -> None:
        self._read(tmp_path, f"hosts{ending}", content)

    @_quick
    @given(
        lines=st.lists(_LINES | st.text(_CHARACTERS, max_size=20), max_size=12),
        ending=st.sampled_from([".ini", ".yml", ""]),
    )
    def test_lines_of_inventories(self, tmp_path: Path, lines: list[str], ending: str) -> None:
        self._read(tmp_path, f"hosts{ending}", "\n".join(lines))

    @_quick
    @given(tree=_TREES)
    def test_any_yaml(self, tmp_path: Path, tree: Any) -> None:
        self._read(tmp_path, "hosts.yml", yaml.safe_dump(tree, allow_unicode=True))

    @_quick
    @given(value=_VALUES, name=st.sampled_from(["lmdeploy_tp", "endpoint_api_keys", "engine_environment"]))
    def test_any_value_of_a_setting(self, tmp_path: Path, value: Any, name: str) -> None:
        variables = {"vars": {name: value}}
        self._read(
            tmp_path,
            "hosts.yml",
            yaml.safe_dump({"dsv3_head": {"hosts": {"a": {}}, **variables}}, allow_unicode=True),
        )
