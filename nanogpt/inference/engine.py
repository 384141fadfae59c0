"""Engine: the thread that owns a model, and continues the texts of all requests together.

Example: engine = Engine(Scheduler(model)); engine.submit([Request(...)]); engine.close("the server stops")
Any thread may submit. The engine's own computes everything and calls the listeners (scheduler.py).
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from nanogpt.device import is_out_of_memory
from nanogpt.inference.scheduler import Request, Scheduler, describe


@dataclass(eq=False)
class Engine:
    """A scheduler, the requests that wait for it, and the thread that runs it."""

    scheduler: Scheduler
    max_waiting: int = 1024
    """Most requests that may wait."""
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    """Makes the context in which tokens are computed, such as autocast."""
    after_step: Callable[[], None] = lambda: None
    """Is called on the engine's thread after every step."""
    on_bug: Callable[[Exception], None] = lambda error: None
    """Is called with an error that ended all texts, unless that was a lack of memory."""
    waiting: deque[Request] = field(default_factory=deque[Request])
    changed: threading.Condition = field(default_factory=threading.Condition)
    """Guards `waiting` and `closing`, and is notified when they change."""
    closing: str = ""
    """What requests that are still there hear when the engine has closed; "": it is open."""
    finishes: bool = False
    """Whether an engine that closes finishes the texts that it has."""

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.thread.start()

    def submit(self, requests: Sequence[Request]) -> bool:
        """Let requests wait for their turn. Returns False if there are too many, or the engine closes."""
        with self.changed:
            if self.closing or len(self.waiting) + len(requests) > self.max_waiting:
                return False
            self.waiting.extend(requests)
            self.changed.notify()
        return True

    def close(self, reason: str, *, finish: bool = False) -> None:
        """Take no more requests, and end the thread: at once, or once all texts have ended. Does not wait.

        reason: what a request hears that is not finished.
        """
        with self.changed:
            self.closing, self.finishes = reason, finish
            self.changed.notify()

    def run(self) -> None:
        """Compute until the engine is closed."""
        with torch.no_grad(), self.context():
            while self.wait_for_work():
                try:
                    self.scheduler.step(self.waiting)
                except Exception as error:  # a bug, too, must not leave anyone without an answer
                    self.scheduler.end_all(describe(error))
                    if not is_out_of_memory(error):
                        self.on_bug(error)
                self.after_step()
        self.end_all()

    def wait_for_work(self) -> bool:
        """Wait until there is something to compute. Returns False once the engine is to end."""
        with self.changed:
            while not self.waiting and not self.scheduler.rows and not self.closing:
                self.changed.wait()
            return not self.closing or (self.finishes and bool(self.waiting or self.scheduler.rows))

    def end_all(self) -> None:
        """Tell all who are left that the engine has closed."""
        self.scheduler.end_all(self.closing)
        while self.waiting:
            self.waiting.popleft().listener.on_end(self.closing)
        self.after_step()
