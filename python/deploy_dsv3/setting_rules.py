"""What values of settings mean: ranges, paths, addresses, digests, and what must fit together. Pure.

Types and choices come from the roles' descriptions; the rules here go by the name of a setting, mostly by its
ending (``_port``, ``_path``, ``_timeout_s``), so that a new setting is checked by being named as the others
are.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from deploy_dsv3 import serving

#: Ports of the worker processes that Ray must have at least: it starts one process for each CPU beforehand.
MIN_WORKER_PORTS = 100
#: A shorter API key can be guessed.
MIN_KEY_LENGTH = 16

_SYSTEM_PATHS = frozenset(
    [
        "/bin",
        "/boot",
        "/dev",
        "/etc",
        "/home",
        "/lib",
        "/lib64",
        "/proc",
        "/root",
        "/run",
        "/sbin",
        "/sys",
        "/tmp",
        "/usr",
        "/var",
        "/var/lib",
        "/var/log",
    ]
)
_PATH = re.compile(r"^/[A-Za-z0-9._+@:,=/-]*$")
_PLACEHOLDER = re.compile(
    r"(change|replace)[-_ ]?me.*|secrets?|passw(or)?d|token|key|api[-_]?key|example.*|placeholder|todo|tbd|"
    r"your[-_ ].*|my[-_ ]?(secret|password|key|token)|x{3,}|<.*>|\$\{.*\}|\*+|\.\.\.|1234.*|test|none|null",
    re.I,
)
# Grammar of distribution/reference, without the digest.
_IMAGE = re.compile(
    r"(?:[A-Za-z0-9.-]+(?::[0-9]+)?/)?[a-z0-9]+(?:[._/-]+[a-z0-9]+)*(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?"
)
#: Keys of the pass-through that have a setting of their own, or must never be on a command line.
_DAEMON_OPTIONS = {
    "data-root": "docker_engine_data_path",
    "graph": "docker_engine_data_path",
    "registry-mirrors": "docker_engine_registry_mirrors",
    "insecure-registries": "docker_engine_insecure_registries",
    "live-restore": "docker_engine_live_restore",
    "proxies": "docker_engine_proxy_url",
}
_REGISTRY = re.compile(r"[A-Za-z0-9.-]+(:[0-9]+)?|\[[0-9a-fA-F:]+\](:[0-9]+)?")
_WORKER_PORTS = ("ray_cluster_min_worker_port", "ray_cluster_max_worker_port")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is wrong with a value, or (`names`) with several values together."""

    message: str
    expected: str = ""
    remedy: str = ""
    found: str = ""
    names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule for the settings whose whole name matches `names`.

    Attributes:
        names: regular expression.
        check: returns what is wrong with a value, as the end of a sentence that begins with the setting's
            name; empty if nothing is.
        expected, remedy: for the message.
        each: whether the rule is for each element of a list.
        schema: the rule as JSON Schema, as far as that can say it.
    """

    names: re.Pattern[str]
    check: Callable[[Any], str]
    expected: str
    remedy: str = ""
    each: bool = False
    schema: Mapping[str, Any] = field(default_factory=dict)


def rules_for(name: str) -> Iterator[Rule]:
    """The rules for a setting."""
    return (rule for rule in RULES if rule.names.fullmatch(name))


def problems(name: str, kind: str, value: Any, default: Any = None) -> list[Problem]:
    """What is wrong with one value of the right type.

    Args:
        name: the setting.
        kind: its type.
        value: a value that is set.
        default: its default; a negative one means that as low as that is allowed.
    """
    found: list[Problem] = []
    texts = [value] if isinstance(value, str) else [v for v in value if isinstance(v, str)] if kind == "list" else []
    for text in texts:
        if any(ord(character) < 32 or ord(character) == 127 for character in text):
            found.append(
                Problem(
                    message="has a line break or another control character",
                    expected="one line",
                    remedy="Remove it; a YAML block ('|') ends with a line break.",
                )
            )
            return found
    if kind in ("int", "float"):
        least = min(0, default) if isinstance(default, (int, float)) else 0
        if value < least:
            return [Problem(message="is negative", expected=f"at least {least}")]
    for rule in rules_for(name):
        for item in value if rule.each and isinstance(value, list) else [value]:
            wrong = rule.check(item)
            if wrong:
                found.append(
                    Problem(
                        message=wrong,
                        expected=rule.expected,
                        remedy=rule.remedy,
                        found=repr(item) if rule.each else "",
                    )
                )
    return found


def combinations(values: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with the values of one host together.

    Args:
        values: every setting of the host whose value is known.
    """
    yield from _port_collisions(values)
    yield from _worker_ports(values)
    yield from _serve_options(values)
    key, certificate = "endpoint_tls_key_path", "endpoint_tls_certificate_path"
    if values.get(key) and values.get(certificate) == "":
        yield Problem(
            names=(key, certificate),
            message="a TLS key is set, and no certificate",
            expected="both, or neither",
            remedy=f"Set {certificate}.",
        )
    user, password = "engine_image_registry_username", "engine_image_registry_password"
    if user in values and password in values and bool(values[user]) != bool(values[password]):
        missing = password if values[user] else user
        yield Problem(
            names=(user, password),
            message="only one of a registry's user and password is set",
            expected="both, or neither",
            remedy=f"Set {missing}.",
        )


def advice(values: Mapping[str, Any]) -> Iterator[str]:
    """What is allowed and not advisable, in sentences."""
    image, digest = values.get("engine_image_name"), values.get("engine_image_digest")
    if isinstance(image, str) and not digest and not values.get("engine_image_archive_path"):
        tag = image.rsplit("/", 1)[-1].partition(":")[2]
        if not tag or tag.startswith("latest"):
            yield (
                f"{image} is a moving tag: pin a version (engine_image_name) and engine_image_digest, so "
                "that every deploy means the same image"
            )
    if values.get("engine_privileged") is True:
        yield "engine_privileged gives the engine every right on the host; it needs none of them"
    if values.get("endpoint_api_keys") == []:
        yield "endpoint_api_keys is empty: whoever reaches the endpoint can use it"
    if values.get("endpoint_mode") == "direct":
        yield "endpoint_mode 'direct': every API key is an administrator's, and clients reach all routes"
    if values.get("ray_cluster_authentication") == "disabled":
        yield "ray_cluster_authentication 'disabled': whoever reaches Ray's ports can run code on the hosts"
    keys = values.get("endpoint_api_keys")
    if isinstance(keys, list) and any(isinstance(key, str) and len(key) < MIN_KEY_LENGTH for key in keys):
        yield f"endpoint_api_keys has a key of less than {MIN_KEY_LENGTH} characters; try openssl rand -hex 32"


def address_problems(addresses: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """What is wrong with the node addresses of one replica.

    Args:
        addresses: host to address, of the hosts that have one set.

    Yields:
        ``(host, problem)``.
    """
    seen: dict[str, str] = {}
    families: dict[int, str] = {}
    for host, text in addresses.items():
        try:
            ip = ipaddress.ip_address(text)
        except ValueError:
            continue
        first = seen.setdefault(str(ip), host)
        if first != host:
            yield host, f"{first} and {host} have the same node_network_address"
        families.setdefault(ip.version, host)
    if len(families) > 1:
        yield families[6], "IPv4 and IPv6 are mixed"


def _serve_options(values: Mapping[str, Any]) -> Iterator[Problem]:
    options = values.get("lmdeploy_options")
    if not isinstance(options, Mapping) or values.get("lmdeploy_check_options") is False:
        return
    for problem in serving.option_problems(options):
        yield Problem(
            names=("lmdeploy_options",),
            message=f"lmdeploy_options {problem}",
            expected="options of `lmdeploy serve api_server --help` that have no setting of their own, "
            "without the dashes",
            remedy="Correct it; for a newer LMDeploy than this version knows, set lmdeploy_check_options to false.",
        )


def _port_collisions(values: Mapping[str, Any]) -> Iterator[Problem]:
    owner: dict[int, str] = {}
    for name, port in values.items():
        if not name.endswith("_port") or name in _WORKER_PORTS or not isinstance(port, int):
            continue
        first = owner.setdefault(port, name)
        if first != name:
            yield Problem(
                names=(name, first),
                message=f"{first} and {name} are the same port",
                found=str(port),
                expected="a port of its own for each",
                remedy="Change one of them.",
            )
    low, high = (values.get(name) for name in _WORKER_PORTS)
    if isinstance(low, int) and isinstance(high, int):
        for port, name in owner.items():
            if low <= port <= high:
                yield Problem(
                    names=(name, *_WORKER_PORTS),
                    message=f"{name} is in the range of Ray's worker ports",
                    found=f"{port} in {low}-{high}",
                    expected="a port outside of the range",
                    remedy=f"Change {name}, or the range.",
                )


def _worker_ports(values: Mapping[str, Any]) -> Iterator[Problem]:
    low, high = (values.get(name) for name in _WORKER_PORTS)
    if isinstance(low, int) and isinstance(high, int) and high - low + 1 < MIN_WORKER_PORTS:
        yield Problem(
            names=_WORKER_PORTS,
            message="the range of Ray's worker ports is too small",
            found=f"{low}-{high}",
            expected=f"at least {MIN_WORKER_PORTS} ports, the lowest first",
            remedy="Widen it: each worker process takes a port, and Ray starts one for each CPU beforehand.",
        )


def _matches(pattern: str) -> Callable[[Any], str]:
    compiled = re.compile(pattern)
    return lambda value: "" if compiled.fullmatch(str(value)) else "is malformed"


def _pattern(names: str, pattern: str, expected: str, remedy: str = "", *, each: bool = False) -> Rule:
    return Rule(
        names=re.compile(names),
        check=_matches(pattern),
        expected=expected,
        remedy=remedy,
        each=each,
        schema={"pattern": f"^(?:{pattern})$"},
    )


def _check(names: str, check: Callable[[Any], str], expected: str, remedy: str = "", *, each: bool = False) -> Rule:
    return Rule(names=re.compile(names), check=check, expected=expected, remedy=remedy, each=each)


def _port(value: Any) -> str:
    return "" if 1 <= value <= 65535 else "is out of range"


def _positive(value: Any) -> str:
    return "" if value > 0 else "must be more than zero"


def _path(value: Any) -> str:
    text = str(value)
    if not text.startswith("/"):
        return "is not absolute"
    if ".." in text.split("/"):
        return "goes upwards with '..'"
    if text.strip("/") in ("", "."):
        return "is the root of the file system"
    if not _PATH.match(text):
        return "has characters that a shell or Docker would read otherwise"
    return ""


def _data_path(value: Any) -> str:
    return "is a directory of the system itself" if str(value).rstrip("/") in _SYSTEM_PATHS else ""


def _registry_paths(value: Any) -> str:
    for registry, path in value.items():
        if not _REGISTRY.fullmatch(str(registry)):
            return f"has {registry!r}, which is no registry"
        if wrong := _path(path):
            return f"has a path for {registry} that {wrong}"
    return ""


def _local_file(value: Any) -> str:
    return "" if Path(str(value)).is_file() else "does not exist on this machine"


def _node_address(value: Any) -> str:
    wrong = _address(value)
    if wrong:
        return wrong
    ip = ipaddress.ip_address(str(value))
    if ip.is_loopback:
        return "is a loopback address, which other hosts cannot reach"
    if ip.is_link_local:
        return "is a link-local address, which needs an interface to mean anything"
    return ""


def _address(value: Any) -> str:
    try:
        ip = ipaddress.ip_address(str(value))
    except ValueError:
        return "is no IP address"
    return "is an address that no host has" if ip.is_unspecified or ip.is_multicast else ""


def _network(value: Any) -> str:
    try:
        ipaddress.ip_network(str(value), strict=True)
    except ValueError as error:
        return "has bits set beyond its prefix" if "host bits" in str(error) else "is no network in CIDR form"
    return ""


def _url(value: Any) -> str:
    try:
        parts = urlsplit(str(value))
        port_is_fine = parts.port is None or parts.port > 0
    except ValueError:
        return "is no URL"
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_fine or re.search(r"\s", str(value)):
        return "is no http or https URL"
    return "holds a user or password, which would be shown in logs" if parts.username or parts.password else ""


def _image(value: Any) -> str:
    text = str(value)
    if "@" in text:
        return "holds a digest"
    return "" if _IMAGE.fullmatch(text) else "is no image name"


def _secret(value: Any) -> str:
    text = str(value)
    if not text.strip():
        return "holds an empty secret"
    if _PLACEHOLDER.fullmatch(text.strip()):
        return "is a placeholder, not a secret"
    return ""


def _api_key(value: Any) -> str:
    return "has characters that no HTTP header can carry" if re.search(r"[^\x21-\x7e]", str(value)) else ""


def _unique(value: Any) -> str:
    return "names the same thing twice" if len({repr(item) for item in value}) < len(value) else ""


def _environment(value: Any) -> str:
    for name, item in value.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(name)):
            return f"has {name!r}, which is no name of an environment variable"
        if isinstance(item, bool):
            return f"has a boolean for {name}: the engine would see '{item}'"
        if item is None or isinstance(item, (list, dict)):
            return f"has no text for {name}"
        if re.search(r"[\r\n\x00]", str(item)):
            return f"has a line break in {name}"
        if not str(item) and str(name).startswith("LMDEPLOY_"):
            return f"has an empty {name}, at which LMDeploy stops"
    return ""


def _mount(value: Any) -> str:
    source, _, rest = str(value).partition(":")
    target = rest.split(":")[0]
    if not source.startswith("/"):
        return "mounts from a path that is not absolute"
    if not target.startswith("/"):
        return "mounts at a path that is not absolute, which Docker refuses"
    return "goes upwards with '..'" if ".." in f"{source}/{target}".split("/") else ""


def _own_setting(options: Mapping[str, str]) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        for key in value:
            name = str(key).lstrip("-").replace("_", "-")
            if name in options:
                return f"has {key!r}, which is the setting {options[name]}"
        return ""

    return check


_DIGEST = r"sha256:[0-9a-f]{64}"
_TEXT_REMEDY = "Correct the value."

#: In the order in which they are told.
RULES: tuple[Rule, ...] = (
    Rule(
        names=re.compile(r".*_port"),
        check=_port,
        expected="a port from 1 to 65535",
        schema={"minimum": 1, "maximum": 65535},
    ),
    Rule(
        names=re.compile(r".*_(timeout|interval|skew)_s|.*_(connections|max_files)"),
        check=_positive,
        expected="more than zero",
        schema={"exclusiveMinimum": 0},
    ),
    _check(
        r".*_path",
        _path,
        "an absolute path of letters, digits and ._+@:,=- without '..'",
        "Write the full path from /.",
    ),
    _check(
        r"docker_engine_data_path|model_weights_path",
        _data_path,
        "a directory for this purpose only",
        "Name a directory below it.",
    ),
    _check(r"endpoint_tls_ca_path", _local_file, "a file on the control machine"),
    _check(
        r"node_network_address",
        _node_address,
        "the address of this host that the others of the replica reach",
        "Correct it, or leave it out: it is derived from the route to the other hosts.",
    ),
    _check(r"endpoint_address", _address, "an IP address of the head that clients reach"),
    _pattern(
        r".*_interface",
        r"[A-Za-z0-9][A-Za-z0-9_.:@-]{0,14}",
        "the name of a network interface, at most 15 characters",
        "`ip link` on the host lists them.",
    ),
    _check(r".*_url", _url, "http://HOST/... or https://HOST/...", "Passwords belong into settings of their own."),
    _check(r"docker_engine_registry_mirrors", _url, "http://HOST or https://HOST", each=True),
    _check(
        r"docker_engine_registry_ca_paths",
        _registry_paths,
        "HOST or HOST:PORT, without https://, and an absolute path on the hosts",
    ),
    _pattern(
        r"docker_engine_insecure_registries",
        r"[A-Za-z0-9.\[\]:-]+(:[0-9]+)?(/[0-9]+)?",
        "HOST:PORT or a network, without http://",
        each=True,
    ),
    _check(
        r"endpoint_metrics_allow",
        _network,
        "a network such as 192.0.2.0/24, or 192.0.2.7/32 for one host",
        each=True,
    ),
    _pattern(
        r".*_(digest|checksum)",
        _DIGEST,
        "sha256: and 64 lower-case hexadecimal digits",
        "Copy it whole, e.g. from `docker buildx imagetools inspect IMAGE`.",
    ),
    _check(
        r"engine_image_name",
        _image,
        "REPOSITORY:TAG; the digest goes into engine_image_digest",
        "Write e.g. openmmlab/lmdeploy:v0.18.0-cu12.8.",
    ),
    _pattern(r"engine_container_name", r"[a-zA-Z0-9][a-zA-Z0-9_.-]+", "letters, digits and _.-"),
    _pattern(r"engine_log_max_size", r"[1-9][0-9]*[kmg]", "a number with k, m or g, e.g. 100m"),
    _pattern(r"engine_ulimits", r"[a-z]+:-?[0-9]+(:-?[0-9]+)?", "name:soft:hard, e.g. memlock:-1:-1", each=True),
    _pattern(
        r"engine_capabilities",
        r"(CAP_)?[A-Z][A-Z_]+",
        "a capability in capitals, e.g. IPC_LOCK",
        "capabilities(7) lists them.",
        each=True,
    ),
    _pattern(
        r"engine_gpu_devices",
        r"[a-z0-9.-]+/[a-z0-9.-]+=[\w.:-]+",
        "a CDI name, e.g. nvidia.com/gpu=all",
        each=True,
    ),
    _pattern(
        r"(engine|rdma)_devices",
        r"/dev/[A-Za-z0-9_./-]+(:\S+)?",
        "a device file, e.g. /dev/infiniband/uverbs0",
        each=True,
    ),
    _pattern(r"rdma_hcas", r"[A-Za-z0-9_-]+:[0-9]+", "DEVICE:PORT, e.g. mlx5_0:1", each=True),
    _check(r"engine_volumes", _mount, "/host/path:/container/path or with :ro", each=True),
    _check(
        r"engine_environment",
        _environment,
        "NAME: text, on one line",
        'Write numbers and booleans in quotes, e.g. "1".',
    ),
    _check(
        r"docker_engine_options",
        _own_setting(_DAEMON_OPTIONS),
        "keys of daemon.json that have no setting of their own",
        "Use that setting.",
    ),
    _check(
        r"lmdeploy_cache_max_entry_count",
        lambda value: "" if 0 < value < 1 else "is out of range",
        "a share between 0 and 1",
    ),
    _check(r"lmdeploy_capture_batch_sizes", _positive, "batch sizes, more than zero", each=True),
    _pattern(r"nvidia_driver_branch", r"[0-9]{3}(\.[0-9]+)*", "a driver branch, e.g. 580"),
    _pattern(
        r"model_weights_name|lmdeploy_model_name",
        r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*",
        "a model's name, e.g. deepseek-ai/DeepSeek-V3",
    ),
    _pattern(r".*_(version|username|release_name)", r"\S+", "one word", _TEXT_REMEDY),
    _pattern(r"endpoint_routes", r"/[A-Za-z0-9._~/-]*", "a route that begins with /", each=True),
    _check(r"endpoint_api_keys", _unique, "each key once"),
    _check(
        r"endpoint_api_keys|engine_image_registry_password",
        _secret,
        "a real secret",
        "Make one: openssl rand -hex 32.",
        each=True,
    ),
    _check(r"endpoint_api_keys", _api_key, "printable ASCII without spaces", each=True),
)
