"""The web page of the Harbour Exchange, and the JavaScript client that it needs."""

from __future__ import annotations

import os
from pathlib import Path

from flask import Blueprint, Response, current_app, render_template, request, send_from_directory

from example_app.market import PITS

# ``npm ci`` installs the standard Socket.IO client for JavaScript here.
CLIENT_FOLDER = Path(__file__).parent / "node_modules" / "socket.io-client" / "dist"
CLIENT_FILE = "socket.io.min.js"

pages = Blueprint("pages", __name__)


@pages.get("/")
def floor() -> str:
    """Show the trading floor, or how to install the missing client."""
    return render_template(
        "floor.html",
        process=current_app.config["PROCESS"],
        pid=os.getpid(),
        pits=PITS,
        peers=[peer for peer in current_app.config.get("PEERS", []) if peer != _own_address()],
        has_client=(CLIENT_FOLDER / CLIENT_FILE).is_file(),
    )


@pages.get("/client.js")
def client() -> Response:
    """Serve the standard Socket.IO client from here, so that the page works offline."""
    return send_from_directory(CLIENT_FOLDER, CLIENT_FILE)


@pages.after_request
def restrict(response: Response) -> Response:
    """Restrict the page to its own files: no inline scripts, no other hosts, no frames."""
    response.headers["Content-Security-Policy"] = (
        "default-src 'self'; connect-src 'self' ws: wss:; base-uri 'none'; form-action 'self'; "
        "frame-ancestors 'none'"
    )
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "no-referrer"
    return response


def _own_address() -> str:
    return request.host_url.rstrip("/")
