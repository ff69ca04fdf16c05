"""Fingerprints of OpenPGP public keys, as far as telling one signing key from another goes. Pure.

A host that installs packages may have no gpg (Debian 13's apt has its own verifier), so the few lines are here.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator

_ARMOUR = re.compile(rb"-----BEGIN PGP PUBLIC KEY BLOCK-----\r?\n(.*?)-----END PGP PUBLIC KEY BLOCK-----", re.S)
_PUBLIC_KEY = 6


def fingerprints(key: bytes) -> list[str]:
    """Return the fingerprints of the primary keys in a key file, armoured or binary, in capital hexadecimal digits.

    RFC 9580, sections 4.2 (packets) and 5.5.4 (fingerprints of versions 4 and 6).

    Raises:
        ValueError: it is no key file.
    """
    blocks = [_dearmour(block) for block in _ARMOUR.findall(key)] or [key]
    found = [_fingerprint(body) for block in blocks for tag, body in _packets(block) if tag == _PUBLIC_KEY]
    if not found:
        raise ValueError("there is no OpenPGP public key in it")
    return found


def _dearmour(block: bytes) -> bytes:
    """The bytes of an armoured block: headers end with an empty line, a checksum begins with "="."""
    _, _, body = block.replace(b"\r\n", b"\n").partition(b"\n\n") if b":" in block else (b"", b"", block)
    lines = [line for line in body.split() if not line.startswith(b"=")]
    try:
        return base64.b64decode(b"".join(lines), validate=True)
    except binascii.Error as error:
        raise ValueError(f"its armour cannot be read: {error}") from error


def _packets(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield tag and body of each packet."""
    place = 0
    while place < len(data):
        first = data[place]
        if not first & 0x80:
            raise ValueError("it is no OpenPGP key file")
        if first & 0x40:
            tag, octet = first & 0x3F, data[place + 1 : place + 2]
            size = octet[0] if octet else 0
            width = 1 if size < 192 else 2 if size < 224 else 5
            head = data[place + 1 : place + 1 + width]
            if width == 2:
                size = ((size - 192) << 8) + head[-1] + 192
            elif width == 5:
                size = int.from_bytes(head[1:], "big")
        else:
            tag, width = first >> 2 & 0x0F, 1 << (first & 0x03)
            head = data[place + 1 : place + 1 + width]
            size = int.from_bytes(head, "big")
        start = place + 1 + width
        if len(head) < width or start + size > len(data):
            raise ValueError("it is cut off")
        yield tag, data[start : start + size]
        place = start + size


def _fingerprint(body: bytes) -> str:
    if body[:1] == b"\x04":
        return hashlib.sha1(b"\x99" + len(body).to_bytes(2, "big") + body).hexdigest().upper()
    if body[:1] == b"\x06":
        return hashlib.sha256(b"\x9b" + len(body).to_bytes(4, "big") + body).hexdigest().upper()
    raise ValueError(f"it is a key of version {body[0] if body else 'none'}, 4 or 6 is expected")
