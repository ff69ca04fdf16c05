"""Exit codes and the shape of messages."""

from __future__ import annotations

import pytest

from deploy_dsv3 import errors
from deploy_dsv3.errors import ConfigError, ConfigErrors, DeployError, Interrupted


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InternalError("x"), 1),
        (errors.UsageError("x"), 2),
        (errors.config_error("x"), 2),
        (errors.PreflightError("x"), 3),
        (errors.HostError("x"), 4),
        (errors.VerificationError("x"), 5),
        (errors.UnreachableError("x"), 6),
        (errors.LockedError("x"), 7),
        (Interrupted(2), 130),
        (Interrupted(15), 143),
    ],
)
def test_a_class_is_an_exit_code(error: DeployError, code: int) -> None:
    assert error.exit_code == code


def test_config_error_tells_where_what_and_remedy() -> None:
    error = ConfigError(
        message="lmdeploy_tp is negative",
        file="prod.ini",
        line=7,
        key="lmdeploy_tp",
        host="gpu-01",
        found="-1",
        expected="at least 0",
        remedy="Correct the value.",
    )
    assert str(error).splitlines() == [
        "prod.ini:7 [gpu-01]: lmdeploy_tp is negative",
        "    found: -1",
        "    expected: at least 0",
        "    remedy: Correct the value.",
    ]
    assert error.as_dict()["line"] == 7
    assert ConfigError(message="m").as_dict() == {"message": "m"}


def test_config_errors_fold_what_is_the_same() -> None:
    one, two = ConfigError(message="a"), ConfigError(message="b")
    collected = ConfigErrors([one, two, one])
    assert list(collected) == [one, two]
    assert str(collected).endswith("2 mistakes in inventory or settings; no host was touched")
    assert [error["message"] for error in collected.as_dict()["errors"]] == ["a", "b"]


def test_config_errors_are_never_empty() -> None:
    with pytest.raises(ValueError, match="at least one"):
        ConfigErrors([])


def test_interrupted_says_that_a_rerun_continues() -> None:
    assert "continues" in Interrupted(2).remedy
