"""Inventories of every kind, read as Ansible reads them. What is refused is in test_bad_input.py."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from deploy_dsv3 import content, inventory, topology
from deploy_dsv3.errors import ConfigErrors
from deploy_dsv3.inventory import COMMAND_LINE, Inventory, VaultOptions, check_secret_file

INI = """\
[dsv3_head]
gpu-a ansible_host=192.0.2.11 lmdeploy_tp=16 rdma_required=True

[dsv3_workers]
gpu-[b:c]

[dsv3_workers:vars]
engine_environment={"A": "b"}
"""
YAML = """\
dsv3:
  children:
    dsv3_head:
      hosts:
        gpu-a:
          ansible_host: 192.0.2.11
          lmdeploy_tp: 16
          rdma_required: true
    dsv3_workers:
      hosts: {gpu-b: {}, gpu-c: {}}
      vars:
        engine_environment: {A: "b"}
"""


def write(folder: Path, **files: str) -> Path:
    """Files below a folder (``__`` in a name is a slash, ``_dot_`` a dot); the path of the first."""
    paths = []
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        paths.append(path)
    return paths[0]


def encrypted(plain: str) -> str:
    from ansible.parsing.vault import VaultLib, VaultSecret

    secret = VaultSecret(b"right")
    text: str = VaultLib([("default", secret)]).encrypt(plain, secret).decode()
    return text


def script(folder: Path) -> Path:
    listing = {
        "dsv3_head": {"hosts": ["gpu-a"]},
        "dsv3_workers": {"hosts": ["gpu-b", "gpu-c"], "vars": {"engine_environment": {"A": "b"}}},
        "_meta": {"hostvars": {"gpu-a": {"ansible_host": "192.0.2.11", "lmdeploy_tp": 16, "rdma_required": True}}},
    }
    path = write(folder, inventory=f"#!/bin/sh\ncat <<'END'\n{json.dumps(listing)}\nEND\n")
    path.chmod(stat.S_IRWXU)
    return path


class TestEveryKind:
    @pytest.mark.parametrize("kind", ["ini", "no ending", "yml", "yaml", "json", "script", "directory"])
    def test_says_the_same(self, kind: str, tmp_path: Path) -> None:
        if kind == "script":
            path = script(tmp_path)
        elif kind == "directory":
            path = write(
                tmp_path,
                site__10_dot_ini="[dsv3_head]\ngpu-a ansible_host=192.0.2.11\n[dsv3_workers]\ngpu-[b:c]\n",
                site__group_vars__dsv3_workers__env_dot_yml="engine_environment: {A: b}\n",
                site__group_vars__all="rdma_required: true\n",
                site__host_vars__gpu_DASH_a="",
            ).parent
            (path / "host_vars" / "gpu-a.json").write_text('{"lmdeploy_tp": 16}')
        elif kind in ("ini", "no ending"):
            path = write(tmp_path, **{"hosts_dot_ini" if kind == "ini" else "hosts": INI})
        elif kind == "json":
            import yaml

            path = write(tmp_path, hosts_dot_json=json.dumps(yaml.safe_load(YAML)))
        else:
            path = write(tmp_path, **{f"hosts_dot_{kind}": YAML})
        loaded = inventory.load([path])
        assert topology.build(loaded.groups).hosts == ("gpu-a", "gpu-b", "gpu-c")
        assert loaded.variable("gpu-a", "ansible_host").value == "192.0.2.11"
        assert loaded.variable("gpu-a", "lmdeploy_tp").value == 16
        assert loaded.variable("gpu-a", "rdma_required").value is True
        value = loaded.variable("gpu-b", "engine_environment").value
        assert value == {"A": "b"}
        assert type(value) is dict

    def test_the_example(self) -> None:
        loaded = inventory.load([content.example_inventory() / "prod.ini"])
        deployment = topology.build(loaded.groups)
        assert [(r.name, r.head, r.workers) for r in deployment.replicas] == [("dsv3", "gpu-01", ("gpu-02",))]
        assert not inventory.check_hosts(loaded, deployment.hosts)

    def test_several_sources(self, tmp_path: Path) -> None:
        one = write(tmp_path, a__hosts_dot_ini="[dsv3_head]\nx lmdeploy_tp=8\n")
        two = write(tmp_path, b__hosts_dot_ini="[dsv3_workers]\ny\n[all:vars]\nlmdeploy_tp=4\n")
        loaded = inventory.load([one, two])
        assert loaded.hosts == ("x", "y")
        assert loaded.variable("x", "lmdeploy_tp").value == 8
        assert loaded.label == f"{one}, {two}"


class TestWhereAValueIs:
    def test_file_and_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(
            tmp_path,
            hosts_dot_ini=INI,
            group_vars__all_dot_yml="---\nrdma_required: false\nendpoint_routes:\n  - /v1\n",
            host_vars__gpu="",
        )
        (tmp_path / "host_vars" / "gpu-b.yml").write_text("\n\nrdma_required: true\n")
        monkeypatch.chdir(tmp_path)
        loaded = inventory.load([Path("hosts.ini")])

        def where(host: str, name: str) -> tuple[str, int | None, str]:
            variable = loaded.variable(host, name)
            return variable.file, variable.line, variable.source

        assert where("gpu-a", "lmdeploy_tp") == ("hosts.ini", 2, "ini")
        assert where("gpu-a", "rdma_required") == ("hosts.ini", 2, "ini")
        assert where("gpu-b", "rdma_required") == ("host_vars/gpu-b.yml", 3, "yaml")
        assert where("gpu-c", "rdma_required") == ("group_vars/all.yml", 2, "yaml")
        assert where("gpu-c", "endpoint_routes") == ("group_vars/all.yml", 3, "yaml")
        assert where("gpu-c", "engine_environment") == ("hosts.ini", 8, "ini")

    def test_the_command_line(self, tmp_path: Path) -> None:
        path = write(tmp_path, hosts_dot_ini=INI, more_dot_yml="endpoint_port: 9000\nrdma_required: false\n")
        more = tmp_path / "more.yml"
        loaded = inventory.load([path], extra_vars=[f"@{more}", "lmdeploy_tp=8 a='b c'", '{"rdma_gid_index": 3}'])
        values = {
            name: (v.value, v.file, v.source)
            for name in ("endpoint_port", "rdma_required", "lmdeploy_tp", "a", "rdma_gid_index")
            for v in [loaded.variable("gpu-a", name)]
        }
        assert values == {
            "endpoint_port": (9000, str(more), "yaml"),
            "rdma_required": (False, str(more), "yaml"),
            "lmdeploy_tp": ("8", COMMAND_LINE, "extra"),
            "a": ("b c", COMMAND_LINE, "extra"),
            "rdma_gid_index": (3, COMMAND_LINE, "extra"),
        }

    def test_a_later_extra_variable_wins(self, tmp_path: Path) -> None:
        loaded = inventory.load([write(tmp_path, hosts_dot_ini=INI)], extra_vars=["a=1", "a=2"])
        assert loaded.variable("gpu-b", "a").value == "2"


class TestTemplates:
    @pytest.fixture
    def loaded(self, tmp_path: Path) -> Inventory:
        return inventory.load(
            [
                write(
                    tmp_path,
                    hosts_dot_ini=INI,
                    group_vars__all_dot_yml=(
                        "base: /data\n"
                        "model_weights_path: '{{ base }}/v3'\n"
                        "lmdeploy_session_len: '{{ 2 * 16384 }}'\n"
                        "node_network_address: '{{ ansible_default_ipv4.address }}'\n"
                        "model_weights_name: '{{ nothing }}'\n"
                        "first_token_prompt: !unsafe '{{ braces }}'\n"
                    ),
                )
            ]
        )

    def test_what_can_be_is_resolved_with_its_type(self, loaded: Inventory) -> None:
        path = loaded.variable("gpu-a", "model_weights_path")
        assert (path.value, path.pending, path.templated, path.line) == ("/data/v3", False, True, 2)
        assert loaded.variable("gpu-a", "lmdeploy_session_len").value == 32768

    def test_what_needs_the_host_waits(self, loaded: Inventory) -> None:
        address = loaded.variable("gpu-a", "node_network_address")
        assert (address.pending, address.error) == (True, "")

    def test_what_nothing_defines_is_an_error(self, loaded: Inventory) -> None:
        assert "'nothing'" in loaded.variable("gpu-a", "model_weights_name").error

    def test_an_unknown_variable(self, loaded: Inventory) -> None:
        with pytest.raises(KeyError):
            loaded.variable("gpu-a", "no_such_thing")


class TestVault:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        inline = "\n".join(f"    {line}" for line in encrypted("hidden key").splitlines())
        write(
            tmp_path,
            hosts_dot_ini=INI,
            group_vars__all__vault_dot_yml=encrypted("endpoint_port: 9000\n"),
            group_vars__all__plain_dot_yml=f"endpoint_api_keys: !vault |\n{inline}\n",
            password="right\n",
        )
        (tmp_path / "password").chmod(0o600)
        return tmp_path

    @pytest.mark.parametrize("form", ["{}", "default@{}", "prod@{}"])
    def test_password_file(self, folder: Path, form: str) -> None:
        vault = VaultOptions(password_files=(form.format(folder / "password"),))
        loaded = inventory.load([folder / "hosts.ini"], vault=vault)
        port, key = (loaded.variable("gpu-a", name) for name in ("endpoint_port", "endpoint_api_keys"))
        assert (port.value, key.value, key.vaulted) == (9000, "hidden key", True)
        assert port.vaulted, "in an encrypted file, though not itself"
        assert type(key.value) is str

    def test_typed_password(self, folder: Path) -> None:
        vault = VaultOptions(password="right")
        assert "right" not in repr(vault)
        loaded = inventory.load([folder / "hosts.ini"], vault=vault)
        assert loaded.variable("gpu-a", "endpoint_api_keys").value == "hidden key"

    def test_program_that_prints_the_password(self, folder: Path) -> None:
        program = folder / "password.sh"
        program.write_text("#!/bin/sh\necho right\n")
        program.chmod(0o755)
        loaded = inventory.load([folder / "hosts.ini"], vault=VaultOptions(password_files=(str(program),)))
        assert loaded.variable("gpu-a", "endpoint_port").value == 9000

    def test_what_nobody_asks_for_need_not_open(self, folder: Path) -> None:
        (folder / "group_vars" / "all" / "vault.yml").unlink()
        loaded = inventory.load([folder / "hosts.ini"])
        assert loaded.variable("gpu-a", "lmdeploy_tp").value == 16
        assert loaded.variable("gpu-a", "endpoint_api_keys").error


class TestSelect:
    @pytest.mark.parametrize(
        ("pattern", "hosts"),
        [
            ("gpu-b", ("gpu-b",)),
            ("dsv3_workers", ("gpu-b", "gpu-c")),
            ("all:!dsv3_head", ("gpu-b", "gpu-c")),
            ("gpu-*,!gpu-b", ("gpu-a", "gpu-c")),
            ("dsv3_workers[0]", ("gpu-b",)),
        ],
    )
    def test_patterns(self, tmp_path: Path, pattern: str, hosts: tuple[str, ...]) -> None:
        loaded = inventory.load([write(tmp_path, hosts_dot_ini=INI)])
        assert loaded.select(pattern) == hosts
        assert loaded.select("all") == ("gpu-a", "gpu-b", "gpu-c")

    def test_a_misspelt_host_is_suggested(self, tmp_path: Path) -> None:
        loaded = inventory.load([write(tmp_path, hosts_dot_ini=INI)])
        with pytest.raises(ConfigErrors, match="Did you mean 'gpu-a'"):
            loaded.select("gpu_a")

    def test_a_file_of_hosts(self, tmp_path: Path) -> None:
        loaded = inventory.load([write(tmp_path, hosts_dot_ini=INI, limit="gpu-c\n")])
        assert loaded.select(f"@{tmp_path / 'limit'}") == ("gpu-c",)


def test_files_that_are_never_read_are_warned_of(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        hosts_dot_ini=INI,
        group_vars__dsv3_heads_dot_yml="x: 1\n",
        group_vars__all_dot_ini="x=1\n",
        host_vars__web_dot_yml="x: 1\n",
    )
    warnings = inventory.load([path]).warnings
    assert len(warnings) == 3
    assert "all.ini is never read" in warnings[0]
    assert "no group 'dsv3_heads'; did you mean 'dsv3_head'?" in warnings[1]
    assert "no host 'web'" in warnings[2]


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, hosts_dot_ini=INI + "[all:vars]\nname=x\n")
    inventory.load([path]).variable("gpu-a", "name")
    with pytest.raises(ConfigErrors):
        inventory.load([write(tmp_path, b__hosts_dot_yml="dsv3_head:\n  hosts: [a]\n")])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("mode", "content", "found"), [(0o600, "x", None), (0o640, "x", "0640"), (0o600, " ", "")])
def test_secret_files(tmp_path: Path, mode: int, content: str, found: str | None) -> None:
    path = tmp_path / "secret"
    path.write_text(content)
    path.chmod(mode)
    problem = check_secret_file(path, what="token file")
    assert (problem is None) == (found is None)
    if problem:
        assert "token file" in problem.message
        assert (found or "") in problem.found
