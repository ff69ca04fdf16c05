"""One rank. Imports nothing heavy: sixteen of them start on a small machine."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

_RENDEZVOUS_S = 120


def check_model(model_path: str) -> None:
    """Read what a rank needs of a model's folder.

    Raises:
        OSError: the folder, its config.json or a shard of its index is missing.
        ValueError: config.json or the index is no JSON.
    """
    folder = Path(model_path)
    if not folder.is_dir():
        raise OSError(f"{model_path} is no folder on {os.uname().nodename}")
    json.loads((folder / "config.json").read_text())
    index = folder / "model.safetensors.index.json"
    shards = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    for shard in sorted(shards):
        if not (folder / shard).is_file():
            raise OSError(f"{folder / shard} is missing on {os.uname().nodename}")


class RayWorkerWrapper:
    """The actor, under the class name of LMDeploy's own."""

    def __init__(self, model_path: str) -> None:
        self._model_path = model_path

    def get_node_ip(self) -> str:
        import ray.util

        address: str = ray.util.get_node_ip_address()
        return address

    def init_process_group(self, rank: int, address: str, port: int) -> None:
        """Meet at the first rank's port, which stays open as torch's TCPStore does.

        Raises:
            OSError: the port is taken, or cannot be reached from this node.
        """
        if rank == 0:
            self._store = socket.create_server(("", port), backlog=128)
            return
        deadline = time.monotonic() + _RENDEZVOUS_S
        while True:
            try:
                self._store = socket.create_connection((address, port), timeout=5)
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise OSError(f"rank {rank} cannot reach {address}:{port}: {error}") from error
                time.sleep(0.1)

    def build_model(self) -> None:
        check_model(self._model_path)
        time.sleep(float(os.environ.get("STANDIN_LOAD_SECONDS", "0")))

    def forward(self) -> None:
        pass
