"""What a replica's GPUs hold, from the facts of its hosts: refused, accepted with figures, or not to be told."""

from __future__ import annotations

from typing import Any

import pytest
from recorded_hosts import document, host_input, replica_of

from deploy_dsv3 import fit, plan
from deploy_dsv3.derive import HostInput
from deploy_dsv3.facts import HostFacts, load_facts
from deploy_dsv3.findings import Finding
from deploy_dsv3.preflight import check
from deploy_dsv3.topology import Deployment

H800, H20, H200 = ("NVIDIA H800", 81559, "0x2324"), ("NVIDIA H20", 97871, "0x2329"), ("NVIDIA H200", 143771, "0x2335")
A100 = ("NVIDIA A100-SXM4-80GB", 81920, "0x20b2")
Gpu = tuple[str, int, str]
#: A config.json of the architecture, in BF16.
SMALL: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 4,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 256,
    "n_routed_experts": 16,
    "num_attention_heads": 16,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}


def server(gpu: Gpu, *, number: int = 1, count: int = 8, driver: bool = True, **changes: Any) -> HostFacts:
    """A recorded server with other GPUs; without a driver they are devices on the PCI bus only."""
    name, memory, device = gpu
    found = document(f"h800-ib-{number}")
    found["gpus"] = [{**one, "name": name, "memory_total_mib": memory} for one in found["gpus"][:count]]
    found["pci_gpus"] = [{**one, "device": device} for one in found["pci_gpus"][:count]]
    if not driver:
        found.update(gpus=[], nvidia_smi={"path": "", "rc": -1, "error": ""}, driver={})
    return load_facts({**found, **changes})


def fleet(gpu: Gpu, hosts: int, *, driver: bool = True, **settings: Any) -> list[HostInput]:
    return [
        host_input(f"gpu{number}", server(gpu, number=number, driver=driver), **settings)
        for number in range(1, hosts + 1)
    ]


def findings(*hosts: HostInput) -> list[Finding]:
    """What preflight says of the capacity."""
    replica, known = replica_of(*hosts)
    return [one for found in check([replica], known).values() for one in found if one.code == "capacity"]


def answer(*hosts: HostInput) -> fit.Answer:
    return fit.work_out(*replica_of(*hosts))


@pytest.mark.parametrize("driver", [True, False], ids=["with a driver", "bare"])
class TestDeepSeekV3:
    def test_eight_gpus_of_80_gb_are_refused_before_any_change(self, driver: bool) -> None:
        (host,) = fleet(H800, 1, driver=driver)
        replica, known = replica_of(host)
        made = plan.make(Deployment(replicas=(replica,)), known)
        assert made.exit_code == 3
        (finding,) = [one for one in made.errors if one.code == "capacity"]
        assert finding.host == "gpu1"
        assert "the 8 GPUs of replica 'dsv3' do not hold the model" in finding.message
        assert "79.5 GiB of weights" in finding.message and "a GPU has 79.6 GiB" in finding.message
        assert "preflight_require_capacity" in finding.remedy

    @pytest.mark.parametrize(("gpu", "hosts"), [(H800, 2), (H200, 1), (H20, 2)], ids=["16 x 80", "8 x 141", "16 x 96"])
    def test_the_usual_fleets_are_accepted_with_figures(self, gpu: Gpu, hosts: int, driver: bool) -> None:
        members = fleet(gpu, hosts, driver=driver)
        assert findings(*members) == []
        replica, known = replica_of(*members)
        (shown,) = plan.make(Deployment(replicas=(replica,)), known).replicas
        assert shown.capacity and shown.capacity.fits and shown.capacity.gpus == 8 * hosts
        assert shown.capacity.blocks > 6000 and shown.capacity.sequences(4096) > 90

    def test_gpus_without_fp8_are_refused(self, driver: bool) -> None:
        (finding,) = findings(*fleet(A100, 2, driver=driver))
        assert "compute capability 9.0" in finding.message

    def test_consent_makes_it_a_warning(self, driver: bool) -> None:
        (finding,) = findings(*fleet(H800, 1, driver=driver, preflight_require_capacity=False))
        assert finding.severity == "warning"


class TestTheModel:
    """By the config.json of any host that has one, else by its name."""

    def test_a_small_model_of_the_same_name_fits(self) -> None:
        assert findings(host_input("gpu1", server(H800, model=SMALL))) == []

    def test_weights_that_are_missing_on_the_head_are_known_by_a_worker(self) -> None:
        hosts = [host_input("gpu1", server(H800)), host_input("gpu2", server(H800, number=2, model=SMALL))]
        known = answer(*hosts).capacity
        assert known and known.weight_format == "bf16", "the config.json of the worker, not the model's name"

    def test_without_any_the_name_decides(self) -> None:
        known = answer(*fleet(H800, 2)).capacity
        assert known and known.model == "deepseek-ai/DeepSeek-V3"

    def test_a_model_of_which_nothing_is_known_is_not_refused(self) -> None:
        hosts = fleet(H800, 1, model_weights_name="somebody/else")
        assert findings(*hosts) == []
        assert answer(*hosts).unknown == "no host has the config.json of somebody/else yet"

    def test_another_architecture_is_not_refused(self) -> None:
        host = host_input("gpu1", server(H800, model={"model_type": "llama"}))
        assert findings(host) == [] and "not known here" in answer(host).unknown


class TestWhatIsNotKnown:
    def test_a_host_that_was_not_seen(self) -> None:
        hosts = [fleet(H800, 1)[0], host_input("gpu2", None)]
        assert answer(*hosts).unknown == "gpu2 was not seen" and findings(*hosts) == []

    def test_gpus_of_which_some_are_missing(self) -> None:
        facts = server(H800)
        fewer = facts.model_copy(update={"gpus": facts.gpus[:7]})
        assert "lists 7 of 8 GPUs" in answer(host_input("gpu1", fewer)).unknown

    def test_hosts_that_differ(self) -> None:
        hosts = [host_input("gpu1", server(H800)), host_input("gpu2", server(H800, number=2, count=4))]
        assert "differ in their number of GPUs" in answer(*hosts).unknown and findings(*hosts) == []

    def test_a_strange_gpu_before_its_driver(self) -> None:
        host = host_input("gpu1", server(("", 0, "0x26ba"), driver=False))
        assert "PCI device 0x26ba" in answer(host).unknown and findings(host) == []

    def test_no_gpu(self) -> None:
        assert answer(host_input("gpu1", server(H800, count=0))).unknown == "the hosts have no GPU"

    def test_a_layout_that_preflight_refuses_anyway(self) -> None:
        assert answer(*fleet(H800, 2, lmdeploy_tp=8)).unknown == "lmdeploy_tp is 8, and the replica has 16 GPUs"


def test_known_gpus_are_told_as_the_driver_tells_them() -> None:
    """The recordings of real drivers agree with the table."""
    seen = {
        (pci.device, gpu.name, gpu.memory_total_mib)
        for name in ("h800-ib-1", "h20-roce-1", "cloud-vm")
        for facts in [load_facts(document(name))]
        for pci, gpu in zip(facts.pci_gpus, facts.gpus, strict=True)
    }
    assert len(seen) == 3
    assert {(device, *fit.KNOWN_GPUS[device]) for device, _, _ in seen} == seen
