"""The Ray cluster, as each host sees it from inside its container."""

import json
import re

from fleet import Fleet, Node

from deploy_dsv3.derive import NodePlan

TOKEN = "/etc/deploy-dsv3/engine/secrets/ray_token"


def test_nodes(running: Node, plan: NodePlan) -> None:
    """This host sees every node of the replica and all GPUs."""
    answer = running.seen["inside"]["nodes"]
    assert answer["rc"] == 0, f"launcher.py nodes: {answer['err'] or answer['out']}"
    alive = {node["address"]: int(node["gpus"]) for node in json.loads(answer["out"]) if node["alive"]}
    wanted = {plan.address, *(peer.address for peer in plan.peers)}
    assert set(alive) == wanted, f"missing: {sorted(wanted - set(alive))}, strangers: {sorted(set(alive) - wanted)}"
    gpus = sum(alive.values())
    assert gpus == plan.expected.gpus, f"Ray has {gpus} GPUs, the replica {plan.expected.gpus}: {alive}"


def test_ray_status(running: Node, plan: NodePlan) -> None:
    """`ray status` shows every node and all GPUs."""
    answer = running.seen["inside"]["ray_status"]
    assert answer["rc"] == 0, f"ray status: {answer['err'] or answer['out']}"
    active = re.search(r"^Active:\n((?: .*\n)*)", answer["out"], re.MULTILINE)
    nodes = sum(int(count) for count in re.findall(r"^ (\d+) ", active[1] if active else "", re.MULTILINE))
    total = re.search(r"/(\d+(?:\.\d+)?) GPU", answer["out"])
    gpus = float(total[1]) if total else 0
    assert (nodes, gpus) == (plan.expected.nodes, plan.expected.gpus), (
        f"{nodes} nodes and {gpus:g} GPUs, not {plan.expected.nodes} and {plan.expected.gpus}:\n{answer['out']}"
    )


def test_phase(running: Node) -> None:
    """The launcher has come to its end state."""
    status = running.observation.document("status")
    wanted = "serving" if running.role == "head" else "ray-up"
    found = status.get("phase", "without a phase")
    assert found == wanted, f"{found}: {status.get('message', '')} {status.get('last_error', '')}".strip()


def test_authentication(engine: Node, fleet: Fleet) -> None:
    """A token keeps strangers out of the Ray cluster."""
    mode = engine.environment.get("RAY_AUTH_MODE", "unset")
    ray = engine.release.get("versions", {}).get("ray", "0")
    too_old = tuple(int(part) for part in ray.split(".")[:2]) < (2, 52)
    setting = engine.settings["ray_cluster_authentication"]
    if setting == "disabled" or (setting == "auto" and too_old):
        assert mode == "disabled", f"RAY_AUTH_MODE is {mode}, ray_cluster_authentication is {setting}"
        return
    assert mode == "token", f"RAY_AUTH_MODE is {mode}: whoever reaches Ray's ports runs programs on this host"
    tokens = {other.name: other.seen["files"].get(TOKEN, {}).get("sha256") for other in fleet.of(engine.replica)}
    assert tokens[engine.name], f"there is no {TOKEN}"
    assert len(set(tokens.values())) == 1, f"the hosts have different tokens: {sorted(tokens)}"
