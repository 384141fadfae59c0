"""Tiny Shakespeare: download it, and check it against one SHA-256 whatever the source.

Example: path, notes = tiny_shakespeare(Path("data"))
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from nanogpt.errors import UserError, require
from nanogpt.storage.files import atomic_write, download
from nanogpt.terminal.console import say

TINY_SHAKESPEARE = "Tiny Shakespeare"
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_WHEEL = "dm-sonnet==1.36"
"""A Python package that carries the same text, cut into three parts."""
SHAKESPEARE_PARTS = tuple(f"sonnet/examples/data/ts.{part}.txt" for part in ("train", "valid", "test"))

PIP_SECONDS = 120


def tiny_shakespeare(folder: Path) -> tuple[Path, str]:
    """The path of Tiny Shakespeare (folder/input.txt, downloaded if missing), and a line on its origin.

    Raises: UserError if input.txt is another text, or if no source can be reached.
    """
    path = folder / "input.txt"
    if path.exists():
        require(
            path.is_file() and sha256(path.read_bytes()) == SHAKESPEARE_SHA256,
            f"{path} is there, but it is not Tiny Shakespeare: to train on it, give "
            f"--input_file {path}; to fetch the original, move it away first",
        )
        return path, f"from {path}"
    try:
        raw, origin = download(SHAKESPEARE_URL), "downloaded"
    except OSError as error:
        say(f"{SHAKESPEARE_URL} cannot be reached ({reason(error)}): using the copy in {SHAKESPEARE_WHEEL}")
        raw, origin = unpack_wheel(), f"from the package {SHAKESPEARE_WHEEL}"
    require(
        sha256(raw) == SHAKESPEARE_SHA256,
        f"Tiny Shakespeare arrived damaged (SHA-256 {sha256(raw)[:12]}...): try again",
    )
    with atomic_write(path) as file:
        file.write(raw)
    return path, f"{origin}, saved as {path}"


def sha256(raw: bytes) -> str:
    """Hexadecimal SHA-256 of `raw`."""
    return hashlib.sha256(raw).hexdigest()


def reason(error: BaseException) -> str:
    """The innermost cause of a network error, in a few words."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return (str(error).splitlines() or [type(error).__name__])[0]


def unpack_wheel() -> bytes:
    """Tiny Shakespeare from SHAKESPEARE_WHEEL, which pip downloads and never installs.

    Raises: UserError if pip cannot download it, or if it is damaged.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--dest", folder, SHAKESPEARE_WHEEL]
        try:
            done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=PIP_SECONDS)
            problem = done.stderr.strip() if done.returncode else ""
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = str(error)
        wheels = list(Path(folder).glob("*.whl"))
        if not wheels:
            raise UserError(
                "Tiny Shakespeare cannot be fetched: connect to the internet, or give your own "
                f"text with --input_file (pip: {problem.splitlines()[-1] if problem else 'no wheel'})"
            )
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                return b"".join(wheel.read(part) for part in SHAKESPEARE_PARTS)
        except (zipfile.BadZipFile, KeyError, zlib.error) as error:
            raise UserError(f"Tiny Shakespeare arrived damaged in {SHAKESPEARE_WHEEL}: try again") from error
