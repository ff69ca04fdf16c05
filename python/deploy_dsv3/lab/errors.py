"""Failures of the lab."""

from __future__ import annotations

from ..errors import DeployError


class LabError(DeployError):
    """The lab could not be brought up, changed or found; running the same command again continues."""

    exit_code = 4


class LabUsageError(LabError):
    """The lab was asked for something that does not exist or does not fit."""

    exit_code = 2
