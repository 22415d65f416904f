"""What limits by address take for one client."""

from __future__ import annotations

from flask_socketio_guard.core.addresses import address_key
from tests.support.cases import in_turn


@in_turn(
    ("address", "key"),
    [
        ("", ""),
        ("192.0.2.7", "192.0.2.7"),
        ("192.0.2.7:41234", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("[::ffff:c000:207]:80", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:DB8:1:2::", "2001:db8:1:2::/64"),
        ("[2001:db8:1:2::9]:443", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::9", "2001:db8:1:3::/64"),
        ("64:ff9b::192.0.2.7", "64:ff9b::c000:207"),
        ("fd00::7", "fd00::7"),
        ("fe80::7%eth0", "fe80::7"),
        ("fe80::7%eth1", "fe80::7"),
        ("unknown", "unknown"),
        ("1.2.3", "1.2.3"),
        ("[", "["),
        (":", ":"),
        ("\u0661.2.3.4", "\u0661.2.3.4"),
        ("x" * 8000, "x" * 64),
    ],
)
def test_whom_a_limit_takes_for_one_client(address: str, key: str) -> None:
    """An IPv6 client has 2 ** 64 addresses, and a proxy may pass on anything."""
    assert address_key(address) == key
