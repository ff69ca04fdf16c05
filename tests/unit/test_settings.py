"""The catalogue, the check of values, and what is told of them. What is refused is in test_bad_input.py."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy_dsv3 import content, inventory, serving, setting_rules, settings, settings_text, topology
from deploy_dsv3.errors import ConfigErrors, InternalError
from deploy_dsv3.settings import Setting, Settings, catalogue

HOSTS = "[dsv3_head]\ngpu-a\n[dsv3_workers]\ngpu-b\n"
SPEC = """\
argument_specs:
  main:
    short_description: Pump
    options:
      pump_port: {type: int, default: 80, description: "Port that it listens on."}
      pump_mode: {type: str, default: slow, choices: [slow, fast], description: "How it runs."}
      pump_on: {type: bool, default: true, description: "Whether it runs."}
      pump_wait_timeout_s: {type: int, default: 5, description: "Longest wait [seconds].", aliases: [pump_wait]}
      pump_key: {type: str, default: "", no_log: true, description: "Its secret."}
      pump_names: {type: list, elements: str, default: [], description: ["Its names.", "All of them."]}
      pump_share: {type: float, default: 0.5, description: "Its share."}
      pump_branch: {type: str, default: "1", description: "Its branch."}
      pump_given: {type: str, default: "", description: "Handed in by the playbook; set pump_key."}
"""


@pytest.fixture
def known(tmp_path: Path) -> dict[str, Setting]:
    role = tmp_path / "roles" / "pump"
    (role / "meta").mkdir(parents=True)
    (role / "defaults").mkdir()
    (role / "meta" / "argument_specs.yml").write_text(SPEC)
    (role / "defaults" / "main.yml").write_text("pump_port: 8080\n")
    return dict(catalogue(tmp_path / "roles"))


def resolve(
    folder: Path,
    variables: str = "",
    *,
    known: dict[str, Setting] | None = None,
    hosts: str = HOSTS,
    extra: tuple[str, ...] = (),
    **host_vars: str,
) -> Settings:
    """Settings of an inventory; `variables` is group_vars/all.yml, `gpu_b=` host_vars/gpu-b.yml."""
    site = folder / "site"
    (site / "group_vars").mkdir(parents=True)
    (site / "host_vars").mkdir()
    (site / "hosts.ini").write_text(hosts)
    (site / "group_vars" / "all.yml").write_text(variables)
    for host, text in host_vars.items():
        (site / "host_vars" / f"{host.replace('_', '-')}.yml").write_text(text)
    loaded = inventory.load([site / "hosts.ini"], extra_vars=extra)
    deployment = topology.build(loaded.groups)
    return settings.resolve(loaded, deployment.hosts, deployment, known=known)


class TestCatalogue:
    def test_a_setting_is_as_its_role_describes_it(self, known: dict[str, Setting]) -> None:
        assert known["pump_wait_timeout_s"] == Setting(
            name="pump_wait_timeout_s",
            role="pump",
            type="int",
            default=5,
            doc="Longest wait [seconds].",
            unit="seconds",
            former_names=("pump_wait",),
        )
        assert known["pump_mode"].choices == ("slow", "fast")
        assert known["pump_names"].doc == "Its names. All of them."
        assert known["pump_key"].secret
        assert known["pump_given"].internal

    def test_the_default_is_the_roles_own(self, known: dict[str, Setting]) -> None:
        assert known["pump_port"].default == 8080

    def test_a_broken_role_is_a_defect(self, tmp_path: Path) -> None:
        meta = tmp_path / "roles" / "x" / "meta"
        meta.mkdir(parents=True)
        (meta / "argument_specs.yml").write_text("[")
        with pytest.raises(InternalError, match=r"argument_specs\.yml"):
            catalogue(tmp_path / "roles")


class TestOurRoles:
    """The roles of this repository."""

    @pytest.mark.parametrize(
        "path", sorted(content.roles().glob("*/meta/argument_specs.yml")), ids=lambda p: p.parts[-3]
    )
    def test_a_default_is_the_same_in_both_files(self, path: Path) -> None:
        options = yaml.safe_load(path.read_text())["argument_specs"]["main"].get("options", {})
        defaults_file = path.parents[1] / "defaults" / "main.yml"
        defaults = yaml.safe_load(defaults_file.read_text()) or {} if defaults_file.exists() else {}
        # What the caller must hand in has no default, whatever stands in for it.
        optional = {name: option for name, option in options.items() if not option.get("required")}
        public = {name: value for name, value in defaults.items() if not name.startswith("__")}
        public = {name: value for name, value in public.items() if name in optional or name not in options}
        described = {name: option.get("default") for name, option in optional.items()}
        assert public == described

    def test_every_setting_has_its_roles_prefix_and_a_description(self) -> None:
        for name, setting in catalogue().items():
            assert name.startswith(f"{setting.role}_")
            assert setting.doc.endswith("."), name
            assert setting.type in ("str", "int", "float", "bool", "list", "dict", "path"), name

    def test_every_default_is_of_its_type_and_obeys_the_rules(self) -> None:
        for name, setting in catalogue().items():
            variable = inventory.Variable(name=name, value=setting.default, source="yaml")
            if setting.default is None:
                continue
            assert not settings._typed(setting, variable).problem, name
            if not setting.is_unset(setting.default):
                assert not setting_rules.problems(name, setting.type, setting.default, setting.default), name

    def test_the_defaults_fit_together(self, tmp_path: Path) -> None:
        made = resolve(tmp_path)
        assert set(made.values) == {"gpu-a", "gpu-b"}
        assert made.of("gpu-a")["endpoint_port"] == 8000

    @pytest.mark.parametrize(
        "known_name", sorted({*serving._SETTINGS.values(), *setting_rules._DAEMON_OPTIONS.values()})
    )
    def test_rules_name_settings_that_exist(self, known_name: str) -> None:
        assert known_name in catalogue()

    def test_every_rule_is_for_some_setting(self) -> None:
        for rule in setting_rules.RULES:
            assert any(rule.names.fullmatch(name) for name in catalogue()), rule.names.pattern

    def test_a_port_is_named_one(self) -> None:
        for name, setting in catalogue().items():
            if re.search(r"\bport\b", setting.doc.split(".")[0], re.I) and setting.type == "int":
                assert name.endswith("_port"), name


class TestValues:
    def test_value_and_source(self, tmp_path: Path, known: dict[str, Setting]) -> None:
        made = resolve(tmp_path, "pump_port: 81\n", known=known, gpu_b="pump_mode: fast\n")
        port, mode = made.values["gpu-b"]["pump_port"], made.values["gpu-b"]["pump_mode"]
        assert (port.value, Path(port.file).name, port.line) == (81, "all.yml", 1)
        assert mode.source.endswith("host_vars/gpu-b.yml:1")
        assert made.values["gpu-a"]["pump_mode"].source == "default"
        assert made.of("gpu-a")["pump_mode"] == "slow"

    def test_ini_values_are_literals(self, tmp_path: Path, known: dict[str, Setting]) -> None:
        lines = "pump_port=81\npump_on=False\npump_names=['a', 'b']\npump_share=1\npump_branch=580\n"
        made = resolve(tmp_path, known=known, hosts=f"{HOSTS}[all:vars]\n{lines}").of("gpu-a")
        assert (made["pump_port"], made["pump_on"], made["pump_names"]) == (81, False, ["a", "b"])
        assert (made["pump_share"], made["pump_branch"]) == (1.0, "580")

    @pytest.mark.parametrize("word", ["true", "True", "yes", "on", "1"])
    def test_text_of_the_command_line_gets_its_type(self, tmp_path: Path, known: dict[str, Setting], word: str) -> None:
        made = resolve(tmp_path, known=known, extra=(f"pump_on={word} pump_port=81", "pump_share=.25 pump_branch=7"))
        assert made.of("gpu-b")["pump_on"] is True
        assert made.extra_vars == {"pump_on": True, "pump_port": 81, "pump_share": 0.25}
        assert made.of("gpu-b")["pump_branch"] == "7"

    def test_what_depends_on_facts_waits(self, tmp_path: Path, known: dict[str, Setting]) -> None:
        made = resolve(tmp_path, "pump_mode: '{{ ansible_hostname }}'\n", known=known)
        assert made.values["gpu-a"]["pump_mode"].pending

    def test_the_sites_own_variables_are_left_alone(self, tmp_path: Path, known: dict[str, Setting]) -> None:
        resolve(tmp_path, "ntp_servers: [192.0.2.1]\nproxy_env: {}\npumps: 3\nbase_path: x\n", known=known)

    def test_a_renamed_setting_tells_its_new_name(self, tmp_path: Path, known: dict[str, Setting]) -> None:
        with pytest.raises(ConfigErrors, match="Write pump_wait_timeout_s instead"):
            resolve(tmp_path, "pump_wait: 3\n", known=known)

    def test_one_mistake_on_all_hosts_is_told_once(self, tmp_path: Path, known: dict[str, Setting]) -> None:
        with pytest.raises(ConfigErrors) as caught:
            resolve(tmp_path, "pump_port: x\n", known=known, gpu_b="pump_mode: x\n")
        assert [(error.key, error.host) for error in caught.value] == [
            ("pump_port", ""),
            ("pump_mode", "gpu-b"),
        ]


class TestSecrets:
    KEY = "0123456789abcdef0123"

    def test_are_shown_as_set_or_unset(self, tmp_path: Path, known: dict[str, Setting]) -> None:
        made = resolve(tmp_path, known=known, gpu_b=f"pump_key: {self.KEY}\n")
        assert made.values["gpu-b"]["pump_key"].shown == "set"
        assert made.values["gpu-a"]["pump_key"].shown == "unset"
        assert made.secrets == {self.KEY}
        assert self.KEY not in json.dumps(settings_text.document(made, known))

    def test_in_plain_text_are_warned_of(self, tmp_path: Path, known: dict[str, Setting]) -> None:
        made = resolve(tmp_path, f"pump_key: {self.KEY}\nansible_become_password: hunter2\n", known=known)
        told = [warning for warning in made.warnings if "plain text" in warning]
        assert len(told) == 2
        assert all("all.yml" in warning and "ansible-vault" in warning for warning in told)
        assert made.secrets == {self.KEY, "hunter2"}

    def test_on_the_command_line_are_warned_of(self, tmp_path: Path, known: dict[str, Setting]) -> None:
        made = resolve(tmp_path, known=known, extra=(f"pump_key={self.KEY}",))
        assert any("`ps` shows it" in warning for warning in made.warnings)

    def test_from_elsewhere_are_not_warned_of(
        self, tmp_path: Path, known: dict[str, Setting], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PUMP_KEY", self.KEY)
        made = resolve(tmp_path, "pump_key: \"{{ lookup('env', 'PUMP_KEY') }}\"\n", known=known)
        assert made.of("gpu-a")["pump_key"] == self.KEY
        assert not made.warnings


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        ("", "is a moving tag"),
        ("", "whoever reaches the endpoint can use it"),
        ("engine_privileged: true\n", "engine_privileged"),
        ("endpoint_mode: direct\n", "endpoint_mode 'direct'"),
        ("ray_cluster_authentication: disabled\n", "ray_cluster_authentication"),
        ("endpoint_api_keys: [short-key]\n", "less than 16 characters"),
    ],
)
def test_advice(tmp_path: Path, variables: str, part: str) -> None:
    assert any(part in warning for warning in resolve(tmp_path, variables).warnings)


def test_a_pinned_image_needs_no_advice(tmp_path: Path) -> None:
    digest = "sha256:" + "0" * 64
    made = resolve(tmp_path, f"engine_image_digest: {digest}\nendpoint_api_keys: ['{TestSecrets.KEY}']\n")
    assert [warning for warning in made.warnings if "plain text" not in warning] == []


class TestText:
    def test_schema_accepts_what_the_check_accepts(self) -> None:
        from jsonschema import Draft202012Validator

        schema = settings_text.json_schema()
        Draft202012Validator.check_schema(schema)
        validator = Draft202012Validator(schema)
        defaults = {s.name: s.default for s in settings_text.public() if s.default is not None}
        assert validator.is_valid({**defaults, "site_own": 1})

    @pytest.mark.parametrize(
        "variables",
        [
            {"endpoint_port": 0},
            {"endpoint_port": "8000"},
            {"endpoint_mode": "x"},
            {"engine_image_digest": "sha256:0"},
            {"lmdeploy_tpp": 8},
            {"rdma_hcas": ["mlx5_0"]},
            {"dsv3_tp": 8},
        ],
    )
    def test_schema_refuses_what_the_check_refuses(self, variables: dict[str, Any]) -> None:
        from jsonschema import Draft202012Validator

        assert not Draft202012Validator(settings_text.json_schema()).is_valid(variables)

    def test_schema_names_the_successor_of_a_renamed_setting(self, known: dict[str, Setting]) -> None:
        from jsonschema import Draft202012Validator

        schema = settings_text.json_schema(known)
        renamed = schema["properties"]["pump_wait"]
        assert renamed["deprecated"] is True and "pump_wait_timeout_s" in renamed["description"]
        assert not Draft202012Validator(schema).is_valid({"pump_wait": 3})
        assert Draft202012Validator(schema).is_valid({"pump_wait_timeout_s": 3})

    def test_table_goes_between_the_markers(self, known: dict[str, Setting]) -> None:
        text = f"before\n{settings_text.BEGIN}\nold\n{settings_text.END}\nafter\n"
        made = settings_text.insert(text, known)
        assert made.startswith("before\n")
        assert made.endswith("after\n")
        assert '| `pump_mode` | `slow` \\| `fast` | `"slow"` | How it runs. |' in made
        assert "old" not in made
        assert "pump_given" not in made
        assert settings_text.insert(made, known) == made

    @pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
    def test_the_readme_is_up_to_date(self, name: str) -> None:
        assert settings_text.main(["--check", str(Path(__file__).parents[2] / name)]) == 0

    @pytest.mark.parametrize("role", sorted({setting.role for setting in settings_text.public()}))
    def test_the_role_s_readme_is_up_to_date(self, role: str) -> None:
        assert settings_text.main(["--check", str(content.roles() / role / "README.md")]) == 0

    def test_a_document_without_markers_is_refused(self) -> None:
        with pytest.raises(ValueError, match="markers"):
            settings_text.insert("no markers here")

    def test_check_says_whether_a_document_is_up_to_date(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        page = tmp_path / "page.md"
        page.write_text(f"{settings_text.BEGIN}\n{settings_text.END}\n")
        assert settings_text.main(["--check", str(page)]) == 1
        assert "out of date" in capsys.readouterr().err
        assert settings_text.main([str(page)]) == 0
        assert settings_text.main(["--check", str(page)]) == 0

    def test_terminal(self, tmp_path: Path, known: dict[str, Setting]) -> None:
        import io

        made = resolve(tmp_path, "pump_port: 81\n", known=known, gpu_b="pump_mode: fast\n")
        stream = io.StringIO()
        settings_text.render(made, stream, known)
        text = stream.getvalue()
        assert re.search(r"pump_port = 81  \S+all\.yml:1\n", text)
        assert re.search(r'pump_mode = "fast"  \S+gpu-b\.yml:1  on gpu-b\n', text)
        assert 'str, default "slow", one of slow, fast. How it runs.' in text
        assert "pump_key = unset" in text
