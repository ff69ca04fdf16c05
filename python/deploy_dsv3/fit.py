"""Whether the GPUs of a replica hold its model: `capacity`, asked with what is known of the hosts. Pure.

Before there is a driver GPUs are known by their PCI device IDs alone; for the usual ones that is enough to tell
their memory, so that a bare fleet is refused before anything is installed on it. What cannot be told is said, and
refuses nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from deploy_dsv3 import capacity
from deploy_dsv3.capacity import Capacity, ModelShape
from deploy_dsv3.derive import HostInput
from deploy_dsv3.errors import ConfigErrors
from deploy_dsv3.facts import HostFacts
from deploy_dsv3.findings import Finding
from deploy_dsv3.topology import Replica

#: PCI device of NVIDIA's (the PCI ID database, vendor 10de) to product name and what nvidia-smi calls memory.total
#: [MiB]. Only devices of one memory size that DeepSeek-V3 is served on, or that people try.
KNOWN_GPUS: Mapping[str, tuple[str, int]] = {
    "0x20b2": ("NVIDIA A100-SXM4-80GB", 81920),
    "0x20b5": ("NVIDIA A100 80GB PCIe", 81920),
    "0x20f3": ("NVIDIA A800-SXM4-80GB", 81920),
    "0x20f5": ("NVIDIA A800 80GB PCIe", 81920),
    "0x2322": ("NVIDIA H800 PCIe", 81559),
    "0x2324": ("NVIDIA H800", 81559),
    "0x2329": ("NVIDIA H20", 97871),
    "0x2330": ("NVIDIA H100 80GB HBM3", 81559),
    "0x2331": ("NVIDIA H100 PCIe", 81559),
    "0x2335": ("NVIDIA H200", 143771),
    "0x233b": ("NVIDIA H200 NVL", 143771),
}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is known: the `capacity`, or why it cannot be told (`unknown`)."""

    capacity: Capacity | None = None
    unknown: str = ""


@dataclass(frozen=True, kw_only=True)
class _Gpus:
    """The GPUs of a replica: their number, the memory of the smallest [MiB], the product name."""

    count: int
    memory_mib: int
    name: str


class _Unknown(Exception):
    """Something that the arithmetic needs is not known; the message says what."""


def work_out(replica: Replica, hosts: Mapping[str, HostInput]) -> Answer:
    """Whether the model fits a replica, and how much it then serves.

    Args:
        replica: the hosts that serve it together.
        hosts: what is known of each.
    """
    settings = hosts[replica.head].settings
    try:
        gpus = _gpus([_seen(hosts[name]) for name in replica.hosts])
        tp = settings["lmdeploy_tp"] or gpus.count
        if tp != gpus.count:
            raise _Unknown(f"lmdeploy_tp is {tp}, and the replica has {gpus.count} GPUs")
        return Answer(
            capacity=capacity.estimate(
                _model(replica, hosts),
                capacity.Serving(
                    gpus=gpus.count,
                    gpu_memory_mib=gpus.memory_mib,
                    gpu_name=gpus.name,
                    layout=capacity.Layout(tp=tp),
                    cache_max_entry_count=settings["lmdeploy_cache_max_entry_count"],
                    session_len=settings["lmdeploy_session_len"],
                    max_batch_size=settings["lmdeploy_max_batch_size"],
                    max_prefill_token_num=settings["lmdeploy_max_prefill_token_num"],
                ),
            )
        )
    except _Unknown as reason:
        return Answer(unknown=str(reason))
    except ConfigErrors as errors:
        return Answer(unknown="; ".join(error.message for error in errors))


def check(replica: Replica, hosts: Mapping[str, HostInput]) -> Iterator[Finding]:
    """The finding of a model that does not fit; on the head, since it is the whole replica's."""
    known = work_out(replica, hosts).capacity
    if known is None or known.fits:
        return
    required = hosts[replica.head].settings["preflight_require_capacity"]
    yield Finding(
        code="capacity",
        host=replica.head,
        severity="error" if required else "warning",
        message=f"{replica.head}: the {known.gpus} GPUs of replica {replica.name!r} do not hold the model: "
        + " ".join(known.reasons),
        cause="the replica has too few GPUs for this model, or too small ones (docs/capacity.md has what fits where)",
        remedy="give the replica more hosts or larger GPUs, or serve a smaller model; where the estimate is wrong, set "
        "preflight_require_capacity to false"
        if required
        else "nothing, if the estimate is wrong: preflight_require_capacity is false",
    )


def _seen(known: HostInput) -> HostFacts:
    if known.facts is None:
        raise _Unknown(f"{known.host} was not seen")
    return known.facts


def _gpus(hosts: Sequence[HostFacts]) -> _Gpus:
    counts = {facts.hostname: facts.gpu_count for facts in hosts}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{host} has {count}" for host, count in counts.items())
        raise _Unknown(f"the hosts differ in their number of GPUs: {listed}")
    each = [gpu for facts in hosts for gpu in _gpus_of(facts)]
    if not each:
        raise _Unknown("the hosts have no GPU")
    return _Gpus(count=len(each), memory_mib=min(memory for _, memory in each), name=each[0][0])


def _gpus_of(facts: HostFacts) -> list[tuple[str, int]]:
    """Name and memory of each GPU of a host: as the driver tells them, or else as their PCI devices do."""
    if facts.gpus:
        if len(facts.gpus) < len(facts.pci_gpus):
            raise _Unknown(
                f"the driver of {facts.hostname} lists {len(facts.gpus)} of {len(facts.pci_gpus)} GPUs, so their "
                "memory is not known"
            )
        return [(gpu.name, gpu.memory_total_mib) for gpu in facts.gpus]
    strange = sorted({gpu.device for gpu in facts.pci_gpus} - KNOWN_GPUS.keys())
    if strange:
        raise _Unknown(
            f"before {facts.hostname} has its driver the memory of its GPUs (PCI device {', '.join(strange)}) is not "
            "known"
        )
    return [KNOWN_GPUS[gpu.device] for gpu in facts.pci_gpus]


def _model(replica: Replica, hosts: Mapping[str, HostInput]) -> ModelShape:
    """The model by the config.json of a host that has it, the head first; by its name where none has."""
    for name in replica.hosts:
        facts, settings = _seen(hosts[name]), hosts[name].settings
        if facts.model:
            path = f"{settings['model_weights_path']}/config.json on {name}"
            return capacity.model_from(facts.model, name=settings["model_weights_name"], source=path)
    name = hosts[replica.head].settings["model_weights_name"]
    if name not in capacity.MODELS:
        raise _Unknown(f"no host has the config.json of {name} yet")
    return capacity.MODELS[name]
