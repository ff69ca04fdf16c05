"""The files of a first inventory. Pure: answers in, text out; what a setting means is told in its role's words."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from deploy_dsv3 import settings
from deploy_dsv3.draft.answers import Answers, Host, Replica
from deploy_dsv3.topology import HEAD_SUFFIX, ROOT_GROUP, WORKERS_SUFFIX

HOSTS, VARIABLES, VAULT = "hosts.ini", f"group_vars/{ROOT_GROUP}.yml", "group_vars/all/vault.yml"
_KEYS = "endpoint_api_keys"
_WIDTH = 110


@dataclass(frozen=True, kw_only=True)
class Section:
    """Settings that belong together for whoever fills them in."""

    title: str
    settings: tuple[str, ...]


#: What an operator is shown first; everything else is in `deploy-dsv3 settings`.
SECTIONS: Sequence[Section] = (
    Section(title="The model", settings=("model_weights_name", "model_weights_path")),
    Section(title="The engine's image", settings=("engine_image_name", "engine_image_digest")),
    Section(
        title="Where clients reach it",
        settings=(
            *("endpoint_address", "endpoint_port", "endpoint_url", _KEYS),
            *("endpoint_tls_certificate_path", "endpoint_tls_key_path", "endpoint_metrics_allow"),
        ),
    ),
    Section(
        title="How much it serves (`deploy-dsv3 plan` says what fits)",
        settings=("lmdeploy_session_len", "lmdeploy_max_batch_size", "lmdeploy_cache_max_entry_count"),
    ),
    Section(
        title="The network between the hosts: derived from them, each can be set",
        settings=("node_network_interface", "rdma_required", "rdma_hcas"),
    ),
    Section(
        title="Where driver, container toolkit, Docker and image come from; mirrors for a site without internet",
        settings=(
            *("nvidia_driver_source", "nvidia_driver_branch"),
            *("nvidia_driver_repository_url", "nvidia_driver_repository_key_url"),
            *("nvidia_container_toolkit_source", "nvidia_container_toolkit_repository_url"),
            "nvidia_container_toolkit_repository_key_url",
            *("docker_engine_source", "docker_engine_repository_url", "docker_engine_repository_key_url"),
            *("docker_engine_registry_mirrors", "docker_engine_insecure_registries", "engine_image_archive_path"),
        ),
    ),
)


def files(answers: Answers) -> dict[str, str]:
    """File name in the inventory's folder to content; a vault is not among them, since it holds a secret."""
    return {HOSTS: _hosts(answers.replicas), VARIABLES: "\n".join(_variables(answers)) + "\n"}


def vault(keys: Sequence[str]) -> str:
    """What a vault holds, before it is encrypted."""
    return _dump({_KEYS: list(keys)})


def _hosts(replicas: Sequence[Replica]) -> str:
    lines = ["# The hosts. Settings are in group_vars; `deploy-dsv3 settings -i` this folder lists all of them."]
    for replica in replicas:
        lines += ["", f"[{replica.name}{HEAD_SUFFIX}]", _host(replica.head)]
        if replica.workers:
            lines += ["", f"[{replica.name}{WORKERS_SUFFIX}]", *map(_host, replica.workers)]
    groups = {replica.name: _groups(replica) for replica in replicas}
    if list(groups) != [ROOT_GROUP]:
        for name, children in groups.items():
            lines += ["", f"[{name}:children]", *children]
        groups = {ROOT_GROUP: list(groups)}
    lines += ["", f"[{ROOT_GROUP}:children]", *groups[ROOT_GROUP]]
    return "\n".join(lines) + "\n"


def _groups(replica: Replica) -> list[str]:
    return [replica.name + suffix for suffix in (HEAD_SUFFIX, *([WORKERS_SUFFIX] if replica.workers else []))]


def _host(host: Host) -> str:
    return f"{host.name} ansible_host={host.address}" if host.address else host.name


def _variables(answers: Answers) -> Iterator[str]:
    yield "---"
    yield "# Settings of all hosts. What is commented out is the default; uncomment a line to change it."
    yield "# deploy-dsv3 settings --schema > dsv3.schema.json   lets editors check this file."
    yield from _title("How to log in: a user with sudo")
    yield from _line("ansible_user", "User of the hosts; empty means what ssh itself takes.", answers.user, "ops")
    yield from _line("ansible_ssh_private_key_file", "Key to log in with.", answers.ssh_key, "~/.ssh/id_ed25519")
    yield from _comment(
        "Password for sudo, where it asks for one: read from a file of this machine that only you can read. Or "
        "leave it out and give --ask-become-pass each time."
    )
    yield from _entry(
        "ansible_become_password",
        _lookup(answers.sudo_password_file or "/home/ops/sudo-password"),
        commented=not answers.sudo_password_file,
    )
    known = settings.catalogue()
    shown: set[str] = set()
    for section in SECTIONS:
        yield from _title(section.title)
        for name in section.settings:
            shown.add(name)
            if name == _KEYS:
                yield from _keys(answers)
            else:
                given = name in answers.settings
                value = answers.settings[name] if given else known[name].default
                yield from _comment(_described(known[name]))
                yield from _entry(name, value, commented=not given)
    further = {name: value for name, value in answers.settings.items() if name not in shown}
    if further:
        yield from _title("Further settings")
    for name, value in further.items():
        yield from _comment(_described(known[name]))
        yield from _entry(name, value)


def _keys(answers: Answers) -> Iterator[str]:
    if answers.vault_password_file:
        yield from _comment(
            f"Keys of the clients are in {VAULT}: ansible-vault edit it. Every command then needs "
            "--vault-password-file FILE or --ask-vault-pass."
        )
        return
    yield from _comment(
        "Keys of the clients, one a line in a file of this machine that only you can read. Never in plain text here; a "
        "vault does as well: ansible-vault encrypt_string. Without any, whoever reaches the endpoint can use it."
    )
    path = str(answers.keys_file or "/home/ops/api-keys")
    template = _lookup(path).replace(") }}", ").splitlines() }}")
    yield from _entry(_KEYS, template, commented=answers.keys_file is None)


def _lookup(path: str) -> str:
    return f"{{{{ lookup('ansible.builtin.file', '{path}') }}}}"


def _described(setting: settings.Setting) -> str:
    choices = f" One of {', '.join(map(str, setting.choices))}." if setting.choices else ""
    return setting.doc + choices


def _line(name: str, doc: str, value: str, example: str) -> Iterator[str]:
    yield from _comment(doc)
    yield from _entry(name, value or example, commented=not value)


def _title(text: str) -> Iterator[str]:
    yield ""
    yield f"# ---- {text}"


def _comment(text: str) -> Iterator[str]:
    yield from textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def _entry(name: str, value: Any, *, commented: bool = False) -> Iterator[str]:
    for line in _dump({name: value}).splitlines():
        yield f"# {line}" if commented else line


def _dump(document: Mapping[str, Any]) -> str:
    """YAML in which text stays text, whatever it looks like."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=10_000)


class _Dumper(yaml.SafeDumper):
    """Writes as people do: lists indented below their name, quotes double."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def choose_scalar_style(self) -> str:
        style: str = super().choose_scalar_style()
        return '"' if style == "'" else style
