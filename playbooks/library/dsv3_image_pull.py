"""Ansible module: pull an image by digest through the Docker API, with progress that can be watched."""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
import tempfile
import time

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: dsv3_image_pull
short_description: Pull an image by digest, or tell how far a pull is
description:
  - C(community.docker.docker_image_pull) is silent until the end, which for an engine image is half an hour. This
    module asks the daemon for the same pull and keeps its progress in a file, which the state C(progress) reads.
  - The daemon keeps finished layers, so that a pull that was cut off goes on where it was.
options:
  name:
    description: Image with digest, C(repository@sha256:...).
    type: str
  progress_path:
    description: File that holds the progress.
    type: path
    default: /run/deploy-dsv3/pull.json
  state:
    description: C(pulled) pulls and returns at the end; C(progress) returns what is known now.
    type: str
    choices: [pulled, progress]
    default: pulled
  username:
    description: User of a private registry.
    type: str
    default: ""
  password:
    description: Password of a private registry.
    type: str
    default: ""
  socket:
    description: The daemon's socket.
    type: path
    default: /var/run/docker.sock
author: deploy-dsv3 maintainers
"""

EXAMPLES = r"""
- name: Pull the engine image
  dsv3_image_pull:
    name: openmmlab/lmdeploy@sha256:...
  async: 7200
  poll: 0
"""

RETURN = r"""
finished:
  description: Whether the pull has ended.
  type: bool
  returned: state=progress
error:
  description: Why it failed; empty when it did not.
  type: str
  returned: state=progress
progress:
  description: How far the pull is, in words.
  type: str
  returned: always
"""

_WRITE_EVERY_S = 1.0


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(self._path)


class Layers:
    """The state of a pull, from the daemon's stream of JSON lines."""

    def __init__(self) -> None:
        self.total: dict[str, int] = {}
        self.done: dict[str, int] = {}
        self.finished: set[str] = set()

    def take(self, event: dict) -> None:
        """Account for one line of the stream (fields of the Docker Engine API, `POST /images/create`)."""
        layer, status = event.get("id"), event.get("status", "")
        if not layer or status.startswith("Pulling from"):
            return
        detail = event.get("progressDetail") or {}
        if status == "Downloading":
            self.total[layer] = detail.get("total", 0)
            self.done[layer] = detail.get("current", 0)
        elif status in ("Pull complete", "Already exists"):
            self.finished.add(layer)
            self.done[layer] = self.total.get(layer, 0)
        elif status in ("Download complete", "Verifying Checksum", "Extracting"):
            self.done[layer] = self.total.setdefault(layer, 0)
        else:
            self.total.setdefault(layer, 0)

    def words(self) -> str:
        """For people: layers and bytes so far."""
        known = set(self.total) | self.finished
        return (
            f"{len(self.finished)} of {len(known)} layers unpacked, "
            f"{sum(self.done.values()) / 1e9:.1f} of {sum(self.total.values()) / 1e9:.1f} GB downloaded"
        )


def _write(path: str, report: dict) -> None:
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=os.path.dirname(path), delete=False) as file:
        json.dump(report, file)
    os.replace(file.name, path)


def _pull(name: str, auth: dict, daemon: str, path: str) -> str:
    layers = Layers()
    headers = {}
    if auth["username"]:
        headers["X-Registry-Auth"] = base64.urlsafe_b64encode(json.dumps(auth).encode()).decode()
    repository, _, digest = name.partition("@")
    connection = _UnixConnection(daemon)
    connection.request("POST", f"/images/create?fromImage={repository}&tag={digest}", headers=headers)
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(json.loads(response.read() or b"{}").get("message", f"HTTP {response.status}"))
    written, complete = 0.0, False
    for line in response:
        if not line.strip():
            continue
        event = json.loads(line)
        if "error" in event:
            raise RuntimeError(event["error"])
        layers.take(event)
        complete = complete or event.get("status", "").startswith("Digest: ")
        if time.monotonic() - written > _WRITE_EVERY_S:
            _write(path, {"finished": False, "error": "", "progress": layers.words()})
            written = time.monotonic()
    if not complete:
        raise RuntimeError("the daemon broke off the pull")
    return layers.words()


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str"},
            "progress_path": {"type": "path", "default": "/run/deploy-dsv3/pull.json"},
            "state": {"type": "str", "choices": ["pulled", "progress"], "default": "pulled"},
            "username": {"type": "str", "default": ""},
            "password": {"type": "str", "default": "", "no_log": True},
            "socket": {"type": "path", "default": "/var/run/docker.sock"},
        },
        required_if=[("state", "pulled", ["name"])],
        supports_check_mode=True,
    )
    path = module.params["progress_path"]
    if module.params["state"] == "progress":
        try:
            with open(path, encoding="utf-8") as file:
                module.exit_json(changed=False, **json.load(file))
        except FileNotFoundError:
            module.exit_json(changed=False, finished=False, error="", progress="not started")
    if module.check_mode:
        module.exit_json(changed=True, progress="would be pulled")
    _write(path, {"finished": False, "error": "", "progress": "asking the registry"})
    auth = {"username": module.params["username"], "password": module.params["password"]}
    try:
        words = _pull(module.params["name"], auth, module.params["socket"], path)
    except (OSError, RuntimeError, ValueError) as error:
        _write(path, {"finished": True, "error": str(error), "progress": "failed"})
        module.fail_json(msg=str(error))
    _write(path, {"finished": True, "error": "", "progress": words})
    module.exit_json(changed=True, progress=words)


if __name__ == "__main__":
    main()
