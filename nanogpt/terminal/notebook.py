"""Output in a notebook: a progress bar in one line that is replaced, and pictures.

Example: bar = CellProgress("Training"); show_picture(Path("out/loss.png"))
console.py detects a notebook, and imports this file only there. An output with a display id can be replaced
later (Jupyter's update_display_data), which JupyterLab, VS Code and Colab support. rich's own bar needs
ipywidgets in a notebook, and is not saved with it.
"""

import io
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID

UPDATE_SECONDS = 0.2
"""Least time between two updates of a line."""

LINE_WIDTH = 200
"""Width, in characters, at which a line is wrapped: more than any bar needs."""


class CellProgress(Progress):
    """A progress bar for the newest task, as one line in the output of a cell. It has no thread."""

    def __init__(self, *columns: Any, **settings: Any) -> None:
        super().__init__(*columns, auto_refresh=False, **settings)
        self.handle: Any = None
        """IPython's handle of the line, once it is shown."""
        self.shown_at = 0.0

    def start(self) -> None:
        """Show the line, once."""
        if self.disable or self.handle is not None:
            return
        from IPython import display

        self.handle = display.display(self.bundle(), raw=True, display_id=True)
        self.shown_at = time.monotonic()

    def stop(self) -> None:
        """Show the last state, which stays."""
        if self.handle is not None:
            self.refresh()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Change a task, and the line if it is time."""
        super().update(task_id, **changes)
        self.refresh_in_time()

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Advance a task, and change the line if it is time."""
        super().advance(task_id, advance)
        self.refresh_in_time()

    def refresh_in_time(self) -> None:
        """Replace the line, but not too often."""
        if self.handle is not None and time.monotonic() - self.shown_at >= UPDATE_SECONDS:
            self.refresh()

    def refresh(self) -> None:
        """Replace the line."""
        if self.handle is not None:
            self.handle.update(self.bundle(), raw=True)
            self.shown_at = time.monotonic()

    def bundle(self) -> dict[str, str]:
        """The line in the form that IPython displays, by its MIME type."""
        text = io.StringIO()
        console = Console(
            file=text, width=LINE_WIDTH, force_jupyter=False, force_terminal=False, color_system=None
        )
        console.print(self.make_tasks_table(self.tasks[-1:]))
        return {"text/plain": text.getvalue().rstrip()}


def show_picture(path: Path, width: int = 640) -> None:
    """Show a picture in the output of the cell. width: in pixels."""
    from IPython import display

    display.display(display.Image(filename=str(path), width=width))
