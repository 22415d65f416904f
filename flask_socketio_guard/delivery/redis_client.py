"""Clients of Redis or Valkey, for every kind of URL that the message queue takes."""

from __future__ import annotations

import importlib
from typing import Any

from socketio.redis_manager import parse_redis_sentinel_url

from ..errors import ConfigError, DeliveryStoreError
from ..telemetry.printable import printable, without_secrets


class Driver:
    """The driver that a URL asks for, redis-py or valkey-py, and clients made with it.

    Args:
        url: Begins with one of :data:`~..config.STORE_SCHEMES`.
        service: Name of the master to ask Sentinel for, unless the URL has one.
        timeout: Longest wait for an answer, in seconds, > 0.

    Raises:
        ConfigError: The driver is not installed, or *url* is not a URL. The text has no secrets.

    Source:
        python-socketio, ``RedisManager``: the URLs, and what they mean.
    """

    def __init__(self, url: str, *, service: str, timeout: float) -> None:
        scheme = url.partition("://")[0]  # the rest may be no URL
        self.name = "valkey" if scheme.startswith("valkey") else "redis"
        try:
            self._module: Any = importlib.import_module(self.name)
        except ImportError as exc:
            raise ConfigError(
                f"SOCKETIO_GUARD_DELIVERY_STORE begins with {scheme}:// and needs the package "
                f"{self.name}: pip install {self.name}"
            ) from exc
        exceptions = self._module.exceptions
        self.errors: tuple[type[Exception], ...] = (
            getattr(exceptions, f"{self.name.capitalize()}Error"),
            OSError,
        )
        self.lock_error: type[Exception] = exceptions.LockError
        self._forbidden: type[Exception] = exceptions.NoPermissionError
        self._url = url
        self._service = service
        self._timeout = timeout
        try:
            self.client().close()
        except ValueError:
            raise ConfigError(
                "SOCKETIO_GUARD_DELIVERY_STORE is not a valid Redis or Valkey URL"
            ) from None  # its text may hold a part of the password

    def client(self, *, patience: float = 0.0) -> Any:
        """Return a client; it connects when it is used.

        Args:
            patience: Seconds that an answer may take beyond *timeout*.
        """
        backoff, retry = self._module.backoff, self._module.retry
        options: dict[str, Any] = {
            "socket_timeout": self._timeout + patience,
            "health_check_interval": 10,
            # The caller has to know that an answer was lost; see DeliveryStore.
            "retry": retry.Retry(backoff.NoBackoff(), 0),
        }
        if not self._url.startswith("unix://"):
            options |= {"socket_connect_timeout": self._timeout, "socket_keepalive": True}
        if "+sentinel" not in self._url.partition("://")[0]:
            return getattr(self._module, self.name.capitalize()).from_url(self._url, **options)
        sentinels, service, of_url = parse_redis_sentinel_url(self._url)
        asking = {**options, "socket_timeout": self._timeout}
        sentinel = self._module.sentinel.Sentinel(
            sentinels, sentinel_kwargs=asking, **options, **of_url
        )
        return sentinel.master_for(service or self._service)

    def require_no_cluster(self) -> None:
        """Make sure that the server is not a cluster: scripts use keys of many slots.

        Raises:
            ConfigError: It is one.
            DeliveryStoreError: It does not answer.
        """
        try:
            with self.client() as client:
                is_cluster = bool(client.info("cluster").get("cluster_enabled"))
        except self._forbidden:
            return  # an access list forbids to ask
        except self.errors as exc:
            raise DeliveryStoreError(describe(exc)) from exc
        if is_cluster:
            raise ConfigError(
                "SOCKETIO_GUARD_DELIVERY_STORE is a Redis Cluster, which cannot keep acknowledged "
                "messages: name a single Redis or Valkey, or one behind Sentinel "
                "(redis+sentinel://); the message queue may stay where it is"
            )


def describe(exc: Exception) -> str:
    """Return one line that says what went wrong; holds no password."""
    return printable(without_secrets(f"{type(exc).__name__}: {exc}"[:3000].splitlines()[0]))
