"""The process as a whole: its start, its end, and what is known of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .guards import Capability

if TYPE_CHECKING:
    from ..states import ListenerState


class Process(Capability):
    """Starts and ends what serves the clients."""

    def start(self) -> None:
        """Start listener and tasks now.

        Seldom needed: in a gunicorn worker the guard starts when the
        application is loaded, elsewhere with the first request. Idempotent.
        """
        self._guards.current().start()

    def drain(self, timeout: float | None = None) -> bool:
        """Let the clients go, end the tasks, and empty the outbox.

        ``/readyz`` answers 503 and new clients are refused from the first
        instant; those that are here are closed over ``SOCKETIO_GUARD_DRAIN_WINDOW``
        seconds in a way that lets them come back by themselves. gunicorn's hooks
        call it at SIGTERM. Not to be called in a handler, for which it would wait.

        Args:
            timeout: Longest wait for handlers, for tasks and for the outbox, in
                seconds each; ``None`` takes ``SOCKETIO_GUARD_STOP_TIMEOUT``.

        Returns:
            Whether nothing was left undone.
        """
        guard = self._guards.current()
        return guard.drain(guard.config.stop_timeout if timeout is None else timeout)

    def stop(self, timeout: float | None = None) -> None:
        """Stop tasks, empty the outbox, stop the listener.

        Args:
            timeout: Longest wait for each of these, in seconds; ``None`` takes
                ``SOCKETIO_GUARD_STOP_TIMEOUT``.
        """
        guard = self._guards.current()
        guard.stop(guard.config.stop_timeout if timeout is None else timeout)

    @property
    def listener_state(self) -> ListenerState:
        """What is known of the message-queue listener of this process."""
        return self._guards.current().listener_state()

    @property
    def counters(self) -> dict[str, int]:
        """Counts of losses, failures and rejections since start, by name."""
        return self._guards.current().counters.as_dict()

    @property
    def waiting_callbacks(self) -> int:
        """Number of acknowledgement callbacks that wait for their client."""
        return len(self._guards.current().callbacks)
