"""Texts from elsewhere: addresses (https, hf, s3, gs, ...), which are downloaded once and then read as files.

Example: for file in fetch("hf://datasets/me/books/*.parquet", Path("data/downloads")): file.shown; file.path
A text is read two or three times, and some formats are read from their end: so the bytes of an address go to
the disk in one stream, and are read there. http and https go through requests (http_origin.py), the other
protocols through fsspec.
"""

import hashlib
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from glob import has_magic
from pathlib import Path
from typing import Any, NamedTuple

from nanogpt.errors import UserError, require
from nanogpt.storage.files import user_folder
from nanogpt.storage.locking import lock
from nanogpt.terminal.console import progress_bar, say
from nanogpt.text.addresses import WEB, protocol_of, without_secrets
from nanogpt.text.archives import HiddenFiles
from nanogpt.text.download import (
    PATIENCE,
    Answer,
    ChangedError,
    LostConnectionError,
    Origin,
    Patience,
    download,
    downloaded,
)
from nanogpt.text.http_origin import PASSING, HttpOrigin
from nanogpt.units import plural

FILE_SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "hf": ("huggingface_hub", {}),
    "s3": ("s3fs", {}),
    "gs": ("gcsfs", {"use_listings_cache": False}),
    "gcs": ("gcsfs", {"use_listings_cache": False}),
    "memory": ("fsspec", {}),
}
"""The protocols that go through fsspec, each with the package it needs and its options."""

VERSION_FACTS = ("etag", "md5hash", "blobid", "generation", "lastmodified", "created")
"""Facts about a file that tell whether its content has changed, in lower case and without _."""

BLOCK_BYTES = 1 << 20
"""Bytes of a block."""

REQUEST_BYTES = 1 << 24
"""Bytes of a request through fsspec."""


class RemoteFile(NamedTuple):
    """A file that was downloaded. shown: its address for messages. path: where it is now."""

    shown: str
    path: Path


def fetch(address: str, folder: Path | None = None, patience: Patience | None = None) -> list[RemoteFile]:
    """The files at an address, downloaded into `folder` unless they are there. None: into the user's cache.

    Raises: UserError if there are none, or one cannot be had.
    """
    shown, patience = without_secrets(address), patience or PATIENCE
    origins = find_origins(address, shown, patience)
    try:
        folder = folder or user_folder("cache") / "downloads"
        with lock(folder, f"another program is downloading into {folder}: wait until it is done"):
            places = {place_of(origin, folder): origin for origin in origins}
            missing = {place: origin for place, origin in places.items() if not downloaded(origin, place)}
            if missing:
                say(f"Downloading {shown} to {folder}")
                download_all(missing, patience)
            files = [(origin.shown, downloaded(origin, place)) for place, origin in places.items()]
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    if len(missing) < len(places):
        earlier = plural(len(places) - len(missing), "file")
        say(f"{shown}: {earlier} downloaded before, in {folder} (delete it to download again)")
    return [RemoteFile(name, path) for name, path in files if path]


def download_all(places: Mapping[Path, Origin], patience: Patience) -> None:
    """Download files, each into its folder, with a progress bar."""
    with progress_bar("Downloading", size_in_bytes=True) as bar:
        task = bar.add_task("", total=None, detail="")
        for number, (place, origin) in enumerate(places.items(), 1):
            bar.reset(task, total=None, detail=f"file {number:,}/{len(places):,}" if len(places) > 1 else "")
            download(origin, place, lambda done, size: bar.update(task, completed=done, total=size), patience)


def place_of(origin: Origin, folder: Path) -> Path:
    """The folder of a file within the folder of all, named by a digest of its address: file names repeat."""
    return folder / hashlib.sha256(origin.key.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def find_origins(address: str, shown: str, patience: Patience) -> list[Origin]:
    """The origins of the files at an address. Raises: UserError if there are none."""
    protocol, path = protocol_of(address) or "", address.partition("?")[0]
    known = sorted([*WEB, "file", *FILE_SYSTEMS])
    require(protocol in known, f"--input_file {shown}: {protocol}:// is not known: use {', '.join(known)}")
    if protocol not in WEB:
        same = address.partition("://")[2] == shown.partition("://")[2]
        require(
            same,
            f"--input_file {shown} was given with a login: leave it out, {protocol}:// has settings for it",
        )
        return find_files(address, protocol, shown)
    several = "names several files, but the web has no lists of files: give the address of each"
    require("*" not in path, f"--input_file {shown} {several}")
    try:
        return [HttpOrigin(address, shown, patience)]
    except ValueError as error:
        raise UserError(f"--input_file {shown} is not a valid address") from error


# --- through fsspec ---


def find_files(address: str, protocol: str, shown: str) -> list[Origin]:
    """The files of an address: of a file, a folder or a glob. Raises: UserError if there are none."""
    package, options = FILE_SYSTEMS[protocol]
    try:
        import fsspec

        kind: Any = fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        install = "pip install nanogpt[remote]"
        raise UserError(f"--input_file {shown} needs the package {package}: {install}") from error
    try:
        with errors_in_words(shown):
            path: str = kind._strip_protocol(address)
            files = kind(**options)
            try:
                names, hidden = list_names(files, path)
            except Exception as error:
                if type(error).__name__ != "NoCredentialsError":
                    raise
                files = kind(anon=True, **options)  # S3 looks for a login even where none is needed
                names, hidden = list_names(files, path)
    except LostConnectionError as error:
        raise UserError(f"--input_file {shown} {error}: check the address, or try again later") from error
    for note in hidden.notes(shown):
        say(note)
    require(bool(names), f"--input_file {shown} finds no file: check the address")
    return [FileSystemOrigin(files, name, f"{protocol}://{name.lstrip('/')}") for name in names]


def list_names(files: Any, path: str) -> tuple[list[str], HiddenFiles]:
    """The names of the files at a path, sorted: that file, those in a folder, or those that a glob matches.

    Hidden files in a folder are left out, as on the disk. Raises: whatever the file system raises.
    """
    matches = files.glob(path, detail=True) if has_magic(path) else {path: files.info(path)}
    names, hidden = list[str](), HiddenFiles()
    for match, facts in sorted(matches.items()):
        for name in sorted(files.find(match)) if facts["type"] == "directory" else [match]:
            if "/." in name[len(match) :]:
                hidden.add(name)
            else:
                names.append(name)
    return names, hidden


class FileSystemOrigin:
    """A file in one of fsspec's file systems, at a path."""

    def __init__(self, files: Any, path: str, shown: str) -> None:
        self.files, self.path, self.shown, self.key = files, path, shown, shown

    @contextmanager
    def open(self, start: int, version: str) -> Generator[Answer]:
        """Ask for the bytes from `start` on if the content is still `version`, else for all of them.

        Raises: LostConnectionError, also from the blocks; UserError if another attempt is useless.
        """
        with errors_in_words(self.shown):
            size, found = self.state()
            file = self.files.open(self.path, "rb", block_size=REQUEST_BYTES)
        with file:
            begin = start if version and version == found else 0
            file.seek(begin)
            yield Answer(begin, size, found, "", self.blocks(file, size, found))

    def state(self) -> tuple[int | None, str]:
        """The size of the file now, and a version that identifies its content. Raises: as the file system."""
        facts = {
            key.replace("_", "").lower(): fact
            for key, fact in self.files.info(self.path, refresh=True).items()
        }
        return facts.get("size"), " ".join(f"{key}={facts[key]}" for key in VERSION_FACTS if facts.get(key))

    def blocks(self, file: Any, size: int | None, version: str) -> Iterator[bytes]:
        """The bytes of the file. Raises: LostConnectionError, also if the content has changed in between."""
        with errors_in_words(self.shown):
            while block := file.read(BLOCK_BYTES):
                # Each request takes what is there then, and with the last block the file counts as whole.
                if file.tell() == size and self.state()[1] != version:
                    raise ChangedError
                yield block


@contextmanager
def errors_in_words(shown: str) -> Generator[None]:
    """Turn the errors of file systems into ours: UserError, or LostConnectionError if they may pass."""
    name = f"--input_file {shown}"
    try:
        yield
    except (UserError, LostConnectionError):
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{name} does not exist: check the address") from error
    except PermissionError as error:
        raise UserError(
            f"{name} is refused: log in (hf auth login, aws configure, gcloud auth login)"
        ) from error
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"{name} cannot be read: {in_one_line(error)}") from error
    except Exception as error:  # each file system has its own
        code = getattr(getattr(error, "response", None), "status_code", None)
        passes = not isinstance(code, int) or code in PASSING
        require(passes, f"{name} cannot be read: {in_one_line(error)}")
        raise LostConnectionError(f"failed ({in_one_line(error)})") from error


def in_one_line(error: BaseException) -> str:
    """The message of an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__
