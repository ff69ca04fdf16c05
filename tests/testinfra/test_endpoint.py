"""The endpoint on the head, seen from the head."""

import pytest
from fleet import Node


def test_unit(head: Node) -> None:
    """The endpoint runs, and will after a reboot."""
    if head.settings["endpoint_mode"] == "direct":
        pytest.skip("endpoint_mode is direct: there is no proxy")
    unit = head.seen["units"].get("dsv3-endpoint.service", {"active": "missing", "enabled": "missing"})
    assert unit["active"] == "active", f"dsv3-endpoint.service is {unit['active']}"
    assert unit["enabled"] == "enabled", f"dsv3-endpoint.service is {unit['enabled']}: not started at boot"


def test_engine_health(head: Node) -> None:
    """The engine calls itself healthy."""
    health = head.seen["health"]
    assert health, "there is no serve.json: nothing is served yet"
    assert health["status"] == 200, f"/health on the head: {health['status'] or 'no answer'} {health['body']}"
