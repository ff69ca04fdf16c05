#!/usr/bin/env python3
"""Print an IPv4 address of this machine that is neither loopback nor link-local, making one where there is none.

A machine cut off from every network may have nothing but 127.0.0.1, which no cluster can be formed on. Then
198.18.0.1 (RFC 2544: never a site's own) is added to the loopback interface, and lives as long as the machine runs.
"""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
import sys

SPARE = "198.18.0.1"
# <linux/sockios.h>
SIOCGIFADDR, SIOCSIFADDR, SIOCSIFNETMASK = 0x8915, 0x8916, 0x891C


def main() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for _, name in socket.if_nameindex():
            address = _address(control, name)
            if address and not (address.is_loopback or address.is_link_local):
                print(address)
                return 0
        if not _address(control, "lo:dsv3"):
            for request, value in ((SIOCSIFADDR, SPARE), (SIOCSIFNETMASK, "255.255.255.255")):
                fcntl.ioctl(control, request, _request("lo:dsv3", value))
    print(SPARE)
    return 0


def _address(control: socket.socket, name: str) -> ipaddress.IPv4Address | None:
    try:
        answer = fcntl.ioctl(control, SIOCGIFADDR, _request(name))
    except OSError:  # the interface has no IPv4 address
        return None
    return ipaddress.IPv4Address(answer[20:24])


def _request(name: str, address: str = "0.0.0.0") -> bytes:
    return struct.pack("16sHH4s16x", name.encode(), socket.AF_INET, 0, socket.inet_aton(address))


if __name__ == "__main__":
    sys.exit(main())
