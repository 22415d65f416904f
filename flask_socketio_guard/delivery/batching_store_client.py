"""In front of a remote store: steps are queued, and sent to it in batches."""

from __future__ import annotations

from _thread import RLock
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from ..backoff import DELIVERY_STORE
from ..core.runtime import clock
from ..core.supervisor import is_stopping, sleep
from ..errors import DeliveryStoreError
from .steps import Acknowledge, FailAll, Finish, Join, Leave, Mark, Page, Put, Waiting
from .store_client import AT_A_TIME, StoreClient

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..core.runtime import Flag, Runtime
    from ..queue.reachability import Reachability
    from ..states import DeliveryState
    from .records import Delivery
    from .steps import End, Step, Stored
    from .store import SharedStore

_T = TypeVar("_T")
_Key: TypeAlias = tuple[object, ...]

_BATCH: Final = 200  # steps
_LONGEST_SLEEP: Final = 5.0  # seconds
_LONGEST_WAIT: Final = 10.0  # seconds, should its task not even begin
_PATIENCE: Final = 3  # failures in a row until callers that wait get the error


@dataclass(slots=True, eq=False)
class _Task:
    """A step, and how its result is reported."""

    step: Step[Any]
    then: Callable[[Any], object] | None = None
    event: Flag | None = None  # a caller waits for the result
    result: Any = None
    is_void: bool = False
    key: _Key | None = None


class BatchingStoreClient(StoreClient):
    """Applies steps in batches, in their order, in one task.

    Steps that nobody waits for are kept until the store has done them. While it does not answer,
    their number grows with the messages in flight here, and with the clients that connect and
    disconnect. A caller that stores a message waits until its batch has been applied.

    Args:
        runtime: For events and sleep.
        store: Remote; its methods wait.
        on_end: See :class:`~.store_client.StoreClient`.
        on_failure: Called with what a step raised that the store cannot do; it is dropped.
        on_unsure: Called when steps may have been done whose answers were lost.
        server: Notes whether the store answers.
    """

    def __init__(
        self,
        runtime: Runtime,
        store: SharedStore,
        *,
        on_end: Callable[[Delivery, bool], None],
        on_failure: Callable[[BaseException], None],
        on_unsure: Callable[[], None],
        server: Reachability,
    ) -> None:
        super().__init__(on_end)
        self._runtime = runtime
        self._store = store
        self._on_failure = on_failure
        self._on_unsure = on_unsure
        self._server = server
        self.is_refused = False
        """Whether the last batch could not be applied."""
        self._tasks: deque[_Task] = deque()
        self._pending: dict[_Key, _Task] = {}  # steps that a later one may change
        self._is_closed = False
        self._one_by_one = 0
        self._lock = RLock()  # never held during a wait
        self._work: Flag = runtime.flag()

    def __len__(self) -> int:
        return len(self._tasks)

    def _ask(self, step: Step[_T]) -> _T:
        """Queue a step and wait for its result; from any native thread."""
        if self._is_closed:
            raise DeliveryStoreError("the process is stopping")
        task = _Task(step, event=self._runtime.flag())
        self._add(task)
        assert task.event is not None
        if not task.event.wait(_LONGEST_WAIT):
            task.is_void = True
            raise DeliveryStoreError("the store does not answer in time")
        if isinstance(task.result, BaseException):
            error = DeliveryStoreError
            if isinstance(task.result, DeliveryStoreError):
                error = type(task.result)
            raise error(str(task.result)) from task.result
        result: _T = task.result
        return result

    def give_up(self, delivery: Delivery, state: DeliveryState) -> None:
        """End a message in *state*, without waiting for the store."""
        self._add(_Task(Finish(delivery.id, state), partial(self._over, delivery)))

    def fail_all(self, address: str, state: DeliveryState) -> None:
        """End all messages that wait for a recipient."""

        def then(ended: list[Delivery]) -> None:
            self._tell(ended)
            if len(ended) == AT_A_TIME:
                self.fail_all(address, state)

        self._add(_Task(FailAll(address, state, AT_A_TIME), then))

    def sent(self, id: str) -> None:
        """Note that a message was sent."""
        self._mark(id, attempts=1)

    def returned(self, id: str) -> None:
        """Note that no client has a message at present."""
        self._mark(id, attempts=0)

    def acknowledged(self, delivery: Delivery, device: str) -> None:
        """Note that a device has acknowledged a message."""
        attempts = 0
        with self._lock:
            key = (Mark, delivery.id)
            mark = None if delivery.requires_all else self._pending.pop(key, None)
            if mark is not None:  # the acknowledgement implies that it was sent
                assert isinstance(mark.step, Mark)
                attempts = mark.step.attempts
                mark.is_void = True
        then = partial(self._over, delivery)
        self._add(_Task(Acknowledge(delivery.id, device, attempts), then))

    def load(
        self, address: str, after: int, limit: int, max_size: int, then: Callable[[Page], None]
    ) -> None:
        """Call *then* later with messages that wait for a recipient; a newer call replaces it."""
        with self._lock:
            older = self._pending.get((Waiting, address))
            if older is not None:
                older.is_void = True
        step = Waiting(address, after, limit, max_size)
        self._add(_Task(step, then, key=(Waiting, address)))

    def join(self, address: str, device: str) -> None:
        """Note that an identity has a device."""
        self._add(_Task(Join(address, device), key=(Join, address, device)))

    def leave(self, address: str, device: str) -> None:
        """Note that a device is gone."""
        with self._lock:
            joining = self._pending.pop((Join, address, device), None)
        if joining is None:
            self._add(_Task(Leave(address, device), self._tell))
        else:  # the store does not know of it yet
            joining.is_void = True

    def wake(self) -> None:
        """Let the task notice at once that it is to stop."""
        self._work.set()

    def flush(self, timeout: float) -> None:
        """Apply what is queued, as far as the store answers; for the end of the process.

        Args:
            timeout: Seconds after which to stop trying.
        """
        self._is_closed = True
        deadline = clock() + timeout
        while self._tasks and clock() < deadline:
            try:
                self._do_some()
            except DeliveryStoreError:
                return

    def run(self) -> None:
        """Apply what is queued, until the task is asked to stop."""
        failures = 0
        while not is_stopping():
            if not self._tasks:
                self._work.wait(_LONGEST_SLEEP)
                self._work.clear()
                continue
            try:
                if self._do_some():
                    failures, self.is_refused = 0, False
                    self._server.report_answer()
            except DeliveryStoreError as exc:
                self.is_refused = True
                failures += 1
                self._server.report_lost(str(exc))
                self._on_unsure()
                self._clear_up(exc if failures >= _PATIENCE else None)
                sleep(self._runtime, DELIVERY_STORE.delay(failures))

    def _mark(self, id: str, *, attempts: int) -> None:
        with self._lock:
            mark = self._pending.get((Mark, id))
            if mark is not None:
                assert isinstance(mark.step, Mark)
                mark.step = Mark(id, mark.step.attempts + attempts, is_in_flight=attempts > 0)
                return
        step = Mark(id, attempts, is_in_flight=attempts > 0)
        self._add(_Task(step, key=(Mark, id)))

    def _add(self, task: _Task) -> None:
        with self._lock:
            self._tasks.append(task)
            if task.key is not None:
                self._pending[task.key] = task
        if not self._work.is_set():
            self._work.set()

    def _do_some(self) -> bool:
        """Apply the oldest steps, or leave them queued; return whether the store answered."""
        tasks = self._taken()
        if not tasks:
            return False
        try:
            results = self._store.apply([task.step for task in tasks])
        except DeliveryStoreError:
            self._put_back(tasks)
            raise
        except BaseException as exc:  # noqa: BLE001 - the other steps must not suffer from it
            if len(tasks) > 1:  # one of them fails: find out which
                self._put_back(tasks)
                self._one_by_one = len(tasks)
            else:
                self._answer(tasks[0], exc)
                if tasks[0].event is not None:
                    self._on_failure(exc)
            return False
        for task, result in zip(tasks, results, strict=True):
            self._answer(task, result)
        self._store.told()
        return True

    def _taken(self) -> list[_Task]:
        """Take the oldest tasks out of the queue."""
        limit = _BATCH
        if self._one_by_one:
            self._one_by_one -= 1
            limit = 1
        tasks: list[_Task] = []
        with self._lock:
            while self._tasks and len(tasks) < limit:
                task = self._tasks.popleft()
                if task.key is not None and self._pending.get(task.key) is task:
                    del self._pending[task.key]
                if not task.is_void:
                    tasks.append(task)
        return tasks

    def _put_back(self, tasks: list[_Task]) -> None:
        with self._lock:
            self._tasks.extendleft(reversed(tasks))

    def _answer(self, task: _Task, result: Any) -> None:
        is_failure = isinstance(result, BaseException)
        if is_failure and task.event is None:
            self._on_failure(result)
        if is_failure and isinstance(task.step, Waiting):  # the next load tries again
            is_failure, result = False, Page([], 0, has_more=False)
        try:
            if task.event is not None:
                task.result = result
                task.event.set()
                if task.is_void and isinstance(task.step, Put) and not is_failure:
                    self._stored_late(result)
            elif task.then is not None and not is_failure:
                task.then(result)
        except BaseException as exc:  # noqa: BLE001 - the others get their answers all the same
            self._on_failure(exc)

    def _over(self, delivery: Delivery, end: End | None) -> None:
        if end is not None:
            self._on_end(end.delivery or delivery, end.is_new)

    def _stored_late(self, stored: Stored) -> None:
        """Handle a message that was stored after its sender had got a timeout."""
        if stored.replaced is not None:
            self._on_end(stored.replaced, True)
        self._on_unsure()

    def _clear_up(self, exc: DeliveryStoreError | None) -> None:
        """Drop steps whose callers have given up; raise *exc*, if any, in the callers that wait."""
        with self._lock:
            tasks, self._tasks = self._tasks, deque()
            for task in tasks:
                if exc is not None and task.event is not None:
                    task.is_void = True
                    task.result = exc
                    task.event.set()
                if not task.is_void:
                    self._tasks.append(task)
