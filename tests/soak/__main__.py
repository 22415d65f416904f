"""``python -m tests.soak``: see ``--help``."""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

from tests.soak.run import main  # noqa: E402  What this imports has to be patched by then.

if __name__ == "__main__":
    main()
