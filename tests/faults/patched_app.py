"""The application as those write it who patch the standard library themselves.

Preloaded by gunicorn, it patches the master.
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

from tests.faults.app import create_app  # noqa: E402 - after patching, by design

__all__ = ["create_app"]
