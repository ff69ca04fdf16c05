"""Who can reach what: every port listens where it should and nowhere else."""

import ipaddress

import pytest
from fleet import Node

from deploy_dsv3 import ports
from deploy_dsv3.derive import NodePlan
from deploy_dsv3.facts import HostFacts, Listener

ALWAYS_OPEN = ("ray_cluster_node_manager_port", "ray_cluster_object_manager_port")


def listeners(facts: HostFacts, port: int) -> list[Listener]:
    return [listener for listener in facts.listening if listener.port == port]


def is_loopback(listener: Listener) -> bool:
    return ipaddress.ip_address(listener.address.removeprefix("::ffff:")).is_loopback


def described(found: list[Listener]) -> str:
    return ", ".join(f"{one.address}:{one.port} ({one.process or 'unknown process'})" for one in found)


def test_engine_port(head: Node, facts: HostFacts) -> None:
    """The engine's own port is closed to the network."""
    if head.settings["endpoint_mode"] == "direct":
        pytest.skip("endpoint_mode is direct: clients reach the engine itself")
    found = listeners(facts, head.settings["lmdeploy_server_port"])
    assert found, f"nothing listens on port {head.settings['lmdeploy_server_port']}: the engine does not serve"
    reachable = [listener for listener in found if not is_loopback(listener)]
    assert not reachable, f"{described(reachable)}: any client can administer the engine"


def test_endpoint_port(head: Node, facts: HostFacts, plan: NodePlan) -> None:
    """The endpoint listens on its address only."""
    if head.settings["endpoint_mode"] == "direct":
        pytest.skip("endpoint_mode is direct: there is no proxy")
    wanted = head.settings["endpoint_address"] or plan.address
    found = listeners(facts, head.settings["endpoint_port"])
    assert found, f"nothing listens on {wanted}:{head.settings['endpoint_port']}"
    assert {listener.address for listener in found} == {wanted}, f"{described(found)}, not {wanted} only"
    foreign = [one for one in found if facts.os.init == "systemd" and one.unit != "dsv3-endpoint.service"]
    assert not foreign, f"{described(foreign)} is not dsv3-endpoint.service"


def test_dashboard(node: Node, facts: HostFacts) -> None:
    """Ray's dashboard is closed to the network, its client server too or behind the token."""
    # Whoever reaches them runs programs as root (CVE-2023-48022). Bare Ray has neither. Where grpcio is installed, Ray
    # starts the client server on the node's address whatever is asked of it; then the token has to stand before it.
    names = ["dashboard"]
    if not node.container or node.environment.get("RAY_AUTH_MODE") != "token":
        names.append("client_server")
    ports = [node.settings[f"ray_cluster_{name}_port"] for name in names]
    reachable = [one for port in ports for one in listeners(facts, port) if not is_loopback(one)]
    assert not reachable, described(reachable)


def test_ray_port(node: Node, facts: HostFacts) -> None:
    """Ray's control port is open on the head, and on no other host."""
    found = listeners(facts, node.settings["ray_cluster_port"])
    if node.role == "head":
        assert found, f"nothing listens on port {node.settings['ray_cluster_port']}"
    else:
        ours = [one for one in found if one.container_id == node.container.get("Id", "none")]
        assert not ours, f"{described(ours)}: this worker runs a Ray head of its own"


def test_reserved_ports(facts: HostFacts, plan: NodePlan) -> None:
    """The kernel hands out none of the ports that this host needs."""
    if not plan.reserved_ports:
        pytest.skip("node_network_reserve_ports is off, or the host has no kernel settings of its own")
    found = ports.parse(facts.state.sysctls.get(ports.SYSCTL, "") if facts.state else "")
    missing = ports.parse(plan.reserved_ports) - found
    assert not missing, f"{ports.SYSCTL} lacks {ports.to_text(missing)}: a program may get one of them by chance"


def test_known_ports(engine: Node, facts: HostFacts) -> None:
    """The engine listens on the ports that were set, so a firewall can know them."""
    settings = engine.settings
    ours = {
        listener.port: listener
        for listener in facts.listening
        if listener.container_id == engine.container["Id"] and not is_loopback(listener)
    }
    fixed = {
        name: port for name, port in settings.items() if name.startswith("ray_cluster_") and name.endswith("_port")
    }
    missing = [name for name in ALWAYS_OPEN if fixed[name] not in ours]
    assert not missing, f"the engine does not listen on {', '.join(f'{name} {fixed[name]}' for name in missing)}"
    first, last = engine.seen["local_ports"]
    known = {
        *fixed.values(),
        *range(fixed["ray_cluster_min_worker_port"], fixed["ray_cluster_max_worker_port"] + 1),
        *range(first, last + 1),
        settings["lmdeploy_dist_port"],
        settings["lmdeploy_server_port"],
    }
    strange = [listener for port, listener in sorted(ours.items()) if port not in known]
    assert not strange, f"{described(strange)}: no setting names this port"
