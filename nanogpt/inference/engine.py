"""Engine: the thread that owns a model, and continues the texts of all requests together.

Example: engine = Engine(Scheduler(model)); engine.submit([Request(...)]); engine.close("the server stops")
Any thread may submit requests or other work with the model. The engine's own thread computes everything, and
calls the listeners (scheduler.py).
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch

from nanogpt.inference.scheduler import Request, Scheduler, describe
from nanogpt.machine.device import is_out_of_memory

Result = TypeVar("Result")


class Call(NamedTuple):
    """Work in parts, and the future of its result."""

    parts: Iterator[Any]
    future: Future[Any]

    def end(self, result: object = None, error: Exception | None = None) -> None:
        """Set the result or the error of the future, unless it was cancelled."""
        if not self.future.set_running_or_notify_cancel():
            return
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)


@dataclass(eq=False)
class Engine:
    """A scheduler, the requests that wait for it, and the thread that runs it."""

    scheduler: Scheduler
    max_waiting: int = 1024
    """Maximum number of waiting requests, and of calls."""
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    """Creates the context in which tokens are computed, such as autocast."""
    after_step: Callable[[], None] = lambda: None
    """Called on the engine's thread after every step."""
    on_bug: Callable[[Exception], None] = lambda error: None
    """Called with an error that ended texts or a call, unless memory ran out."""
    waiting: deque[Request] = field(default_factory=deque[Request])
    calls: deque[Call] = field(default_factory=deque[Call])
    changed: threading.Condition = field(default_factory=threading.Condition)
    """Guards `waiting`, `calls` and `closing`, and is notified when they change."""
    closing: str = ""
    """The error for unfinished requests once the engine is closed; "": it is open."""
    finishes: bool = False
    """Whether a closing engine finishes the requests and calls that it has."""

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.thread.start()

    def submit(self, requests: Sequence[Request]) -> bool:
        """Queue requests. Returns False if too many are waiting, or the engine is closing."""
        with self.changed:
            if self.closing or len(self.waiting) + len(requests) > self.max_waiting:
                return False
            self.waiting.extend(requests)
            self.changed.notify()
        return True

    def call(self, parts: Iterator[Result | None]) -> Future[Result] | None:
        """Queue other work for the engine's thread, in parts that run between steps: None, ..., the result.

        Returns its future, or None if too many calls are waiting, or the engine is closing. Cancelling the
        future ends the work after the current part.
        """
        future: Future[Result] = Future()
        with self.changed:
            if self.closing or len(self.calls) >= self.max_waiting:
                return None
            self.calls.append(Call(parts, future))
            self.changed.notify()
        return future

    def close(self, reason: str, *, finish: bool = False) -> None:
        """Accept nothing more, and end the thread: at once, or after all present work. Does not wait.

        reason: the error for requests and calls that are not finished.
        """
        with self.changed:
            self.closing, self.finishes = reason, finish
            self.changed.notify()

    def run(self) -> None:
        """Compute until the engine is closed."""
        with torch.no_grad(), self.context():
            while self.wait_for_work():
                self.drop_cancelled()
                if self.calls:
                    self.do_part(self.calls.popleft())
                if self.waiting or self.scheduler.rows:
                    self.step()
                self.after_step()
        self.end_all()

    def step(self) -> None:
        """Add a token to every text."""
        try:
            self.scheduler.step(self.waiting)
        except Exception as error:  # even a bug must not leave a request without an answer
            self.scheduler.end_all(describe(error))
            self.report(error)

    def do_part(self, call: Call) -> None:
        """Do one part of a call, and put it at the end of the queue."""
        if call.future.cancelled():
            return
        try:
            result = next(call.parts)
        except Exception as error:
            call.end(error=error)
            self.report(error)
            return
        if result is None:
            self.calls.append(call)
        else:
            call.end(result)

    def report(self, error: Exception) -> None:
        """Pass an error to on_bug, unless memory ran out."""
        if not is_out_of_memory(error):
            self.on_bug(error)

    def wait_for_work(self) -> bool:
        """Wait until there is something to compute. Returns False when the thread is to end."""
        with self.changed:
            while not self.is_busy() and not self.closing:
                self.changed.wait()
            return not self.closing or (self.finishes and self.is_busy())

    def is_busy(self) -> bool:
        """Whether there is something to compute."""
        return bool(self.waiting or self.calls or self.scheduler.rows)

    def drop_cancelled(self) -> None:
        """Remove waiting requests that were cancelled, to make room for others."""
        with self.changed:
            gone = [request for request in self.waiting if request.listener.cancelled]
            for request in gone:
                self.waiting.remove(request)
        for request in gone:
            request.listener.on_end("cancelled")

    def end_all(self) -> None:
        """End all remaining requests and calls with `closing`."""
        self.scheduler.end_all(self.closing)
        while self.waiting:
            self.waiting.popleft().listener.on_end(self.closing)
        while self.calls:
            self.calls.popleft().end(error=RuntimeError(self.closing))
        self.after_step()
