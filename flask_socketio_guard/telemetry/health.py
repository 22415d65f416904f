"""Health for load balancers: a snapshot in memory, and the HTTP responses made from it."""

from __future__ import annotations

import hmac
import json
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from werkzeug.wrappers import Request, Response

from ..core.component import Check, Component, Status
from ..core.lifecycle import TICK_INTERVAL
from ..core.runtime import clock
from ..routes import health_paths
from ..states import ListenerState, TaskState
from . import records
from .records import logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from _typeshed.wsgi import StartResponse, WSGIEnvironment

    from ..config import GuardConfig
    from ..core.supervisor import Supervisor
    from .records import Telemetry

_STALE_TICKS = 3
_LATE_TICKS = 2
_CONTENT_TYPE = "application/health+json"


@dataclass(frozen=True)
class Snapshot:
    """The health of the process at one instant.

    Attributes:
        status: The worst of all checks.
        listener: State of the message-queue listener.
        checks: By ``component:measurement``.
        time: Of the snapshot, ISO 8601, UTC.
    """

    status: Status = Status.FAIL
    listener: ListenerState = ListenerState.IDLE
    checks: dict[str, Check] = field(default_factory=dict)
    time: str = ""


@dataclass(frozen=True)
class Sources:
    """The objects and functions from which a snapshot is taken."""

    supervisor: Supervisor
    is_serving: Callable[[], bool]
    listener_state: Callable[[], ListenerState]
    counts: Callable[[], Mapping[str, int]]
    components: Callable[[], Iterable[Component]] = tuple


class Health(Component):
    """Takes snapshots, and derives liveness and readiness from them."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._snapshot = Snapshot(listener=sources.listener_state())
        self._ticked_at: float | None = None
        self._lag = 0.0
        self._subscriptions: list[object] = []

    def follow(self, telemetry: Telemetry) -> None:
        """Also take a snapshot at each change of state that affects readiness."""
        self._subscriptions = [
            telemetry.subscribe(signal, lambda _: self.refresh())
            for signal in (
                records.listener_changed,
                records.broker_changed,
                records.delivery_store_changed,
                records.task_changed,
            )
        ]

    def abandon(self) -> None:
        """Unsubscribe in a forked child, which has its own instance."""
        self._subscriptions = []

    def tick(self) -> None:
        """Take a snapshot and measure the lag of the event loop; called every tick."""
        now = clock()
        if self._ticked_at is not None:
            self._lag = max(0.0, now - self._ticked_at - TICK_INTERVAL)
        self._ticked_at = now
        self.refresh()

    def refresh(self) -> None:
        """Take a snapshot between two ticks, because something has changed."""
        sources = self._sources
        checks = {
            "process:phase": Check(
                Status.PASS if sources.is_serving() else Status.FAIL,
                "serving" if sources.is_serving() else "starting or stopping",
            ),
            "eventloop:lag": Check(
                Status.FAIL if self._is_late() else Status.PASS, round(self._lag, 3), "s"
            ),
        }
        checks |= self._task_checks()
        gauges: dict[str, int] = {}
        for component in sources.components():
            checks |= component.checks()
            gauges |= component.gauges()
        for name, value in gauges.items():
            checks[name] = Check(Status.PASS, value)
        for name, count in sources.counts().items():
            checks[f"{name}:count"] = Check(Status.PASS, count)
        self._snapshot = Snapshot(
            status=max(check.status for check in checks.values()),
            listener=sources.listener_state(),
            checks=checks,
            time=datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        )

    def stop(self, timeout: float) -> None:
        """Take the last snapshot; a stopped process does not count as stale."""
        del timeout
        self._ticked_at = None
        self.refresh()

    @property
    def snapshot(self) -> Snapshot:
        """The latest snapshot."""
        return self._snapshot

    def liveness(self) -> Status:
        """Return FAIL if the process should be restarted: its ticks have stopped or are late."""
        return Status.FAIL if self._is_stale() or self._is_late() else Status.PASS

    def readiness(self) -> Status:
        """Return FAIL if the process should receive no traffic."""
        return Status.FAIL if self._is_stale() else self._snapshot.status

    def _is_stale(self) -> bool:
        if self._ticked_at is None:
            return False  # not started, or stopped: the snapshot says so
        return clock() - self._ticked_at > _STALE_TICKS * TICK_INTERVAL

    def _is_late(self) -> bool:
        return self._lag > _LATE_TICKS * TICK_INTERVAL

    def _task_checks(self) -> dict[str, Check]:
        checks = {}
        for task in self._sources.supervisor.tasks:
            status = Status.PASS
            if task.state is TaskState.FAILED:
                status = Status.FAIL if task.is_critical else Status.WARN
            elif task.state is TaskState.BACKING_OFF or task.is_flapping:
                status = Status.WARN
            if task.is_internal and status is Status.PASS:
                continue
            error = "" if task.last_error is None else type(task.last_error).__name__
            checks[f"task {task.name}:state"] = Check(status, str(task.state), output=error)
        return checks


class HealthEndpoints:
    """The HTTP side: ``/healthz``, ``/livez`` and ``/readyz``.

    As a WSGI application it sits in front of the guarded one, whose ``before_request`` functions
    and sessions therefore cannot affect a health check.

    Args:
        health: Supplies status and snapshot.
        config: Supplies the paths, and the access rule for details.
        is_debug: Returns whether details are public.
    """

    def __init__(
        self, health: Health, config: GuardConfig, *, is_debug: Callable[[], bool]
    ) -> None:
        self._health = health
        self._details = config.health_details
        self._is_debug = is_debug
        # If two endpoints share a path, the first one answers, as with routes of Flask.
        self._names = {path: name for name, path in reversed(health_paths(config).items())}

    def handles(self, path: str) -> bool:
        """Return whether *path* is one of the health paths."""
        return path in self._names

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request by its path; no I/O, no lock."""
        return self.answer(self._names[environ["PATH_INFO"]], environ)(environ, start_response)

    def answer(self, name: str, environ: WSGIEnvironment) -> Response:
        """Answer one request: ``healthz``, ``readyz`` or ``livez``.

        Source:
            Media type, ``status`` and ``checks``: draft-inadarei-api-health-check-06.
        """
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return Response(status=405, headers={"Allow": "GET, HEAD"})
        status = self._health.liveness() if name == "livez" else self._health.readiness()
        return Response(
            json.dumps(self._answer(status, environ)),
            status=503 if status is Status.FAIL else 200,
            headers={"Cache-Control": "no-store"},
            content_type=_CONTENT_TYPE,
        )

    def _answer(self, status: Status, environ: WSGIEnvironment) -> dict[str, Any]:
        snapshot = self._health.snapshot
        answer: dict[str, Any] = {"status": str(status), "listener": str(snapshot.listener)}
        if self._is_admitted(environ):
            answer["checks"] = {
                key: check.as_json(snapshot.time) for key, check in snapshot.checks.items()
            }
        return answer

    def _is_admitted(self, environ: WSGIEnvironment) -> bool:
        if self._is_debug():
            return True
        if self._details is None:
            return False
        if isinstance(self._details, str):
            given = environ.get("HTTP_AUTHORIZATION", "")
            wanted = f"Bearer {self._details}"
            return hmac.compare_digest(given.encode("latin-1"), wanted.encode())
        try:
            return bool(self._details(Request(environ)))
        except Exception:  # noqa: BLE001 - code of the application; a failure denies access
            logger.exception("SOCKETIO_GUARD_HEALTH_DETAILS raised")
            return False
