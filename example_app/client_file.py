"""Where ``npm ci`` puts the standard Socket.IO client for JavaScript.

The runner asks for it, too, which loads nothing of the application.
"""

from __future__ import annotations

from pathlib import Path

CLIENT_FOLDER = Path(__file__).parent / "node_modules" / "socket.io-client" / "dist"
CLIENT_FILE = "socket.io.min.js"
