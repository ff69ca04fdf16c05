"""Where the documentation says more of a failure: files of the repository, with the anchor of a section."""

from __future__ import annotations

#: Stages of a deployment in their order.
STAGES = ("preflight", "host", "image", "weights", "container", "ray", "engine", "first-token", "verify")

#: What lines of the engine's log mean.
LOG_LINES = "docs/runbooks/troubleshooting.md"
#: What a stage does and where to look when it fails; what keeps from a host.
FAILED_RUNS = "docs/runbooks/failed-runs.md"
#: What preflight finds.
FINDINGS = "docs/reference/preflight.md"
#: The lock of a deployment.
LOCK = "docs/reference/plan.md#one-run-at-a-time"


def stage_page(stage: str) -> str:
    """The section for a stage, the page where it is none of a deployment."""
    return f"{FAILED_RUNS}#{stage}" if stage in STAGES else FAILED_RUNS
