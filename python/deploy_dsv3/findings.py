"""What is wrong with a host: one record with cause and remedy, shared by all checks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing found on one host that stops a deployment (`error`) or that its operator should know.

    `code` is stable and names the check; `message` has the host, the value found and the requirement.
    """

    code: str
    host: str
    severity: Severity
    message: str
    cause: str = ""
    remedy: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the finding as plain data."""
        return asdict(self)


def describe(findings: Iterable[Finding]) -> str:
    """Return the findings as readable text, errors first, one block each."""
    blocks = []
    for finding in sorted(findings, key=lambda f: (f.severity != "error", f.host, f.code)):
        lines = [f"[{finding.severity}] {finding.message}"]
        if finding.cause:
            lines.append(f"    cause:  {finding.cause}")
        if finding.remedy:
            lines.append(f"    remedy: {finding.remedy}")
        blocks.append("\n".join(lines))
    return "\n".join(blocks)
