"""What limits by address take for one client."""

from __future__ import annotations

from functools import lru_cache
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import Final

_PREFIX: Final = 64  # bits, of 128
_LONGEST: Final = 64  # characters of what is no address; proxies pass on what they are told
_MAPPED: Final = 0xFFFF  # ::ffff:0:0/96
_EACH_FOR_ITSELF: Final = (  # bits behind the prefix, and the prefix
    (121, 0xFC >> 1),  # fc00::/7, private: hosts of one LAN, which are not behind NAT
    (118, 0xFE80 >> 6),  # fe80::/10, the same
    (32, 0x64FF9B << 64),  # 64:ff9b::/96, clients with IPv4 addresses
)


@lru_cache(maxsize=4096)
def address_key(address: str) -> str:
    """Return what a client at *address* is counted as.

    An IPv6 client counts as its /64 network: it may take any of the addresses in there, a new one
    for each connection. A port is left out, and an IPv4 address is the same in either notation.

    Args:
        address: As the application sees it, from a socket or a proxy's ``X-Forwarded-For``.

    Returns:
        An address, a network such as ``"2001:db8:1:2::/64"``, or the beginning of what is neither;
        ``""`` for a Unix socket.

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
    if any(number >> bits == prefix for bits, prefix in _EACH_FOR_ITSELF):
        return str(IPv6Address(number))  # without its zone
    return f"{IPv6Address(number >> _PREFIX << _PREFIX)}/{_PREFIX}"
