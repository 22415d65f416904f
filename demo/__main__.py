"""Run the Harbour Exchange: two guarded gunicorn processes and a Redis between them.

    python -m demo              # until Ctrl-C
    python -m demo --check      # inject faults automatically, measure, and print a table

``REDIS_URL`` names an existing Redis to use instead of the demo's own. It is never stopped, paused
or told to drop connections, so some faults are skipped.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from demo.runner import choose_ports, running
from demo.servers import SIGNALS
from demo.waiting import DemoError, fetch

if TYPE_CHECKING:
    from types import FrameType

    from demo.runner import Demo


class Stopped(BaseException):
    """A signal asked the demo to stop."""


def serve(demo: Demo) -> int:
    """Print the addresses of the demo, and wait until it is stopped."""
    if fetch(f"{demo.processes[0].url}/client.js").code == 404:
        say(
            "The Socket.IO client for JavaScript is not installed, so the page shows only health.\n"
            "To install it: npm ci --prefix example_app   (no restart needed)\n"
        )
    say("Open both side by side. Each has a panel to break things.\n")
    for process in demo.processes:
        say(f"    {process.url}/")
    say("\nCtrl-C stops everything.")
    try:
        while True:
            demo.check_alive()
            time.sleep(0.5)
    except Stopped:
        say("\nStopping ...")
        raise


def port_number(text: str) -> int:
    """Parse a port number, 1 to 65535, from the command line."""
    if not (text.isdecimal() and 0 < int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{text} is not a port number from 1 to 65535")
    return int(text)


def say(text: str) -> None:
    """Print *text* without buffering."""
    print(text, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="inject each fault and print a table")
    parser.add_argument(
        "--ports", nargs=2, type=port_number, metavar="PORT", help="ports of the two processes"
    )
    options = parser.parse_args(arguments)

    for number in SIGNALS:
        signal.signal(number, _stop_at_signal)
    folder = Path(tempfile.mkdtemp(prefix="harbour-exchange-"))
    status = 1
    try:
        say(f"Logs are in {folder}")
        with running(folder, choose_ports(options.ports)) as demo:
            if options.check:
                from demo.check import check  # needs client packages

                status = check(demo, say)
            else:
                serve(demo)
    except Stopped:
        say("Stopped.")
        status = 130 if options.check else 0
    except DemoError as error:
        say(f"The demo cannot go on: {error}")
    if status == 1 and any(folder.iterdir()):
        say(f"The logs stay in {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return status


def _stop_at_signal(number: int, frame: FrameType | None) -> None:
    # Ignore further signals, which must not interrupt the shutdown.
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise Stopped


if __name__ == "__main__":
    sys.exit(main())
