"""Real text that every machine has: the sources of Python and of the packages installed with it.

Use:    documents = collect(20_000_000); write(Path("text.txt"), 2_000_000_000)
"""

import contextlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path


def files() -> Iterator[Path]:
    """Python files, the standard library's first, each folder by name."""
    for name in ("stdlib", "purelib"):
        folder = Path(sysconfig.get_paths()[name])
        yield from (path for path in sorted(folder.rglob("*.py")) if name != "stdlib" or own(path, folder))


def own(path: Path, folder: Path) -> bool:
    """Whether a file in the standard library's folder is the library's own."""
    return not {"site-packages", "dist-packages"} & set(path.relative_to(folder).parts)


def documents() -> Iterator[str]:
    """Their texts, one at a time."""
    for path in files():
        with contextlib.suppress(OSError, UnicodeDecodeError):
            yield path.read_text("utf-8")


def collect(size: int) -> list[str]:
    """Documents of `size` bytes of UTF-8 in all, or all there are."""
    found: list[str] = []
    total = 0
    for document in documents():
        found.append(document)
        total += len(document.encode())
        if total >= size:
            break
    return found


def write(path: Path, size: int) -> None:
    """A text file of `size` bytes: the documents one after the other, again if they run out."""
    left = size
    with open(path, "wb") as file:
        while True:
            for document in documents():
                raw = document.encode()[:left].decode("utf-8", "ignore").encode()
                file.write(raw)
                left -= len(raw)
                if left <= 3:  # a character cut at the end
                    return
