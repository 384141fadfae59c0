"""What the tests of formats share: the documents of a file, its refusal, archives."""

import io
import zipfile

import pytest

from nanogpt.errors import UserError
from nanogpt.text.corpus import Corpus
from nanogpt.text.documents import SkipReport
from nanogpt.text.options import ReadOptions


def documents_in(path, report=None, rules=(), **settings):
    """The documents of one file."""
    found, waiting = [], b""
    corpus = Corpus((path,), ReadOptions(speakers=tuple(rules), **settings))
    for raw, ends in corpus.chunks(report or SkipReport()):
        waiting += raw
        if ends:
            found.append(waiting.decode())
            waiting = b""
    assert waiting == b""  # no document without an end
    return found


def refusal(path, raw=None, **settings):
    """The one line with which a file of these bytes is refused."""
    if raw is not None:
        path.write_bytes(raw)
    with pytest.raises(UserError) as raised:
        documents_in(path, **settings)
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith(f"--input_file {path}")
    return message


def zipped(members, method=zipfile.ZIP_DEFLATED):
    """A zip archive: names and what is in them."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, raw in members:
            archive.writestr(name, raw)
    return file.getvalue()
