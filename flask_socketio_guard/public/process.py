"""Start, graceful shutdown and state of the process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .guards import Capability

if TYPE_CHECKING:
    from ..states import ListenerState


class Process(Capability):
    """Starts, drains and stops the guard in this process."""

    def start(self) -> None:
        """Start listener and tasks now; idempotent.

        Rarely needed: in a gunicorn worker the guard starts when the
        application is loaded, elsewhere with the first request.
        """
        self._guards.current().start()

    def drain(self, timeout: float | None = None) -> bool:
        """Shut down gracefully: drain the clients, stop the tasks and empty the outbox.

        From the start, ``/readyz`` answers 503 and new clients are refused. Connected
        clients are closed over ``SOCKETIO_GUARD_DRAIN_WINDOW`` seconds in a way that
        makes them reconnect by themselves. The gunicorn hooks call it at SIGTERM.
        Do not call it in a handler: it would wait for that handler to end.

        Args:
            timeout: Longest wait in seconds for handlers, for tasks and for the
                outbox each; ``None`` uses ``SOCKETIO_GUARD_STOP_TIMEOUT``.

        Returns:
            Whether all of them finished in time.
        """
        guard = self._guards.current()
        return guard.drain(guard.config.stop_timeout if timeout is None else timeout)

    def stop(self, timeout: float | None = None) -> None:
        """Stop the tasks, empty the outbox, and stop the listener.

        Args:
            timeout: Longest wait in seconds for each of these; ``None`` uses
                ``SOCKETIO_GUARD_STOP_TIMEOUT``.
        """
        guard = self._guards.current()
        guard.stop(guard.config.stop_timeout if timeout is None else timeout)

    @property
    def listener_state(self) -> ListenerState:
        """State of the message-queue listener of this process."""
        return self._guards.current().listener_state()

    @property
    def counters(self) -> dict[str, int]:
        """Numbers of losses, failures and rejections since the start, by name."""
        return self._guards.current().counters.as_dict()

    @property
    def waiting_callbacks(self) -> int:
        """Number of acknowledgement callbacks that are pending."""
        return len(self._guards.current().callbacks)
