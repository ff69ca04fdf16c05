"""Secrets are where only root reads them, and nowhere else."""

from fleet import Node

CONFIG = "/etc/deploy-dsv3"


def test_permissions(node: Node) -> None:
    """Only root can read the secrets."""
    wrong = []
    for path, file in node.seen["files"].items():
        if path.startswith(f"{CONFIG}/engine/secrets") or path.endswith("/api_keys"):
            mode = "0700" if file["kind"] == "folder" else "0600"
            if (file["mode"], file["uid"]) != (mode, 0):
                wrong.append(f"{path} has mode {file['mode']} and owner {file['uid']}, not {mode} and 0")
    assert not wrong, "; ".join(wrong)


def test_writable(node: Node) -> None:
    """Nobody but root can change what root runs."""
    wrong = [
        f"{path} ({file['mode']}, owner {file['uid']})"
        for path, file in node.seen["files"].items()
        if path.startswith(CONFIG) and file["kind"] != "link" and (file["uid"] or int(file["mode"], 8) & 0o022)
    ]
    assert not wrong, ", ".join(wrong)


def test_leaks(node: Node) -> None:
    """No secret shows in arguments, logs, labels or environment."""
    found = [f"{leak['secret']} in {leak['place']}" for leak in node.seen["leaks"]]
    assert not found, "; ".join(found)
