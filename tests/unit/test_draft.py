"""`init`: what it writes is what was said, loads as every inventory does, and overwrites nothing."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import string
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from deploy_dsv3 import cli, inventory, settings, verbs
from deploy_dsv3.draft import answers, files, text
from deploy_dsv3.draft.answers import Answers, Host, Replica
from deploy_dsv3.errors import UsageError
from deploy_dsv3.inventory import VaultOptions
from deploy_dsv3.options import Options
from deploy_dsv3.settings import Settings
from deploy_dsv3.topology import Deployment

ROOT = Path(__file__).parents[2]
PAIR = ("--head", "gpu-01=192.0.2.11", "--worker", "gpu-02=192.0.2.12")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


def init(*arguments: str, expect: int = 0, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert cli.run(["init", *arguments, "--json"]) == expect
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def read(folder: Path, **options: Any) -> tuple[Deployment, Settings, inventory.Inventory]:
    """The inventory as every verb reads it."""
    target = verbs.load(Options(inventories=(folder,), **options), whole_replicas=True)
    return target.deployment, target.settings, target.inventory


class TestFlags:
    def test_one_replica(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        told = init(*PAIR, "--user", "ops", "--port", "9000", "--set", "rdma_required=true", capsys=capsys)
        assert told["files"] == ["prod/hosts.ini", "prod/group_vars/dsv3.yml"]
        deployment, found, loaded = read(here / "prod")
        (replica,) = deployment.replicas
        assert (replica.name, replica.head, replica.workers) == ("dsv3", "gpu-01", ("gpu-02",))
        assert loaded.variable("gpu-02", "ansible_host").value == "192.0.2.12"
        assert loaded.variable("gpu-02", "ansible_user").value == "ops"
        assert (found.of("gpu-01")["endpoint_port"], found.of("gpu-01")["rdma_required"]) == (9000, True)
        assert found.of("gpu-01")["engine_image_name"] == answers.SUGGESTED_IMAGE

    def test_settings_shows_the_line(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        init("prod", *PAIR, "--port", "9000", capsys=capsys)
        assert cli.run(["settings", "-i", "prod"]) == 0
        assert re.search(r"endpoint_port = 9000  prod/group_vars/dsv3.yml:\d+", capsys.readouterr().out)

    def test_several_replicas(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["--replica", "a:g1=192.0.2.1,g2=192.0.2.2", "--replica", "b:g3=2001:db8::3"]
        init("fleet", *arguments, capsys=capsys)
        deployment, _, loaded = read(here / "fleet")
        assert [(one.name, one.hosts) for one in deployment.replicas] == [("a", ("g1", "g2")), ("b", ("g3",))]
        assert loaded.variable("g3", "ansible_host").value == "2001:db8::3"

    def test_a_site_without_internet(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        sources = ("--driver-source", "preinstalled", "--toolkit-source", "vendor", "--docker-source", "preinstalled")
        mirror = ("--toolkit-repository", "http://192.0.2.1/toolkit/", "--registry-mirror", "http://192.0.2.1:5000")
        init(*PAIR, *sources, *mirror, capsys=capsys)
        found = read(here / "prod")[1].of("gpu-01")
        assert (found["nvidia_driver_source"], found["docker_engine_source"]) == ("preinstalled", "preinstalled")
        assert found["nvidia_container_toolkit_repository_url"] == "http://192.0.2.1/toolkit/"
        assert found["docker_engine_registry_mirrors"] == ["http://192.0.2.1:5000"]

    def test_text_for_people(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.run(["init", *PAIR]) == 0
        out = capsys.readouterr().out
        assert "wrote prod/hosts.ini" in out and "then: deploy-dsv3 plan --inventory prod" in out
        assert "warning: endpoint_api_keys is empty" in out

    def test_the_image_is_that_of_the_example(self) -> None:
        example = yaml.safe_load((ROOT / "inventory/example/group_vars/dsv3.yml").read_text())
        assert example["engine_image_name"] == answers.SUGGESTED_IMAGE

    def test_each_flag_of_a_setting_is_explained(self) -> None:
        command = cli.cli.get_command(cli.click.Context(cli.cli), "init")
        assert command and command.help
        options = [one for one in command.params if isinstance(one, cli.click.Option)]
        assert options and all(one.help for one in options)


class TestSecrets:
    def test_a_file_of_keys_is_made_once(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        told = init(*PAIR, "--api-keys-file", "keys", capsys=capsys)
        assert told["files"][-1] == str(here / "keys")
        assert (here / "keys").stat().st_mode & 0o777 == 0o600
        (key,) = (here / "keys").read_text().split()
        assert len(key) == 64
        _, found, _ = read(here / "prod")
        assert found.of("gpu-01")["endpoint_api_keys"] == [key] and key in found.secrets
        assert not any("plain text" in warning for warning in found.warnings)
        assert key not in "".join(path.read_text() for path in (here / "prod").rglob("*") if path.is_file())
        told = init(*PAIR, "--api-keys-file", "keys", "--force", capsys=capsys)
        assert str(here / "keys") not in told["files"]
        assert (here / "keys").read_text().split() == [key]

    def test_several_keys_in_a_file_of_the_operators(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        keys = ["0123456789abcdef0", "0123456789abcdef1"]
        (here / "keys").write_text("\n".join(keys) + "\n")
        (here / "keys").chmod(0o600)
        init(*PAIR, "--api-keys-file", "keys", capsys=capsys)
        assert read(here / "prod")[1].of("gpu-01")["endpoint_api_keys"] == keys

    def test_a_vault(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (here / "password").touch(mode=0o600)
        (here / "password").write_text("right\n")
        told = init(*PAIR, "--vault-password-file", "password", capsys=capsys)
        assert told["next"][-2:] == ["--vault-password-file", str(here / "password")]
        vault = (here / "prod" / text.VAULT).read_text()
        assert vault.startswith("$ANSIBLE_VAULT;")
        _, found, _ = read(here / "prod", vault_files=(str(here / "password"),))
        (key,) = found.of("gpu-02")["endpoint_api_keys"]
        assert len(key) == 64 and not any("plain text" in warning for warning in found.warnings)

    def test_a_sudo_password_stays_in_its_file(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (here / "sudo").touch(mode=0o600)
        (here / "sudo").write_text("hunter2-hunter2\n")
        init(*PAIR, "--sudo-password-file", "sudo", capsys=capsys)
        target = verbs.load(Options(inventories=(here / "prod",)), whole_replicas=True)
        assert target.connections(Options(inventories=()))["gpu-01"]["ansible_become_password"] == "hunter2-hunter2"
        assert "hunter2" not in (here / "prod" / text.VARIABLES).read_text()


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "no hosts": ((), "no hosts given"),
    "workers only": (("--worker", "a"), "no head"),
    "both ways": (("--head", "a", "--replica", "r:b"), "--replica is for several"),
    "a replica without hosts": (("--replica", "a"), "is no replica"),
    "a replica's name": (("--replica", "A B:g1"), "cannot be the name of a replica"),
    "a reserved name": (("--replica", "all:g1"), "cannot be the name of a replica"),
    "two replicas of one name": (("--replica", "a:g1", "--replica", "a:g2"), "a_head"),
    "a host's name": (("--head", "gpu 01"), "names no host"),
    "more than a host": (("--head", "a=192.0.2.1 ansible_user=x"), "is not an address"),
    "a line break": (("--head", "a=192.0.2.1\n[all:vars]"), "is not an address"),
    "a port": (("--head", "a:22"), "names no host"),
    "no address": (("--head", "a="), "has no address"),
    "a bad address": (("--head", "a=192.0.2.300"), "no valid IP address"),
    "a bad address as a name": (("--head", "192.0.2.300"), "no valid IP address"),
    "one machine twice": (("--head", "a=192.0.2.1", "--worker", "b=192.0.2.1"), "are the same machine"),
    "one host twice": (("--head", "a", "--worker", "a"), "both head and worker"),
    "a user": ((*PAIR, "--user", "o ps"), "is no user name"),
    "a key that is not there": ((*PAIR, "--ssh-key", "/nowhere/id"), "there is no such SSH private key"),
    "a file with braces": ((*PAIR, "--api-keys-file", "{{x}}"), "has braces"),
    "both places for keys": ((*PAIR, "--api-keys-file", "k", "--vault-password-file", "p"), "exclude each other"),
    "a vault password that is not there": ((*PAIR, "--vault-password-file", "/nowhere/p"), "no such vault password"),
    "a program that prints no password": ((*PAIR, "--vault-password-file", "program"), "password cannot be read"),
    "a sudo password that is not there": ((*PAIR, "--sudo-password-file", "/nowhere/p"), "no such sudo password"),
    "a port out of range": ((*PAIR, "--port", "70000"), "is out of range"),
    "a relative path": ((*PAIR, "--model-path", "models"), "is not absolute"),
    "a digest that is cut off": ((*PAIR, "--digest", "sha256:12"), "is malformed"),
    "two equal ports": ((*PAIR, "--port", "6379"), "are the same port"),
    "no such setting": ((*PAIR, "--set", "lmdeploy_tpp=16"), "Did you mean 'lmdeploy_tp'?"),
    "a setting without a value": ((*PAIR, "--set", "lmdeploy_tp"), "sets nothing"),
    "a wrong type": ((*PAIR, "--set", "lmdeploy_tp=many"), "has the wrong type"),
    "a broken value": ((*PAIR, "--set", "engine_volumes=["), "cannot be read"),
    "a secret in an argument": ((*PAIR, "--set", "endpoint_api_keys=[x]"), "is a secret"),
    "a folder that is a file": (("keys/x", *PAIR), "cannot be written"),
}


@pytest.mark.parametrize(("arguments", "told"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    arguments: tuple[str, ...], told: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "keys").write_text("x")
    (here / "program").write_text("#!/bin/sh\nexit 1\n")
    (here / "program").chmod(0o700)
    before = sorted(here.iterdir())
    assert cli.run(["init", *arguments]) == 2
    err = capsys.readouterr().err
    assert told in err and "Traceback" not in err
    assert [path for path in sorted(here.iterdir()) if path.name != "state"] == before


class TestOverwriting:
    def test_only_with_force(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        init(*PAIR, capsys=capsys)
        (here / "prod/hosts.ini").write_text("mine\n")
        (here / "prod/host_vars").mkdir()
        assert cli.run(["init", *PAIR]) == 2
        assert "prod/hosts.ini, prod/group_vars/dsv3.yml: there already" in capsys.readouterr().err
        assert (here / "prod/hosts.ini").read_text() == "mine\n"
        init(*PAIR, "--force", capsys=capsys)
        assert read(here / "prod")[0].hosts == ("gpu-01", "gpu-02")
        assert (here / "prod/host_vars").is_dir()

    def test_a_vault_from_before_is_not_left_beside_other_keys(
        self, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (here / "password").touch(mode=0o600)
        (here / "password").write_text("right\n")
        init(*PAIR, "--vault-password-file", "password", capsys=capsys)
        assert cli.run(["init", *PAIR, "--api-keys-file", "keys", "--force"]) == 2
        assert "vault.yml is there already, and would be read as well" in capsys.readouterr().err

    def test_a_folder_with_other_files_is_fine(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (here / "prod").mkdir()
        (here / "prod/README.md").write_text("x")
        init(*PAIR, capsys=capsys)
        assert read(here / "prod")[0].hosts == ("gpu-01", "gpu-02")

    def test_a_refused_draft_takes_its_new_key_away_again(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.run(["init", *PAIR, "--api-keys-file", "keys", "--port", "0"]) == 2
        assert not (here / "keys").exists() and not (here / "prod").exists()
        assert "prod/group_vars/dsv3.yml:" in capsys.readouterr().err


# ---------------------------------------------------------------------- the round trip

_NAMES = st.from_regex(r"[a-z0-9_]([a-z0-9_.-]{0,8}[a-z0-9_])?", fullmatch=True).filter(
    lambda name: not re.fullmatch(r"[\d.]+", name) and not name.startswith("dsv3")
)
_ADDRESSES = st.one_of(
    st.just(""), st.ip_addresses(network="198.51.100.0/24"), st.ip_addresses(network="2001:db8::/32")
)
_WORDS = st.text(string.ascii_letters + string.digits + "._-", min_size=1, max_size=12).map(lambda word: f"x{word}")
#: Text that YAML would take for something else.
_TRAPS = st.sampled_from(["true", "null", "1e3", "0x10", "12", "yes", "2020-01-01", "~", "1_000", "0o7"])
_SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "endpoint_port": st.integers(30000, 40000),
        "lmdeploy_session_len": st.integers(0, 10**6),
        "lmdeploy_cache_max_entry_count": st.floats(0.01, 0.99),
        "rdma_required": st.booleans(),
        "model_weights_name": st.one_of(_WORDS, st.sampled_from(["12", "true", "null", "1e3"])),
        "model_weights_path": _WORDS.map(lambda word: f"/data/{word}"),
        "nvidia_driver_branch": st.sampled_from(["580", "570.10"]),
        "nvidia_driver_packages": st.lists(st.one_of(_WORDS, _TRAPS), max_size=3),
        "engine_volumes": st.lists(_WORDS.map(lambda word: f"/{word}:/{word}:ro"), max_size=2),
        "engine_environment": st.dictionaries(
            st.from_regex(r"[A-Z_][A-Z0-9_]{0,8}", fullmatch=True),
            st.one_of(_TRAPS, st.text(st.characters(exclude_categories=("C",), exclude_characters="{}"), max_size=20)),
            max_size=3,
        ),
        "docker_engine_registry_mirrors": st.lists(_WORDS.map(lambda word: f"http://{word}.example"), max_size=2),
        "nvidia_driver_source": st.sampled_from(["vendor", "distribution", "preinstalled"]),
        "endpoint_mode": st.sampled_from(["proxy", "direct"]),
    },
)


@st.composite
def drafts(draw: st.DrawFn) -> Answers:
    names = draw(st.lists(_NAMES, min_size=1, max_size=6, unique=True))
    addresses = draw(
        st.lists(_ADDRESSES, min_size=len(names), max_size=len(names), unique_by=lambda one: one or object())
    )
    hosts = [Host(name=name, address=str(one)) for name, one in zip(names, addresses, strict=True)]
    if len(hosts) > 1 and draw(st.booleans()):
        cut = draw(st.integers(1, len(hosts) - 1))
        parts = {"a_b": hosts[:cut], "r2": hosts[cut:]}
        replicas = tuple(Replica(name=name, head=own[0], workers=tuple(own[1:])) for name, own in parts.items())
    else:
        replicas = answers.single(hosts[0], hosts[1:])
    user = draw(st.one_of(st.just(""), st.from_regex(r"[a-z_][a-z0-9_-]{0,8}", fullmatch=True), st.just("null")))
    return Answers(replicas=replicas, user=user, settings=draw(_SETTINGS))


@examples(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draft=drafts())
def test_what_is_written_is_what_was_said(here: Path, draft: Answers) -> None:
    folder = here / "site"
    files.write(folder, draft, force=True)
    deployment, found, loaded = read(folder)
    said = [(one.name, one.head.name, tuple(host.name for host in one.workers)) for one in draft.replicas]
    assert [(one.name, one.head, one.workers) for one in deployment.replicas] == said
    for host in (host for one in draft.replicas for host in (one.head, *one.workers)):
        own = {name for name in loaded.names(host.name) if name in ("ansible_host", "ansible_user")}
        values = {name: loaded.variable(host.name, name).value for name in own}
        wanted = {"ansible_host": host.address, "ansible_user": draft.user}
        assert values == {name: value for name, value in wanted.items() if value}
        defaults = {name: one.default for name, one in settings.catalogue().items()}
        assert found.of(host.name) == {**defaults, **draft.settings}


def test_what_is_commented_out_is_the_default(here: Path) -> None:
    """Uncommenting all of the settings changes nothing."""
    draft = Answers(replicas=answers.single(Host(name="a"), ()))
    files.write(here / "site", draft, force=False)
    path = here / "site" / text.VARIABLES
    shown = {name for section in text.SECTIONS for name in section.settings} - {"endpoint_api_keys"}
    lines = path.read_text().splitlines()
    entries = [line[2:] for line in lines if re.match(r"# ([a-z_]+:( |$)|  - )", line)]
    uncommented = yaml.safe_load("\n".join(entries))
    assert shown <= uncommented.keys()
    assert {name: uncommented[name] for name in shown} == {name: settings.catalogue()[name].default for name in shown}


# ---------------------------------------------------------------------- a terminal


def at_a_terminal(folder: Path, *arguments: str, replies: list[tuple[str, str]]) -> tuple[int, str]:
    """Run it with a terminal; each reply is typed once its question has been asked."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "deploy_dsv3", "init", *arguments],
        cwd=folder,
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )
    os.close(theirs)
    seen, deadline = "", time.monotonic() + 60
    try:
        for question, reply in replies:
            while question not in seen:
                assert time.monotonic() < deadline, f"never asked {question!r}: {seen}"
                if select.select([ours], [], [], 0.2)[0]:
                    seen += os.read(ours, 4096).decode(errors="replace")
                assert process.poll() is None or question in seen, seen
            seen = seen.partition(question)[2]
            os.write(ours, f"{reply}\n".encode())
        out, _ = process.communicate(timeout=60)
        return process.returncode, out.decode()
    finally:
        process.kill()
        os.close(ours)


def test_a_terminal_is_asked_and_what_cannot_be_is_asked_again(here: Path) -> None:
    code, out = at_a_terminal(
        here,
        "site",
        replies=[
            ("How many copies", "1"),
            ("Head", "not a host"),
            ("names no host", "gpu-01=192.0.2.11"),
            ("Workers", "gpu-02=192.0.2.12 gpu-03=192.0.2.13"),
            ("User of the hosts", "ops"),
            ("SSH private key", ""),
            ("Model", ""),
            ("Folder of its weights", "relative"),
            ("is not absolute", "/srv/v3"),
            ("Engine image", ""),
            ("Port that clients reach", "70000"),
            ("is out of range", "9000"),
            ("Do the hosts reach the internet?", "n"),
            ("Archive of the image", "/srv/image.tar"),
            ("Source of the driver", "preinstalled"),
            ("Source of the container toolkit", "vendor"),
            ("Mirror of NVIDIA's repository of the container toolkit", "http://192.0.2.9/toolkit/"),
            ("Source of Docker", "preinstalled"),
            ("API keys in a file", "file"),
            ("made with a new key", ""),
        ],
    )
    assert code == 0 and "wrote site/hosts.ini" in out
    deployment, checked, loaded = read(here / "site")
    assert deployment.hosts == ("gpu-01", "gpu-02", "gpu-03")
    assert loaded.variable("gpu-03", "ansible_user").value == "ops"
    found = checked.of("gpu-01")
    assert (found["model_weights_path"], found["endpoint_port"]) == ("/srv/v3", 9000)
    assert (found["engine_image_archive_path"], found["nvidia_driver_source"]) == ("/srv/image.tar", "preinstalled")
    assert found["nvidia_container_toolkit_repository_url"] == "http://192.0.2.9/toolkit/"
    assert found["endpoint_api_keys"] == (here / "site.api-keys").read_text().split()


def test_what_flags_say_is_not_asked(here: Path) -> None:
    (here / "password").touch(mode=0o600)
    (here / "password").write_text("right\n")
    code, _ = at_a_terminal(
        here,
        *("--user", "", "--ssh-key", "", "--model", "a/b", "--model-path", "/srv/b", "--image", "x/y:1"),
        *("--port", "9000"),
        replies=[
            ("How many copies", "2"),
            ("Name of the replica", ""),
            ("Head of replica_a", "g1"),
            ("Workers of replica_a", ""),
            ("Name of the replica", "second"),
            ("Head of second", "g2"),
            ("Workers of second", ""),
            ("Do the hosts reach the internet?", "y"),
            ("API keys in a file", "vault"),
            ("File with the vault's password", "password"),
        ],
    )
    assert code == 0
    loaded = inventory.load([here / "prod"], vault=VaultOptions(password_files=(str(here / "password"),)))
    deployment, checked = verbs.check(loaded)
    assert [(one.name, one.hosts) for one in deployment.replicas] == [("replica_a", ("g1",)), ("second", ("g2",))]
    assert checked.of("g2")["model_weights_name"] == "a/b" and len(checked.of("g2")["endpoint_api_keys"]) == 1


def test_questions_that_are_broken_off_write_nothing(here: Path) -> None:
    code, _ = at_a_terminal(here, replies=[("How many copies", "1"), ("Head", "\x04")])
    assert code == 130 and list(here.iterdir()) == []


def test_a_host_is_read() -> None:
    assert answers.read_host(" gpu-01=2001:db8::1 ") == Host(name="gpu-01", address="2001:db8::1")
    with pytest.raises(UsageError):
        answers.read_host("")
