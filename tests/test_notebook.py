"""NanoGPT in a notebook: the example runs, progress is one line, an interrupt saves, advice is Python."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from nanogpt import load_model
from nanogpt.terminal.notebook import CellProgress

EXAMPLE = Path(__file__).parent.parent / "examples" / "notebook.ipynb"

TEXT = "".join(f"{number} From fairest creatures we desire increase,\n" for number in range(200))

TRAIN = """
from nanogpt import TrainConfig, fit
config = dict(data_dir="data", out_dir="out", n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=4,
              eval_interval=50, max_iters={max_iters}, device="cpu", dtype="float32")
result = fit(TrainConfig(**config), quiet={quiet})
"""

pytestmark = pytest.mark.filterwarnings("default")  # those of Jupyter's own packages


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a text, where kernels start, with the package as it is here."""
    (tmp_path / "my.txt").write_text(TEXT, "utf-8")
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLE.parent.parent))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    return tmp_path


def run(folder: Path, *cells: str, during: Callable[[NotebookClient], Any] | None = None) -> list[list[Any]]:
    """Run cells in a kernel. Returns the outputs of each. during: runs beside them, in a task of its own."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    return outputs(execute(book, folder, during))


def execute(book: Any, folder: Path, during: Callable[[NotebookClient], Any] | None = None) -> Any:
    """Run a notebook in a folder."""
    os.environ.pop(
        "PYTEST_CURRENT_TEST", None
    )  # where it is set, a kernel does not show its descriptors 1 and 2
    place = {"metadata": {"path": str(folder)}}
    client = NotebookClient(book, timeout=120, kernel_name="python3", resources=place)

    async def both() -> None:
        """The cells, and what happens meanwhile."""
        running = asyncio.ensure_future(client.async_execute())
        if during is not None:
            await during(client)
        await running

    asyncio.run(both())
    return book


def outputs(book: Any) -> list[list[Any]]:
    """The outputs of each code cell."""
    return [cell.outputs for cell in book.cells if cell.cell_type == "code"]


def text_of(shown: list[Any]) -> str:
    """All that a cell has printed."""
    return "".join(output.text for output in shown if output.output_type == "stream")


def data_of(shown: list[Any], kind: str) -> list[str]:
    """The displayed data of a cell that have this type."""
    return [output.data[kind] for output in shown if kind in output.get("data", {})]


def test_the_example_runs_from_top_to_bottom(folder: Path):
    book = nbformat.read(EXAMPLE, as_version=4)
    (first,) = [i for i, cell in enumerate(book.cells) if "parameters" in cell.metadata.get("tags", [])]
    given = nbformat.v4.new_code_cell("text, minutes, device = 'my.txt', 0.05, 'cpu'")
    book.cells.insert(first + 1, given)
    made = outputs(execute(book, folder))
    everything = [output for shown in made for output in shown]
    assert not [output for output in everything if output.get("name") == "stderr"]
    training = next(shown for shown in made if data_of(shown, "image/png"))
    assert [line.split()[0] for line in data_of(training, "text/plain")].count("Training") == 1
    assert 'Next: model = load_model("./out")' in text_of(training)
    assert "step 1/" not in text_of(training)
    assert len(data_of(everything, "image/png")) == 3
    assert any("nats a token" in page and "<span" in page for page in data_of(everything, "text/html"))
    assert load_model(folder / "out", "cpu")


def test_the_example_is_stored_without_outputs():
    book = nbformat.read(EXAMPLE, as_version=4)
    nbformat.validate(book)
    assert not [cell for cell in book.cells if cell.get("outputs") or cell.get("execution_count")]


def test_an_interrupt_saves_and_the_run_goes_on(folder: Path):
    async def interrupt(client: NotebookClient) -> None:
        """Interrupt the kernel once the training has begun."""
        while not (folder / "out" / "ckpt.pt").exists():
            assert client.km is None or await client.km.is_alive()  # it has not begun, or still runs
            await asyncio.sleep(0.1)
        await client.km.interrupt_kernel()

    resumed = "again = fit(TrainConfig(**config | dict(resume=True, max_iters=result.step + 2)))"
    _, stopped, checked, went_on = run(
        folder,
        "from nanogpt import prepare\nprepare('my.txt', quiet=True)",
        TRAIN.format(max_iters=10**6, quiet=False),
        "assert result.reason == 'SIGINT', result",
        resumed + "\nassert again.step == result.step + 2",
        during=interrupt,
    )
    printed = text_of(stopped)
    assert "SIGINT: finishing this step and saving" in printed
    assert "and saved. To continue: fit(TrainConfig(..., resume=True)), with the same settings" in printed
    assert not checked
    assert 'Next: model = load_model("out")' in text_of(went_on)


def test_quiet_shows_nothing_and_a_mistake_is_one_line(folder: Path):
    quiet = TRAIN.format(max_iters=3, quiet=True)
    assert run(folder, "from nanogpt import prepare\nprepare('my.txt', quiet=True)", quiet) == [[], []]
    with pytest.raises(CellExecutionError) as raised:
        run(folder, "from nanogpt import load_model\nload_model('nowhere')")
    shown = "error: checkpoint nowhere does not exist: train one, or check the path"
    assert raised.value.traceback.rstrip().endswith(shown)
    assert "Traceback" not in raised.value.traceback
    assert "format.py" not in raised.value.traceback


# --- the line ---


class Cell:
    """Stands in for IPython's display: what a cell shows, newest last."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def display(self, bundle: dict[str, str], *, raw: bool, display_id: bool) -> "Cell":
        """Show it for the first time."""
        assert raw
        assert display_id
        assert not self.lines
        self.update(bundle, raw=True)
        return self

    def update(self, bundle: dict[str, str], *, raw: bool) -> None:
        """Replace it."""
        assert raw
        self.lines.append(bundle["text/plain"])


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Cell:
    """An empty cell; every change is shown at once."""
    shown = Cell()
    monkeypatch.setattr("IPython.display.display", shown.display)
    monkeypatch.setattr("nanogpt.terminal.notebook.UPDATE_SECONDS", 0.0)
    return shown


def test_a_bar_is_one_line_of_the_newest_task(cell: Cell):
    bar = CellProgress("{task.description}", "{task.completed}/{task.total}", "{task.fields[detail]}")
    first = bar.add_task("outer", total=9, detail="x" * 80)
    bar.update(first, completed=1)
    assert not cell.lines  # not started
    bar.start()
    bar.start()
    second = bar.add_task("inner", total=2, detail="")
    bar.advance(second)
    assert cell.lines[-1].split() == ["inner", "1/2"]
    bar.remove_task(second)
    bar.update(first, completed=9)
    bar.stop()
    assert cell.lines[-1].split() == ["outer", "9/9", "x" * 80]
    assert not [line for line in cell.lines if "\n" in line or "\x1b" in line]


def test_a_line_is_not_replaced_too_often_but_at_the_end(cell: Cell, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("nanogpt.terminal.notebook.UPDATE_SECONDS", 1000.0)
    with CellProgress("{task.completed}") as bar:
        task = bar.add_task("", total=100)
        for _ in range(100):
            bar.advance(task)
    assert [line.strip() for line in cell.lines] == ["", "0", "100"]


def test_a_disabled_bar_shows_nothing(cell: Cell):
    with CellProgress("{task.completed}", disable=True) as bar:
        bar.advance(bar.add_task("", total=1))
    assert not cell.lines
