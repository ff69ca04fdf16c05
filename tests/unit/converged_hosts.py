"""Two recorded hosts as a finished deploy of this version leaves them, and ways to change them by hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deploy_dsv3 import manifest, plan, wanted
from deploy_dsv3.derive import HostInput, NodePlan, derive
from deploy_dsv3.facts import load_facts
from deploy_dsv3.hostvars import role_defaults
from deploy_dsv3.plan import Plan
from deploy_dsv3.probing import Fleet
from deploy_dsv3.topology import Deployment, Replica

HEAD, WORKER = "gpu-01", "gpu-02"
REPLICA = Replica(name="dsv3", head=HEAD, workers=(WORKER,))
DEPLOYMENT = Deployment(replicas=(REPLICA,))
ENGINE = "/etc/deploy-dsv3/engine"

_RECORDED = json.loads((Path(__file__).parent / "recorded/converged/two-hosts.json").read_text(encoding="utf-8"))
SETTINGS: Mapping[str, Any] = {**role_defaults(), **_RECORDED["settings"]}

Documents = dict[str, dict[str, Any]]
Change = Callable[[dict[str, Any]], None]


def inputs(documents: Documents, **settings: Any) -> dict[str, HostInput]:
    """What is known of hosts with these facts; `settings` are changed on both."""
    return {
        host: HostInput(
            host=host,
            facts=load_facts(document),
            settings={**SETTINGS, **settings},
            connect_address=document["connection"]["server_address"],
        )
        for host, document in documents.items()
    }


def converged(**settings: Any) -> Documents:
    """The probe's facts of both hosts after a finished deploy with these settings."""
    documents: Documents = copy.deepcopy(_RECORDED["hosts"])
    nodes, _ = derive(REPLICA, inputs(documents, **settings))
    for host, document in documents.items():
        _serve(document, nodes[host].to_json())
    for host, known in inputs(documents, **settings).items():
        assert known.facts
        made = manifest.make(known.facts, known.settings, nodes[host].to_json())
        documents[host]["deployment"]["manifest"] = json.loads(json.dumps(made))
    return documents


def bare() -> Documents:
    """Both hosts before anything was deployed."""
    documents: Documents = copy.deepcopy(_RECORDED["hosts"])
    for document in documents.values():
        document.update(
            gpus=[],
            nvidia_smi={"path": "", "rc": -1, "error": ""},
            driver={"loaded_version": "", "nouveau_loaded": False},
            docker={"installed": False},
            cdi={"specs": []},
            deployment={},
            state={"sysctls": document["state"]["sysctls"]},
            registry={"registry": "http://registry.example", "digest": "sha256:d", "bytes": 142_000_000, "error": ""},
        )
    return documents


def nobody(settings: Mapping[str, Mapping[str, Any]], connections: Mapping[str, Any]) -> Fleet:
    """Stands where hosts are probed: none can be reached."""
    hosts = {host: HostInput(host=host, facts=None, settings=settings[host]) for host in connections}
    return Fleet(hosts=hosts, unreachable=dict.fromkeys(hosts, "no route"))


def planned(documents: Documents, **settings: Any) -> Plan:
    """The plan for hosts with these facts."""
    return plan.make(DEPLOYMENT, inputs(documents, **settings))


def by_hand(host: str, change: Change, **settings: Any) -> Plan:
    """The plan after somebody changed a host; `change` edits its facts as the probe tells them."""
    documents = converged(**settings)
    change(documents[host])
    return planned(documents, **settings)


def node_of(host: str, **settings: Any) -> NodePlan:
    """What is derived for a host."""
    nodes, _ = derive(REPLICA, inputs(copy.deepcopy(_RECORDED["hosts"]), **settings))
    return nodes[host]


def _serve(document: dict[str, Any], node: dict[str, Any]) -> None:
    """Bring a recording to what this version derives, so that its age does not matter."""
    deployment, files = document["deployment"], document["state"]["files"]
    deployment["node_file"] = json.loads(json.dumps(node["node_file"]))
    if node["role"] == "head":
        deployment["serve_file"] = json.loads(json.dumps(node["serve_file"]))
    state = document["state"]
    state["sysctls"]["net.ipv4.ip_local_reserved_ports"] = node["reserved_ports"]
    state["packages"] |= {"rdma-core": "56.1-1", "ibverbs-providers": "56.1-1"}
    deployment["release"] = {
        "serve": {"argv": list(node["serve_file"]["argv"])},
        "model": {"name": node["served_model"], "path": node["model_path"]},
    }
    files[f"{ENGINE}/launcher.py"]["sha256"] = wanted.launcher_sha256()
    config = document["docker"]["containers"][0]["config"]
    config["environment"] |= node["environment"]
    config["devices"] = sorted(node["devices"])
