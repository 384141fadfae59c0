"""Progress where no terminal shows a bar, in a log or a pipe: a line now and then.

Example: with PlainProgress(lambda task: print(task.completed), first_after=2.0) as bar:
             task = bar.add_task("", total=9, detail=""); bar.advance(task, 3)
Each line comes after twice the time of the one before, up to a minute: what is quick prints nothing, and the
log of a day stays short. console.py has the words, and chooses between this and a bar.
"""

import time
from collections.abc import Callable
from typing import Any

from rich.progress import Progress, Task, TaskID

MAX_GAP_SECONDS = 60.0
"""Longest time between two lines."""


class PlainProgress(Progress):
    """A progress bar that is never drawn.

    show: called with the newest task, while it is not done. first_after: seconds until the first call.
    """

    def __init__(self, show: Callable[[Task], object], first_after: float) -> None:
        super().__init__(disable=True, get_time=time.monotonic)
        self.show, self.gap = show, first_after
        self.due = time.monotonic() + first_after

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Change a task, and show it if it is time."""
        super().update(task_id, **changes)
        self.show_in_time()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Advance a task, and show it if it is time."""
        super().advance(task_id, advance)
        self.show_in_time()

    def show_in_time(self) -> None:
        """Show the newest task, but not too often."""
        now = time.monotonic()
        if now >= self.due and not self.tasks[-1].finished:
            self.gap = min(2 * self.gap, MAX_GAP_SECONDS)
            self.due = now + self.gap
            self.show(self.tasks[-1])
