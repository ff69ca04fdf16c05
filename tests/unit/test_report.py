"""The end of a run, for people and for machines."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from deploy_dsv3.events import Failure, HostStats, Outcome
from deploy_dsv3.findings import Finding
from deploy_dsv3.report import Report, render
from deploy_dsv3.topology import Deployment, Replica
from deploy_dsv3.verification import Check, VerificationReport

DEPLOYMENT = Deployment(replicas=(Replica(name="dsv3", head="a", workers=("b",)),))
SERVED = {"endpoint": "http://192.0.2.11:8000", "model": "deepseek-ai/DeepSeek-V3", "completion": " Paris[0]"}
RDMA = Finding(
    code="rdma-none",
    host="b",
    severity="warning",
    message="b has no RDMA device: NCCL will use sockets",
    remedy="Set rdma_required to refuse such hosts.",
)


def report(outcome: Outcome, exit_code: int = 0, **more: Any) -> Report:
    return Report(verb="deploy", exit_code=exit_code, seconds=125.0, deployment=DEPLOYMENT, outcome=outcome, **more)


def text(made: Report) -> str:
    stream = io.StringIO()
    render(made, stream)
    return stream.getvalue()


def test_a_served_model() -> None:
    outcome = Outcome(
        stages={"preflight": 2.04, "host": 60.0},
        hosts={"a": HostStats(ok=12, changed=3), "b": HostStats(ok=9)},
        report={"dsv3": SERVED},
        findings=[RDMA],
        warnings=["Ansible remarks"],
    )
    verification = VerificationReport(
        checks=(Check(host="a", suite="host", check="The driver answers", outcome="passed", seconds=0.1),),
        seconds=3.0,
    )
    made = report(outcome, verification=verification, warnings=("a moving tag",))
    told = text(made)
    assert "dsv3 serves deepseek-ai/DeepSeek-V3 at http://192.0.2.11:8000" in told
    assert "a completion came back: ' Paris[0]'" in told
    assert "The driver answers" in told
    assert "warning: a moving tag" in told
    assert "warning: Ansible remarks" in told
    assert "b has no RDMA device" in told
    assert "WARNING" in told
    assert told.rstrip().endswith("deploy: done in 2m05s, exit status 0")

    document = json.loads(json.dumps(made.as_dict()))
    assert document["exit_code"] == 0
    assert document["stages"] == [{"name": "preflight", "seconds": 2.0}, {"name": "host", "seconds": 60.0}]
    assert document["replicas"] == [{"name": "dsv3", "head": "a", "workers": ["b"], **SERVED}]
    assert document["hosts"]["a"]["changed"] == 3
    assert document["warnings"] == ["a moving tag", "Ansible remarks"]
    assert document["findings"][0]["code"] == "rdma-none"
    assert document["verification"]["passed"] is True


def test_a_failure_tells_found_cause_remedy_and_log() -> None:
    first = Failure(
        host="b",
        stage="ray",
        task="Wait for all nodes",
        role="ray_cluster",
        message="1 of 2 nodes\n[b] joined",
        cause="a firewall",
        remedy="Open port 6379.",
        page="docs/runbooks/failed-runs.md#ray",
    )
    echo = Failure(host="a", stage="ray", task="Wait for all nodes", message="gave up\nlater")
    told = text(report(Outcome(failures=[first, echo]), exit_code=4, log=Path("/state/runs/1")))
    assert "FAILED stage ray, host b: ray_cluster: Wait for all nodes" in told
    assert "    found:  1 of 2 nodes\n            [b] joined\n" in told
    assert "    cause:  a firewall\n    remedy: Open port 6379.\n    see:    docs/runbooks/failed-runs.md#ray\n" in told
    assert "also a, stage ray: gave up\n" in told
    assert "deploy: failed in 2m05s, exit status 4\nlog: /state/runs/1" in told


def test_all_findings_of_preflight_are_told() -> None:
    findings = tuple(
        Finding(code=code, host="a", severity="error", message=f"a: {code}", cause="c", remedy=f"fix {code}")
        for code in ("memory", "disk")
    )
    failure = Failure(host="a", stage="preflight", task="Judge", message="all of it", findings=findings)
    told = text(report(Outcome(failures=[failure], findings=list(findings)), exit_code=3))
    assert "found:  a: memory" in told
    assert "remedy: fix disk" in told
    assert "all of it" not in told
    assert "WARNING" not in told


def test_check_mode_says_that_nothing_was_changed() -> None:
    assert "(check mode: nothing was changed)" in text(report(Outcome(), check=True))
