"""The key under which rate limits by address count one client."""

from __future__ import annotations

from functools import lru_cache
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import Final

_PREFIX: Final = 64  # bits, of 128
_LONGEST: Final = 64  # characters of text that is not an address: clients can forge the header
_MAPPED: Final = 0xFFFF  # ::ffff:0:0/96
_COUNTED_SINGLY: Final = (  # networks whose hosts count one by one: host bits, prefix
    (121, 0xFC >> 1),  # fc00::/7, unique local: hosts of one LAN, not behind NAT
    (118, 0xFE80 >> 6),  # fe80::/10, link-local: the same
    (32, 0x64FF9B << 64),  # 64:ff9b::/96, NAT64: clients that have IPv4 addresses
)


@lru_cache(maxsize=4096)
def address_key(address: str) -> str:
    """Return the key under which a client at *address* is counted.

    An IPv6 client counts as its /64 network, because it can use a new address of that network for
    each connection. The port is ignored, and an IPv4-mapped address counts as the IPv4 address.

    Args:
        address: As the application sees it, from a socket or a proxy's ``X-Forwarded-For``.

    Returns:
        An address, a network such as ``"2001:db8:1:2::/64"``, or, if *address* cannot be parsed,
        its first 64 characters; ``""`` for a Unix socket.

    Source:
        RFC 4291, 2.5.1: interface identifiers have 64 bits; 2.5.5.2: IPv4-mapped addresses.
        RFC 6052, 2.1: the well-known prefix of NAT64.
    """
    host = address.strip()
    if host.startswith("["):
        host = host[1:].partition("]")[0]
    elif host.count(":") == 1:
        host = host.partition(":")[0]
    try:
        if ":" not in host:
            return str(IPv4Address(host))
        number = int(IPv6Address(host))
    except AddressValueError:
        return address[:_LONGEST]
    if number >> 32 == _MAPPED:
        return str(IPv4Address(number & 0xFFFFFFFF))
    if any(number >> bits == prefix for bits, prefix in _COUNTED_SINGLY):
        return str(IPv6Address(number))  # without its zone
    return f"{IPv6Address(number >> _PREFIX << _PREFIX)}/{_PREFIX}"
