"""The ranks behind the engine: real Ray actors, made as LMDeploy's executor makes them, or none.

Follows lmdeploy/pytorch/ray.py and lmdeploy/pytorch/engine/executor/ray_executor.py of LMDeploy 0.18.0
where the deployment can tell the difference: how Ray is found, the placement group, the actors and what
they ask for.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from typing import Any, Protocol

from .ranks import RayWorkerWrapper, check_model

logger = logging.getLogger("lmdeploy")

PG_WAIT_TIMEOUT_S = 1800


class Executor(Protocol):
    """What the engine needs of its ranks; every method raises when a rank is gone."""

    def load(self) -> None:
        """Let every rank read the model."""

    async def forward(self) -> None:
        """Pass one step through every rank."""

    def close(self) -> None:
        """Release the ranks."""


class LocalExecutor:
    """No ranks: one device, as LMDeploy's `uni` executor."""

    def __init__(self, model_path: str) -> None:
        self._model_path = model_path

    def load(self) -> None:
        check_model(self._model_path)

    async def forward(self) -> None:
        await asyncio.sleep(0)

    def close(self) -> None:
        pass


class RayExecutor:
    """One actor per rank in a placement group of `tp` bundles of one GPU."""

    def __init__(self, model_path: str, tp: int) -> None:
        import ray

        self._ray = ray
        _init_ray(ray, tp)
        self._group = _placement_group(ray, tp)
        strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
        self._workers: list[Any] = [
            ray.remote(
                num_cpus=0,
                num_gpus=0.01,
                scheduling_strategy=strategy(
                    placement_group=self._group,
                    placement_group_capture_child_tasks=True,
                    placement_group_bundle_index=index,
                ),
            )(RayWorkerWrapper).remote(model_path)
            for index in range(tp)
        ]
        address = os.environ.get("LMDEPLOY_DIST_MASTER_ADDR") or _gcs_host(ray)
        port = int(os.environ.get("LMDEPLOY_DIST_MASTER_PORT") or _free_port())
        self._sort(address)
        ray.get([worker.init_process_group.remote(rank, address, port) for rank, worker in enumerate(self._workers)])

    def load(self) -> None:
        try:
            self._ray.get([worker.build_model.remote() for worker in self._workers])
        except BaseException:
            self.close()
            raise

    async def forward(self) -> None:
        await asyncio.gather(*[worker.forward.remote() for worker in self._workers])

    def close(self) -> None:
        for worker in self._workers:
            self._ray.kill(worker)
        self._ray.util.remove_placement_group(self._group)
        self._ray.shutdown()

    def _sort(self, master: str) -> None:
        """Ranks of the driver's node first, then nodes with fewer of them, then by address."""
        addresses = self._ray.get([worker.get_node_ip.remote() for worker in self._workers])
        keyed = sorted(
            zip(addresses, self._workers, strict=True),
            key=lambda item: (item[0] != master, addresses.count(item[0]), item[0]),
        )
        self._workers = [worker for _, worker in keyed]


def choose(model_path: str, tp: int, backend: str | None) -> Executor:
    """Pick the executor as LMDeploy does: Ray for more than one GPU or when asked for."""
    wanted = backend or os.environ.get("LMDEPLOY_EXECUTOR_BACKEND") or ("uni" if tp == 1 else "ray")
    return RayExecutor(model_path, tp) if wanted == "ray" else LocalExecutor(model_path)


def _gcs_host(ray: Any) -> str:
    address: str = ray.get_runtime_context().gcs_address
    return address.split(":")[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _init_ray(ray: Any, tp: int) -> None:
    """Join the cluster that RAY_ADDRESS names; else a private Ray starts silently, as with LMDeploy."""
    try:
        context = ray.init(address=None, ignore_reinit_error=True, num_cpus=tp)
    except ValueError as error:
        if "When connecting to an existing cluster" not in str(error):
            raise
        context = ray.init(address=None, ignore_reinit_error=True)
    logger.info("Ray initialized with address: %s", context.address_info["address"])


def _placement_group(ray: Any, tp: int) -> Any:
    available = ray.cluster_resources().get("GPU", 0)
    if tp > available:
        logger.warning("The number of required GPUs exceeds the total number of available GPUs in the placement group.")
    bundles: list[dict[str, float]] = [{"GPU": 1.0} for _ in range(tp)]
    bundles[0][f"node:{ray.util.get_node_ip_address()}"] = 0.001
    group = ray.util.placement_group(bundles, strategy="PACK")
    began, interval, ready = time.time(), 10.0, group.ready()
    while time.time() - began < PG_WAIT_TIMEOUT_S:
        done, _ = ray.wait([ready], timeout=interval)
        if done:
            break
        interval *= 2
        logger.info("Waiting for creating a placement group of specs for %d seconds.", int(time.time() - began))
    try:
        ray.get(ready, timeout=0)
    except ray.exceptions.GetTimeoutError:
        raise ValueError(
            f"Cannot provide a placement group of placement_group_specs={bundles} "
            f"within {PG_WAIT_TIMEOUT_S} seconds. "
            "See `ray status` to make sure the cluster has enough resources."
        ) from None
    return group
