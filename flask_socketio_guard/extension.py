"""``SocketIOGuard``: the extension object that applications hold."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload
from weakref import WeakKeyDictionary, ref

import flask
from flask import Flask, current_app, has_app_context

from .app_guard import AppGuard, stop_superseded
from .clients.send_queue import SendOutcome
from .config import GuardConfig, require_plain, require_seconds
from .core.tasks import TaskSpec, restart_policy, task_name, task_spec
from .delivery.records import Retry, is_text
from .errors import ConfigError, ConnectionClosed, DeliveryInvalid, DuplicateTask
from .events.pipeline import RATE_KEYS, HandlerEntry
from .events.schema import validator
from .gunicorn import booted_worker, join_worker, loading_worker, post_worker_init, require_fitting
from .middleware import GuardMiddleware, LateMiddleware
from .registry import Registry
from .routes import require_free_paths
from .scripts import serve_scripts
from .telemetry.records import logger
from .upstream import check_versions, given_back_on_failure, is_socketio

if TYPE_CHECKING:
    from flask_socketio import SocketIO

    from .clients.connections import Connections
    from .core.supervisor import TaskHandle
    from .delivery.receipts import Receipt
    from .delivery.records import DeadLetter
    from .events.broadcast_ack import BroadcastAnswers
    from .events.handlers import HandlerCall
    from .states import ListenerState
    from .telemetry.records import Failure

F = TypeVar("F", bound=Callable[..., Any])
TaskT = TypeVar("TaskT", bound=Callable[[], Any])
T = TypeVar("T")

_KEY = "socketio_guard"
_REQUIREMENTS = ("any", "all")
_RESERVED_EVENTS = frozenset(
    ("connect", "connect_error", "disconnect", "disconnecting", "newListener", "removeListener")
)


class SocketIOGuard:
    """Guards a Flask-SocketIO application.

    Create it with an application, or without one and call :meth:`init_app`
    from the application factory. One object can guard several applications.

    Args:
        app: The application.
        socketio: Its ``SocketIO``, initialised with *app* before. Without an
            application: a write-only ``SocketIO(message_queue=...)``.
        settings: Any attribute of :class:`GuardConfig`; wins over ``app.config``.

    Raises:
        ConfigError: See :meth:`init_app`.
    """

    def __init__(
        self, app: Flask | None = None, socketio: SocketIO | None = None, **settings: Any
    ) -> None:
        self._settings = settings
        # An application holds its guard, through its middleware; nothing here holds either.
        self._guards: WeakKeyDictionary[Flask, ref[AppGuard]] = WeakKeyDictionary()
        self._references: list[ref[AppGuard]] = []  # the same; every emit goes through them
        self._write_only: AppGuard | None = None
        self.registry = Registry()
        if app is not None or socketio is not None:
            self.init_app(app, socketio)

    def init_app(
        self, app: Flask | None, socketio: SocketIO | None = None, **settings: Any
    ) -> None:
        """Guard *app* and its *socketio*.

        Call it after ``socketio.init_app(app)``; handlers may be registered
        before and after. Settings are read now: keywords win over ``app.config``, and that over
        environment variables, which have the same names, ``SOCKETIO_GUARD_*``.
        :class:`GuardConfig` lists them all.

        Args:
            app: The application, or ``None`` for a write-only *socketio*.
            socketio: Its ``SocketIO``; taken from the application if left out.
            settings: Win over those of the constructor and of *app*.

        Raises:
            ConfigError: The call comes too early or twice, or a setting is wrong.
            IncompatibleVersion: Flask-SocketIO, python-socketio or
                python-engineio is too old.
        """
        check_versions()
        _require_kinds(app, socketio)
        overrides = {**self._settings, **settings}
        if app is None:
            self._init_write_only(socketio, overrides)
            return
        if _KEY in app.extensions:
            raise ConfigError(
                "this app already has a SocketIOGuard: call init_app() once for each app"
            )
        socketio = self._socketio_of(app, socketio)
        stop_superseded(socketio)
        config = GuardConfig.from_mapping(app.config, **overrides)
        require_free_paths(app, config)
        self._protect(app, socketio, config)

    def _protect(self, app: Flask, socketio: SocketIO, config: GuardConfig) -> None:
        """Guard *app*, or leave it as it was."""
        worker = loading_worker() or booted_worker()
        if worker is not None:
            require_fitting(socketio.server.async_mode, worker)
        served = app.wsgi_app
        with given_back_on_failure(socketio):
            guard = AppGuard(app, socketio, config, self.registry)
            try:
                guard.register_all()
                cast("Any", guard.socketio).initialised = self._initialised
                if config.scripts_path is not None:
                    serve_scripts(app, config.scripts_path)
                self._guards[app] = ref(guard)
                app.extensions[_KEY] = self
                app.wsgi_app = GuardMiddleware(served, guard)  # type: ignore[method-assign]
                if worker is not None:
                    join_worker(worker)
                    if worker is booted_worker():
                        post_worker_init(worker)
            except BaseException:
                guard.discard()
                self._guards.pop(app, None)
                app.extensions.pop(_KEY, None)
                app.wsgi_app = served  # type: ignore[method-assign]
                raise
            finally:
                self._references = list(self._guards.values())

    def _initialised(self, socketio: SocketIO, app: Flask | None) -> None:
        """Guard the new server of *socketio*, which was initialised once more.

        With other options, perhaps; its handlers are those that upstream registers anew, and
        those of this object.

        Raises:
            ConfigError: It cannot be; the application is without a guard then.
        """
        if app is None:
            former = self._write_only
            if former is not None and former.socketio is socketio:
                former.discard()
                self._write_only = None
                self._protect_write_only(socketio, former.config)
            return
        reference = self._guards.get(app)
        guard = None if reference is None else reference()
        if guard is not None and guard.socketio is socketio:
            guard.discard()
            del self._guards[app], app.extensions[_KEY]
            self._protect(app, socketio, guard.config)
        elif _KEY not in app.extensions:
            # As a factory does that is called again; most of them call init_app() next.
            late = partial(self._protect_late, app, socketio, socketio.server)
            app.wsgi_app = LateMiddleware(app, late)  # type: ignore[method-assign]

    def _protect_late(self, app: Flask, socketio: SocketIO, server: object) -> None:
        if _KEY not in app.extensions and socketio.server is server:
            logger.warning(
                "the SocketIO of %r was guarded for another application, and this one was not: it "
                "is now; call guard.init_app(app, socketio) after socketio.init_app(app)",
                app.name,
            )
            try:
                self.init_app(app, socketio)
            except AssertionError:  # Flask's: it was tested before, and takes no blueprint any more
                self.init_app(app, socketio, scripts_path=None)

    def _init_write_only(self, socketio: SocketIO | None, overrides: dict[str, Any]) -> None:
        if socketio is None or socketio.server is None:
            raise ConfigError(
                "without an app the guard needs a write-only SocketIO: "
                "SocketIOGuard(socketio=SocketIO(message_queue=...))"
            )
        if hasattr(socketio, "sockio_mw"):
            raise ConfigError(
                "this SocketIO was made with an app: pass it too, SocketIOGuard(app, socketio)"
            )
        if self._write_only is not None:
            raise ConfigError("this SocketIOGuard already has a write-only SocketIO")
        self._protect_write_only(socketio, GuardConfig.from_environment(**overrides))

    def _protect_write_only(self, socketio: SocketIO, config: GuardConfig) -> None:
        with given_back_on_failure(socketio):
            guard = AppGuard(None, socketio, config, self.registry)
            try:
                guard.register_all()
                cast("Any", guard.socketio).initialised = self._initialised
            except BaseException:
                guard.discard()
                raise
        self._write_only = guard

    def _socketio_of(self, app: Flask, socketio: SocketIO | None) -> SocketIO:
        known = app.extensions.get("socketio")
        if socketio is None:
            socketio = known
        if socketio is None:
            raise ConfigError(
                "the app has no SocketIO: call socketio.init_app(app) before guard.init_app(app)"
            )
        if socketio.server is None or known is not socketio:
            raise ConfigError(
                "this SocketIO does not serve the app yet: "
                "call socketio.init_app(app) before guard.init_app(app, socketio)"
            )
        return socketio

    # Handlers

    def on(
        self,
        message: str,
        namespace: str | None = None,
        *,
        timeout: float | None = None,
        ordered: bool = False,
        rate: str | None = None,
        rate_per: str = "session",
        schema: Any = None,
    ) -> Callable[[F], F]:
        """Register an event handler; as ``SocketIO.on``, and before ``init_app`` too.

        Args:
            message: Event name.
            namespace: Socket.IO namespace; ``None`` is ``"/"``.
            timeout: Longest run of the handler, in seconds, > 0. When it is
                over the client gets an error acknowledgement with code
                ``"timeout"``. Under gevent the handler is interrupted at its next
                wait; a thread cannot be, so under threading it runs on unheard.
            ordered: Whether a client's events of this name are handled one after
                another, in the order in which they came.
            rate: How often a client may send it, such as ``"20/second"``; beyond
                that the acknowledgement is an error with code ``"rate_limited"``.
            rate_per: Whose events *rate* counts together: those of one ``"session"``, which is a
                client's transport and outlasts leaving and joining a namespace; of one
                ``"identity"`` (:meth:`identify`; of the session until it has one); or of one
                ``"address"``, as the application sees it (behind a proxy: with Werkzeug's
                ``ProxyFix``; of the session where there is none).
            schema: What the arguments must be: a pydantic model, any type that
                pydantic understands (a dataclass, a TypedDict, ``list[int]``), a
                tuple of these for several arguments, or ``True`` for the
                handler's own annotations. The handler gets validated values;
                what does not fit is refused with code ``"invalid"``.

        Raises:
            ConfigError: An option is out of range, or the library behind it is
                not installed.
        """
        if timeout is not None:
            require_seconds("timeout", timeout)
        is_reserved = message in ("connect", "disconnect")
        if is_reserved and (ordered or rate is not None or schema is not None):
            raise ConfigError(f"ordered, rate and schema are not for {message!r} handlers")
        if rate_per not in RATE_KEYS:
            choices = ", ".join(map(repr, RATE_KEYS))
            raise ConfigError(f"rate_per must be one of {choices}, not {rate_per!r}")

        def decorator(handler: F) -> F:
            require_plain(f"the handler of {message!r}", handler)
            fits = None if schema is None else validator(schema, handler)
            entry = HandlerEntry(
                message, handler, namespace, timeout, ordered, rate, rate_per, fits
            )
            self.registry.handlers.append(entry)
            for guard in self._all():
                guard.register(entry)
            return handler

        return decorator

    @overload
    def event(self, handler: F, /) -> F: ...

    @overload
    def event(
        self,
        namespace: str | None = None,
        /,
        *,
        timeout: float | None = None,
        ordered: bool = False,
        rate: str | None = None,
        rate_per: str = "session",
        schema: Any = None,
    ) -> Callable[[F], F]: ...

    @overload
    def event(
        self,
        *,
        namespace: str | None = None,
        timeout: float | None = None,
        ordered: bool = False,
        rate: str | None = None,
        rate_per: str = "session",
        schema: Any = None,
    ) -> Callable[[F], F]: ...

    def event(self, *args: Any, **kwargs: Any) -> Any:
        """Register an event handler under the name of the function; as ``SocketIO.event``.

        Takes the namespace and the keywords of :meth:`on`. Usable with and without parentheses.
        """
        if len(args) == 1 and not kwargs and callable(args[0]):
            return self.on(args[0].__name__)(args[0])

        def decorator(handler: F) -> F:
            return self.on(handler.__name__, *args, **kwargs)(handler)

        return decorator

    def on_event(
        self,
        message: str,
        handler: Callable[..., Any],
        namespace: str | None = None,
        **options: Any,
    ) -> None:
        """Register an event handler without a decorator; takes the keywords of :meth:`on`."""
        self.on(message, namespace, **options)(handler)

    def handshake(
        self, message: str, namespace: str | None = None, *, timeout: float = 10.0, **options: Any
    ) -> Callable[[F], F]:
        """Register the handler of the application's own handshake.

        A client of *namespace* is ``ready`` once the handler has returned anything
        but ``False``; one that is not after *timeout* seconds is disconnected.
        ``guard.emit(..., ready_only=True)`` reaches only those that are ready.

        Args:
            message: Name of the event that a client sends first.
            namespace: Socket.IO namespace; ``None`` is ``"/"``.
            timeout: In seconds after the connect handler has let it in, > 0.
            options: The keywords of :meth:`on`, except ``timeout``.

        Raises:
            ConfigError: The namespace has a handshake already.
        """
        require_seconds("timeout", timeout)
        where = namespace or "/"
        if where in self.registry.handshakes:
            raise ConfigError(f"namespace {where!r} already has a handshake")
        self.registry.handshakes[where] = timeout
        for guard in self._all():
            guard.handshakes.require(where, timeout)

        def decorator(handler: F) -> F:
            require_plain(f"the handler of {message!r}", handler)

            @wraps(handler)
            def shaking(*args: Any) -> Any:
                answer = handler(*args)
                if answer is not False:
                    connection = self._current().connections.find(flask.request.sid)  # type: ignore[attr-defined]
                    if connection is not None:
                        connection.shake_hands()
                return answer

            self.on(message, namespace, **options)(shaking)
            return handler

        return decorator

    def before_event(self, hook: Callable[[HandlerCall], T]) -> Callable[[HandlerCall], T]:
        """Call *hook* before every handler, connect and disconnect handlers included.

        It runs in the handler's request context, with a :class:`HandlerCall`. It may
        raise :class:`EventRejected`: then the handler does not run, and the
        client is told (a connect is refused).
        """
        self.registry.before_event.append(hook)
        return hook

    def on_failure(self, hook: Callable[[Failure], T]) -> Callable[[Failure], T]:
        """Call *hook* once for every failure, of handlers, callbacks and tasks alike.

        It gets a :class:`Failure`, and must not block.
        """
        self.registry.on_failure.append(hook)
        return hook

    def on_dead_letter(self, hook: Callable[[DeadLetter], T]) -> Callable[[DeadLetter], T]:
        """Call *hook* for every message of :meth:`deliver` that did not arrive.

        It gets a :class:`DeadLetter`, in a task of its own, in the process that has given the
        message up; at most once, as that process may end. All are listed by
        :meth:`dead_letters`.
        """
        if not callable(hook):
            raise TypeError(f"a hook must be callable, not {hook!r}")
        self.registry.on_dead_letter.append(hook)
        return hook

    # Sending

    def emit(
        self,
        event: str,
        *args: Any,
        namespace: str | None = None,
        to: Any = None,
        room: Any = None,
        include_self: bool = True,
        skip_sid: Any = None,
        callback: Callable[..., Any] | None = None,
        ignore_queue: bool = False,
        callback_timeout: float | None = None,
        on_timeout: Callable[[], Any] | None = None,
        volatile: bool = False,
        ready_only: bool = False,
        strict: bool = False,
    ) -> SendOutcome:
        """Emit an event; as ``SocketIO.emit``, and from any thread.

        Args:
            event: Event name.
            args: At most one payload; a tuple becomes several arguments.
            namespace: Socket.IO namespace; ``None`` is ``"/"``.
            to: Session id, room, or list of rooms. Only ``None`` is everyone: an empty
                list is nobody, and ``""`` and ``0`` are rooms.
            room: Another name of *to*.
            include_self: Whether the client whose event is being handled gets it too.
            skip_sid: Session ids that do not get it.
            callback: Called with the client's acknowledgement, in a task of its own.
            ignore_queue: Emit to clients of this process only.
            callback_timeout: Longest wait for the acknowledgement, in seconds,
                > 0; ``None`` takes ``SOCKETIO_GUARD_CALLBACK_TIMEOUT``.
            on_timeout: Called, once and in a task of its own, when no
                acknowledgement will come: the time is over or the client is gone.
            volatile: Drop it for a client that does not take at once what is sent.
            ready_only: Send it only to clients whose handshake is done
                (:meth:`handshake`).
            strict: Raise if it was dropped.

        Returns:
            What became of it: ``"queued"`` for a client of this process,
            ``"dropped_closed"`` or ``"dropped_slow"`` if no recipient here gets it,
            ``"handed_to_queue"`` if the other processes were told. For a room,
            the best that became of it for any client here.

        Raises:
            ConnectionClosed: *strict*, and it was dropped.
            TypeError: JSON cannot hold the payload; nothing was sent.
            ValueError: It holds a NaN or an infinity, which JSON has not; nothing was sent.
            OutboxFull: The message queue is away and the outbox is full; nothing was sent.
        """
        guard = self._current()
        if not include_self and not skip_sid:
            skip_sid = flask.request.sid  # type: ignore[attr-defined]
        ack = None
        if callback is not None:
            ack = guard.ack_callback(callback, callback_timeout, on_timeout)
        # An application's own emit() may know none of the options.
        options = {"volatile": volatile, "ready_only": ready_only} if volatile or ready_only else {}
        outcome: SendOutcome = guard.server.emit_and_tell(
            event,
            *args,
            namespace=namespace or "/",
            to=room if to is None else to,
            skip_sid=skip_sid,
            callback=ack,
            ignore_queue=ignore_queue,
            **options,
        )
        if strict and outcome in (SendOutcome.DROPPED_CLOSED, SendOutcome.DROPPED_SLOW):
            raise ConnectionClosed(f"the event was not sent: {outcome}")
        return outcome

    def send(self, data: Any, json: bool = False, **kwargs: Any) -> SendOutcome:
        """Send a message; as ``SocketIO.send``, with the keywords of :meth:`emit`."""
        return self.emit("json" if json else "message", data, **kwargs)

    def call(self, event: str, *args: Any, **kwargs: Any) -> Any:
        """Emit to one client and wait for its answer; as ``SocketIO.call``.

        Raises:
            ConnectionClosed: The client is gone; raised as soon as that is known.
            socketio.exceptions.TimeoutError: No answer within ``timeout`` seconds.
        """
        return self._current().socketio.call(event, *args, **kwargs)

    def broadcast_call(
        self,
        event: str,
        *args: Any,
        room: str,
        timeout: float = 10.0,
        namespace: str | None = None,
    ) -> BroadcastAnswers:
        """Emit to everybody in a room, in all processes, and wait for their answers.

        Args:
            event: Event name.
            args: At most one payload; a tuple becomes several arguments.
            room: Session id or room.
            timeout: Longest wait, in seconds, > 0. It ends as soon as everybody has answered,
                where it is known how many processes there are, which Redis tells.
            namespace: Socket.IO namespace; ``None`` is ``"/"``.

        Returns:
            The answers by session id, and who did not answer.

        Raises:
            ConfigError: *room* is no text, or *timeout* not > 0.
            TypeError: JSON cannot hold the payload; nothing was sent.
            ValueError: It holds a NaN or an infinity, which JSON has not; nothing was sent.
        """
        require_seconds("timeout", timeout)
        if not isinstance(room, str):
            raise ConfigError(f"room must be a text, not {room!r}")
        namespace = _namespace(namespace)
        guard = self._current()
        guard.listen()
        return guard.broadcast_acks.ask(
            event, _arguments(args), room=room, namespace=namespace, timeout=timeout
        )

    def disconnect(self, sid: str, namespace: str | None = None) -> bool:
        """Disconnect a client of this or another process; idempotent, from any thread.

        Args:
            sid: Its session id.
            namespace: ``None``: the one that the session id belongs to.

        Returns:
            Whether a client of this process is being disconnected because of
            this call. ``False`` for one that is gone, or elsewhere; with a message
            queue the other processes are asked.
        """
        guard = self._current()
        known = guard.connections.find(sid)
        if namespace is None and known is not None:
            namespace = known.namespace
        return bool(guard.server.end(sid, namespace=namespace))

    # Messages that must arrive

    def deliver(
        self,
        event: str,
        *args: Any,
        to: str,
        ttl: float | None = None,
        retry: Retry | None = None,
        key: str | None = None,
        ordered: bool = False,
        require: str = "any",
        with_id: bool = False,
        namespace: str | None = None,
        on_delivered: Callable[[Receipt], object] | None = None,
        on_expired: Callable[[Receipt], object] | None = None,
    ) -> Receipt:
        """Send an event that must arrive: at least once, until it is acknowledged.

        It is kept while its recipient is away, and sent again where no acknowledgement
        comes. The client acknowledges as any event: a handler in JavaScript calls its last
        argument, one of python-socketio returns. One that answers with an object that has a
        key ``error`` refuses the message.

        Args:
            event: Event name.
            args: At most one payload; a tuple becomes several arguments. JSON only.
            to: A session id, a room, or an identity (:meth:`identify`).
            ttl: Time to live: seconds after which it is given up, > 0; ``None`` takes
                ``SOCKETIO_GUARD_DELIVERY_TTL``.
            retry: When it is sent again; ``None``: after
                ``SOCKETIO_GUARD_DELIVERY_ACK_TIMEOUT`` seconds, and then ever less often.
            key: Replaces the message with the same key to the same recipient, if that has
                not ended.
            ordered: Whether it waits for the ordered ones to the recipient before it.
            require: ``"any"``: one acknowledgement will do. ``"all"``: each of the devices
                that an identity has by then must acknowledge it.
            with_id: Whether the last argument is ``{"delivery_id": str, "attempt": int}``, by
                which a client knows a message that it has had before.
            namespace: Socket.IO namespace; ``None`` is ``"/"``.
            on_delivered: Called with the receipt, in a task of its own, in this process.
            on_expired: The same, when the message becomes a dead letter: it has expired, is
                gone or was refused.

        Returns:
            A receipt with ``id``, ``state``, ``attempts``, ``wait(timeout)`` and ``cancel()``.

        Raises:
            ConfigError: An option is out of range; or the process only emits, and has no store
                that it shares with others.
            DeliveryInvalid: JSON or UTF-8 cannot hold it, or it is too large.
            DeliveryStoreFull: Too many messages wait.
            DeliveryStoreError: The store does not answer; the message may be stored all the
                same.
        """
        guard = self._current()
        _require_text("event", event)
        _require_text("to", to)
        if key is not None:
            _require_text("key", key)
        if event in _RESERVED_EVENTS:
            raise ConfigError(f"the clients of Socket.IO keep the event {event!r} for themselves")
        if require not in _REQUIREMENTS:
            raise ConfigError(f"require must be 'any' or 'all', not {require!r}")
        _require_flag("ordered", ordered)
        _require_flag("with_id", with_id)
        _require_hook("on_delivered", on_delivered)
        _require_hook("on_expired", on_expired)
        if ttl is not None:
            require_seconds("ttl", ttl)
        if retry is not None and not isinstance(retry, Retry):
            raise ConfigError(f"retry must be a Retry, not {retry!r}")
        arguments = _arguments(args)
        guard.delivery.require_store()
        guard.lifecycle.start()
        return guard.delivery.api.put(
            event,
            arguments,
            recipient=to,
            ttl=guard.config.delivery_ttl if ttl is None else ttl,
            namespace="/" if namespace is None else _namespace(namespace),
            retry=guard.delivery.retry if retry is None else retry,
            key=key,
            is_ordered=ordered,
            requires_all=require == "all",
            has_id=with_id,
            on_delivered=on_delivered,
            on_expired=on_expired,
        )

    def receipt(self, id: str) -> Receipt:
        """Return the receipt of a message by its id.

        Raises:
            ConfigError: This process only emits, and has no store that it shares with others.
            UnknownDelivery: There is no such message, or it ended too long ago.
            DeliveryStoreError: The store does not answer.
        """
        guard = self._current()
        guard.delivery.require_store()
        guard.lifecycle.start()
        return guard.delivery.api.receipt(id)

    def identify(self, sid: str, identity: str) -> bool:
        """Say whose device a client is, until it leaves; usually in the connect handler.

        Whatever waits for *identity* is sent to it.

        Args:
            sid: Session id of a client of this process.
            identity: The application's own name for a person or device, such as a user id.

        Returns:
            Whether the client is here.

        Raises:
            ConfigError: *identity* is no text.
            RoomInvalid: It is the session id of another client.
        """
        _require_text("identity", identity)
        return self._current().identify(sid, identity)

    def dead_letters(self, limit: int = 100) -> list[DeadLetter]:
        """Return the newest messages that did not arrive, newest first.

        Args:
            limit: How many at most, >= 1.

        Raises:
            ConfigError: *limit* is no such number; or see :meth:`receipt`.
            DeliveryStoreError: The store does not answer.
        """
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise ConfigError(f"limit must be an integer >= 1, not {limit!r}")
        guard = self._current()
        guard.delivery.require_store()
        guard.lifecycle.start()
        return guard.delivery.store_client.dead_letters(limit)

    # Connections

    @property
    def connections(self) -> Connections:
        """The connections of this process, by session id."""
        return self._current().connections

    def is_connected(self, sid: str) -> bool:
        """Say whether a client of this process is connected: let in, and not closing."""
        connection = self._current().connections.find(sid)
        return connection is not None and connection.is_open

    def checkpoint(self, sid: str) -> None:
        """Give way to other tasks, then make sure that a client is still there.

        For a long loop that sends to it, which would otherwise notice at its end.

        Args:
            sid: Session id of a client of this process.

        Raises:
            ConnectionClosed: It is gone.
        """
        self._current().runtime.sleep(0)
        if not self.is_connected(sid):
            raise ConnectionClosed("the client has left")

    def flush(self, timeout: float) -> bool:
        """Wait until everything emitted so far has been taken by the message queue.

        Args:
            timeout: Longest wait in seconds, >= 0.

        Returns:
            Whether it has. Always ``True`` without a message queue.
        """
        return self._current().flush(timeout)

    # Tasks

    @overload
    def task(
        self,
        target: TaskT,
        /,
        *,
        every: float | None = None,
        name: str | None = None,
        restart: str = "on-failure",
        critical: bool = False,
        max_restarts: int | None = None,
        restart_window: float = 60.0,
    ) -> TaskT: ...

    @overload
    def task(
        self,
        target: None = None,
        *,
        every: float | None = None,
        name: str | None = None,
        restart: str = "on-failure",
        critical: bool = False,
        max_restarts: int | None = None,
        restart_window: float = 60.0,
    ) -> Callable[[TaskT], TaskT]: ...

    def task(
        self,
        target: Callable[[], Any] | None = None,
        *,
        every: float | None = None,
        name: str | None = None,
        restart: str = "on-failure",
        critical: bool = False,
        max_restarts: int | None = None,
        restart_window: float = 60.0,
    ) -> Any:
        """Run a function in the background for as long as the application runs.

        It starts in the worker, never in a preloading master, and in every
        worker. Usable with and without parentheses::

            @guard.task(every=1.0)
            def tick(): guard.emit("tick")

        Args:
            target: The function; it gets no arguments and runs in the application context.
            every: Seconds between the starts of two runs, > 0; a run that takes
                longer skips what it missed. ``None``: one run, from start to end.
            name: Unique per application; default ``module.function``.
            restart: ``"never"``, ``"on-failure"`` or ``"always"``; delays grow from
                0.1 s to ``SOCKETIO_GUARD_RESTART_MAX_DELAY``, with jitter.
            critical: Whether the process is unready once the task has failed for good.
            max_restarts: More restarts than this within *restart_window* seconds
                fail the task for good; ``None``: it never gives up.
            restart_window: In seconds, > 0.

        Raises:
            ConfigError: An option is out of range.
            DuplicateTask: There is a task of that name.
        """

        def decorator(function: Callable[[], Any]) -> Callable[[], Any]:
            spec = task_spec(
                function,
                name=name,
                every=every,
                restart=restart,
                critical=critical,
                max_restarts=max_restarts,
                restart_window=restart_window,
            )
            if any(known.name == spec.name for known in self.registry.tasks):
                raise DuplicateTask(f"a task named {spec.name!r} exists already: give one a name=")
            for guard in self._all():
                guard.tasks.require_free(spec.name)
            for guard in self._all():
                guard.tasks.add(spec)
            self.registry.tasks.append(spec)
            return function

        return decorator if target is None else decorator(target)

    def start_background_task(
        self,
        target: Callable[..., Any],
        *args: Any,
        name: str | None = None,
        restart: str = "never",
        critical: bool = False,
        max_restarts: int | None = 10,
        restart_window: float = 60.0,
        **kwargs: Any,
    ) -> TaskHandle:
        """Start a supervised background task now; as ``SocketIO.start_background_task``.

        Args:
            target: The function; runs in the application context.
            args: Passed to *target*.
            name: Unique among the running tasks; by default the function's name
                and a number.
            restart: See :meth:`task`.
            critical: See :meth:`task`.
            max_restarts: See :meth:`task`.
            restart_window: See :meth:`task`.
            kwargs: Passed to *target*.

        Returns:
            A handle with ``state``, ``restarts``, ``last_error``, ``stop()`` and
            ``join(timeout)``.

        Raises:
            ConfigError: An option is out of range.
            DuplicateTask: A task of that name is running, or will start with the application.
            TaskError: The process is stopping.
        """
        guard = self._current()
        policy = restart_policy(restart, max_restarts=max_restarts, restart_window=restart_window)
        return guard.tasks.run(
            TaskSpec(
                name or guard.tasks.unique_name(task_name(target)),
                lambda: target(*args, **kwargs),
                None,
                policy,
                critical,
            )
        )

    def sleep(self, seconds: float = 0) -> bool:
        """Sleep; as ``SocketIO.sleep``, but wake up when the task or process stops.

        Args:
            seconds: >= 0; 0 only gives way to other tasks.

        Returns:
            ``True`` after the whole time, ``False`` when woken early.
        """
        return self._current().tasks.sleep(seconds)

    # The process

    def start(self) -> None:
        """Start listener and tasks now.

        Seldom needed: in a gunicorn worker the guard starts when the
        application is loaded, elsewhere with the first request. Idempotent.
        """
        self._current().start()

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
        guard = self._current()
        return guard.drain(guard.config.stop_timeout if timeout is None else timeout)

    def stop(self, timeout: float | None = None) -> None:
        """Stop tasks, empty the outbox, stop the listener.

        Args:
            timeout: Longest wait for each of these, in seconds; ``None`` takes
                ``SOCKETIO_GUARD_STOP_TIMEOUT``.
        """
        guard = self._current()
        guard.stop(guard.config.stop_timeout if timeout is None else timeout)

    @property
    def listener_state(self) -> ListenerState:
        """What is known of the message-queue listener of this process."""
        return self._current().listener_state()

    @property
    def counters(self) -> dict[str, int]:
        """Counts of losses, failures and rejections since start, by name."""
        return self._current().counters.as_dict()

    @property
    def waiting_callbacks(self) -> int:
        """Number of acknowledgement callbacks that wait for their client."""
        return len(self._current().callbacks)

    def _all(self) -> list[AppGuard]:
        guards = [reference() for reference in self._references]
        guards.append(self._write_only)
        return [guard for guard in guards if guard is not None and not guard.is_superseded]

    def _current(self) -> AppGuard:
        """Return the guard of the current application, or the only one there is."""
        if has_app_context():
            # A weak key has to be the application itself, not the proxy of it.
            app = current_app._get_current_object()  # type: ignore[attr-defined]  # noqa: SLF001
            reference = self._guards.get(app)
            guard = None if reference is None else reference()
            if guard is not None:
                return guard
        guards = self._all()
        if len(guards) == 1:
            return guards[0]
        if not guards:
            raise RuntimeError("this SocketIOGuard guards no app yet: call guard.init_app(app)")
        raise RuntimeError(
            "this SocketIOGuard guards several apps: use it inside `with app.app_context():`"
        )


def _require_kinds(app: object, socketio: object) -> None:
    """See that the two that are set up are what they should be, and in their order."""
    if is_socketio(app):
        raise ConfigError(
            "the app comes first: SocketIOGuard(app, socketio), or guard.init_app(app, socketio)"
        )
    if app is not None and not isinstance(app, Flask):
        raise ConfigError(f"app must be a Flask application, not a {type(app).__name__}")
    if socketio is not None and not is_socketio(socketio):
        raise ConfigError(
            f"socketio must be the SocketIO of Flask-SocketIO, not a {type(socketio).__name__}"
        )


def _arguments(args: tuple[Any, ...]) -> list[Any]:
    """Return the arguments of an event, which are one value or a tuple."""
    if len(args) > 1:
        raise TypeError("several arguments are one tuple, as in SocketIO.emit")
    return list(args[0]) if args and isinstance(args[0], tuple) else list(args)


def _require_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        hint = ": str() makes one" if isinstance(value, int) else ""
        raise ConfigError(f"{name} must be a text that is not empty, not {value!r}{hint}")
    if not is_text(value):
        raise DeliveryInvalid(f"UTF-8 cannot hold {name}: {value!r}")


def _require_flag(name: str, value: object) -> None:
    if value is not True and value is not False:
        raise ConfigError(f"{name} must be True or False, not {value!r}")


def _require_hook(name: str, value: object) -> None:
    if value is not None and not callable(value):
        raise ConfigError(f"{name} must be callable, not {value!r}")


def _namespace(value: str | None) -> str:
    if value is None:
        return "/"
    _require_text("namespace", value)
    if not value.startswith("/"):
        raise ConfigError(f"namespace must begin with '/', not {value!r}")
    return value
