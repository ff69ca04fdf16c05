"""Fingerprints of key files, beside what gpg says of the same files."""

from __future__ import annotations

import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from deploy_dsv3.openpgp import fingerprints

KEYRINGS = sorted(Path("/usr/share/keyrings").glob("*.gpg")) if shutil.which("gpg") else []


@pytest.mark.skipif(not KEYRINGS, reason="this machine has no gpg, or no keyrings")
@pytest.mark.parametrize("path", KEYRINGS, ids=lambda path: path.name)
@pytest.mark.parametrize("armoured", [False, True])
def test_as_gpg_says(path: Path, armoured: bool, tmp_path: Path) -> None:
    listing = ["gpg", "--homedir", str(tmp_path), "--with-colons", "--show-keys", str(path)]
    told = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.splitlines()
    kinds = [(line.split(":")[0], line.split(":")[9]) for line in told if line.startswith(("pub:", "sub:", "fpr:"))]
    primary = [after[1] for before, after in pairwise(kinds) if before[0] == "pub"]
    key = path.read_bytes()
    if armoured:
        enarmour = ["gpg", "--homedir", str(tmp_path), "--enarmor"]
        key = subprocess.run(enarmour, input=key, capture_output=True, check=True).stdout
        key = key.replace(b"PGP ARMORED FILE", b"PGP PUBLIC KEY BLOCK")
    assert fingerprints(key) == primary


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        (b"<html>404 Not Found</html>", "no OpenPGP"),
        (b"", "no OpenPGP public key"),
        (b"\x99\x01\x0d\x04", "cut off"),
        (b"\x98\x01\x03", "version 3"),
        (b"-----BEGIN PGP PUBLIC KEY BLOCK-----\n\n!!!\n-----END PGP PUBLIC KEY BLOCK-----\n", "armour"),
    ],
)
def test_what_is_no_key(key: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        fingerprints(key)
