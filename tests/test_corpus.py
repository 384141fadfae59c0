"""However a corpus is packed, its documents come out; what is damaged or hostile is refused in one line."""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import socket
import stat
import sys
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanogpt.errors import UserError
from nanogpt.text import archives, compressed, documents, encoding
from nanogpt.text.corpus import Corpus, find_corpus
from nanogpt.text.documents import SkipReport
from nanogpt.text.formats import FORMATS
from nanogpt.text.options import ReadOptions

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX only")

TEXTS = ["One, twö.\nthree", "  four", '"five" 🙂\t']


def documents_in(path, report=None, **settings):
    """The documents of one file."""
    return joined(Corpus((path,), ReadOptions(**settings)).chunks(report or SkipReport()))


def joined(pieces):
    found, waiting = [], b""
    for raw, ends in pieces:
        waiting += raw
        if ends:
            found.append(waiting.decode())
            waiting = b""
    assert waiting == b""  # no document without an end
    return found


def refusal(path):
    """The one line with which a file is refused."""
    with pytest.raises(UserError) as raised:
        documents_in(path)
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith(f"--input_file {path}")
    return message


def csv_of(texts):
    return ("text\n" + "".join('"' + text.replace('"', '""') + '"\n' for text in texts)).encode()


def parquet(texts):
    file = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), file)
    return file.getvalue()


PLAIN = {
    "a.jsonl": "".join(json.dumps(text) + "\n" for text in TEXTS).encode(),
    "a.json": json.dumps([{"text": text} for text in TEXTS]).encode(),
    "a.csv": csv_of(TEXTS),
    "a.tsv": csv_of(TEXTS).replace(b"\t", b"\t"),
    "a.parquet": parquet(TEXTS),
}
"""The same three documents in every format."""

PACKERS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd.compress,
}


def zipped(members, method=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, raw in members:
            archive.writestr(name, raw)
    return file.getvalue()


def tarred(members, mode="w"):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, raw in members:
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return file.getvalue()


# Packed in any way


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("packed", ["", *PACKERS, ".zip", ".tar", ".tar.gz", ".tgz", ".tar.zst", ".GZ"])
def test_the_same_documents_however_they_are_packed(tmp_path, name, packed):
    raw = PLAIN[name]
    path = tmp_path / f"{name}{packed}"
    if packed.lower() in PACKERS:
        path.write_bytes(PACKERS[packed.lower()](raw))
    elif packed == ".zip":
        path.write_bytes(zipped([("in/" + name, raw), ("b.txt", b"last")]))
    elif packed:
        packer = {".tar": bytes, ".tar.zst": zstd.compress}.get(packed, gzip.compress)
        path.write_bytes(packer(tarred([("in/" + name, raw), ("b.txt", b"last")])))
    else:
        path.write_bytes(raw)
    report = SkipReport()
    last = ["last"] if packed == ".zip" or packed.startswith(".t") else []
    assert documents_in(path, report) == TEXTS + last
    assert report == SkipReport()


def test_parts_of_a_compressed_file_are_read_one_after_the_other(tmp_path):
    for suffix, pack in PACKERS.items():
        (tmp_path / f"a.txt{suffix}").write_bytes(pack(b"one, ") + pack(b"two"))
        assert documents_in(tmp_path / f"a.txt{suffix}") == ["one, two"]


@pytest.mark.parametrize("suffix", PACKERS)
def test_what_follows_the_end_of_a_compressed_file_is_no_loss_without_a_word(tmp_path, suffix):
    whole = PACKERS[suffix](b"one")
    (tmp_path / f"a.txt{suffix}").write_bytes(whole + bytes(512) + (whole if suffix != ".gz" else b""))
    assert documents_in(tmp_path / f"a.txt{suffix}") == ["one" if suffix == ".gz" else "oneone"]
    for rest in (b"garbage", whole[1:], whole[:-2]):
        (tmp_path / f"a.txt{suffix}").write_bytes(whole + rest)
        assert "is damaged" in refusal(tmp_path / f"a.txt{suffix}")


def test_archives_inside_archives(tmp_path):
    inner = zipped([("one.txt", b"one"), ("two.jsonl.xz", lzma.compress(b'"two"\n'))])
    outer = tarred(
        [("in.zip", inner), ("three.txt.gz", gzip.compress(b"three")), ("p.parquet", parquet(["4"]))]
    )
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(outer))
    assert documents_in(tmp_path / "a.tar.gz") == ["one", "two", "three", "4"]
    (tmp_path / "a.zip").write_bytes(zipped([("a.tar", outer)], zipfile.ZIP_STORED))
    assert documents_in(tmp_path / "a.zip") == ["one", "two", "three", "4"]


def test_a_long_document_in_an_archive_comes_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "CHUNK_BYTES", 1000)
    text = "some words " * 1000
    (tmp_path / "a.zip").write_bytes(zipped([("a.txt", text), ("b.txt", "last")]))
    assert documents_in(tmp_path / "a.zip") == [text, "last"]


def test_passing_again_gives_the_same_pieces_and_counts_every_byte(tmp_path):
    for name, raw in PLAIN.items():
        (tmp_path / name).write_bytes(raw)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(raw))
    source = find_corpus([str(tmp_path)])
    assert source.size == sum(path.stat().st_size for path in tmp_path.iterdir())
    read = []
    first = list(source.chunks(SkipReport(), read.append))
    assert list(source.chunks(SkipReport())) == first
    assert sum(read) >= source.size  # a Parquet file is read from its end first


# Which files


def test_files_folders_and_globs_in_the_order_given_and_each_once(tmp_path, monkeypatch):
    for name in ("b/2.txt", "b/1.txt", "b/c/3.txt", "b/.hidden", "b/.git/x.txt", "a.txt", "z.log"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "b/.git").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def names(*given):
        return [path.as_posix() for path in find_corpus(given).files]

    assert names("b") == ["b/1.txt", "b/2.txt", "b/c/3.txt"]
    assert names("z.log", "b", "a.txt") == ["z.log", "b/1.txt", "b/2.txt", "b/c/3.txt", "a.txt"]
    assert names("*.txt", "b/**/3.txt") == ["a.txt", "b/c/3.txt"]
    assert names("b/2.txt", "b", "./b/../b/1.txt", str(tmp_path / "a.txt"), "a.txt") == [
        "b/2.txt",
        "b/1.txt",
        "b/c/3.txt",
        (tmp_path / "a.txt").as_posix(),
    ]
    assert names("b/.hidden") == ["b/.hidden"]  # asked for by name
    assert sorted(names("**")) == ["a.txt", "b/1.txt", "b/2.txt", "b/c/3.txt", "z.log"]


@posix
def test_loops_of_links_end_and_links_are_followed_once(tmp_path):
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "in/one.txt").write_text("one")
    (tmp_path / "in/deep/loop").symlink_to(tmp_path / "in")
    (tmp_path / "in/self").symlink_to("self")
    (tmp_path / "in/again.txt").symlink_to("one.txt")
    (tmp_path / "in/broken.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "in/pipe.txt")
    (tmp_path / "far").mkdir()
    (tmp_path / "far/two.txt").write_text("two")
    (tmp_path / "in/there").symlink_to(tmp_path / "far")
    found = find_corpus([str(tmp_path / "in")]).files
    assert [path.read_text() for path in found] == ["one", "two"]


def test_names_with_odd_characters(tmp_path):
    for name in ("[a].txt", "100% *.txt", "ü 名前.txt", "-x.txt"):
        if sys.platform == "win32" and "*" in name:
            continue
        (tmp_path / name).write_text("text")
        assert find_corpus([str(tmp_path / name)]).files == (
            tmp_path / name,
        )  # a file that is there is no glob


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none.txt", "does not exist: check the path"),
        ("*.none", "does not exist: check the path"),
        ("folder", "is a folder without files: give another one"),
        ("x" * 300, ""),  # somebody gave the text instead of its file
        ("file/inside.txt", ""),
        ("", ""),
    ],
)
def test_what_is_not_there_is_said_in_one_line(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder/.git").mkdir(parents=True)
    (tmp_path / "file").write_text("text")
    if name == "":
        (tmp_path / "file").unlink()
    with pytest.raises(UserError) as raised:
        find_corpus([name])
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("--input_file")
    assert said in str(raised.value)


def test_a_file_that_is_gone_since(tmp_path):
    assert "cannot be read: No such file" in refusal(tmp_path / "gone.txt")


def test_of_several_files_one_that_cannot_be_read_is_reported(tmp_path):
    for name, raw in (("1.txt", b"one"), ("2.txt", b"\0\0"), ("3.gz", b"no"), ("4.txt", b"four")):
        (tmp_path / name).write_bytes(raw)
    source, report = find_corpus([str(tmp_path)]), SkipReport()
    assert joined(source.chunks(report)) == ["one", "four"]
    assert report.broken_count == 2
    assert report.broken[0].startswith(f"{tmp_path / '2.txt'}: is not a text file")
    assert report.broken[1].startswith(f"{tmp_path / '3.gz'}: is damaged")
    with pytest.raises(UserError, match=r"2\.txt is not a text file"):
        list(source.chunks(SkipReport(strict=True)))


def test_a_file_that_breaks_off_ends_its_document_there(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "CHUNK_BYTES", 100)
    whole = gzip.compress(random.Random(1).randbytes(30_000).hex().encode())
    (tmp_path / "1.txt.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "2.txt").write_bytes(b"two")
    report = SkipReport()
    found = joined(find_corpus([str(tmp_path)]).chunks(report))
    assert found[-1] == "two"
    assert report.broken_count == 1


# What is there and cannot be read


def lost(*names):
    """What a search reports as lost, by name."""
    report = SkipReport()
    list(find_corpus([str(name) for name in names]).chunks(report))
    assert report.broken_count == len(report.broken)
    return report.broken


@pytest.fixture
def closed(monkeypatch):
    """Folders that nobody may list, by name: permissions do not hold for root, who runs tests too."""
    scandir = os.scandir

    def refuse(path="."):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)


@pytest.mark.usefixtures("closed")
@pytest.mark.parametrize("glob", ["", "*", "**", "**/*.txt", "*/*", "*/*.txt"])
def test_a_folder_that_cannot_be_read_is_reported_however_it_is_found(tmp_path, glob):
    for folder in ("a", "closed"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "one.txt").write_text("one")
    assert lost(tmp_path / glob) == [
        f"{tmp_path / 'closed'}: a folder that cannot be read: Permission denied"
    ]
    with pytest.raises(UserError, match=r"closed: a folder that cannot be read: .*--strict"):
        list(find_corpus([str(tmp_path / glob)]).chunks(SkipReport(strict=True)))


@pytest.mark.usefixtures("closed")
@pytest.mark.parametrize("name", ["closed", "closed/*", "*", "**/*.txt"])
def test_a_folder_of_which_nothing_can_be_read_is_refused_with_the_reason(tmp_path, name):
    (tmp_path / "closed").mkdir()
    with pytest.raises(UserError, match=r"closed is a folder that cannot be read: Permission denied$"):
        find_corpus([str(tmp_path / name)])


@posix
@pytest.mark.parametrize("glob", ["", "*"])
def test_links_to_nothing_pipes_and_sockets_are_reported(tmp_path, monkeypatch, glob):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "one.txt").write_text("one")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "self").symlink_to("self")
    os.mkfifo(folder / "pipe")
    monkeypatch.chdir(folder)  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    (folder / "zero").symlink_to("/dev/zero")
    assert sorted(line.removeprefix(f"{folder}{os.sep}") for line in lost(folder / glob)) == [
        "dangling: a link to a file that is not there",
        "pipe: a named pipe",
        "self: a file that cannot be read: Too many levels of symbolic links",
        "socket: a socket",
        "zero: a device",
    ]


@posix
def test_pipes_devices_and_files_of_the_system_are_refused_by_name_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name, said in (
        (tmp_path / "pipe", "is a named pipe, no file: pipe its output into --input_file -"),
        ("/dev/zero", "is a device, no file: pipe"),
        ("/proc/self/status", "is a file of the system"),
        (tmp_path / "dangling", "is a link to a file that is not there"),
        ("a\0b", "does not exist"),
    ):
        with pytest.raises(UserError) as raised:
            find_corpus([str(name)])
        assert said in str(raised.value)
    assert "it is a named pipe" in refusal(tmp_path / "pipe")  # put there since
    assert "it is a device" in refusal(Path("/dev/zero"))


def test_hidden_files_are_left_out_on_purpose_and_that_is_said(tmp_path):
    for name in ("one.txt", ".env", ".git/config", ".DS_Store", "in/.secret"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("one")
    report = SkipReport(strict=True)
    assert joined(find_corpus([str(tmp_path), str(tmp_path / "in/.secret")]).chunks(report)) == ["one", "one"]
    assert report.notes[0].startswith("hidden files and folders left out: 3, the first: ")


def test_a_name_that_is_a_whole_text_is_not_shown_whole():
    with pytest.raises(UserError) as raised:
        find_corpus(["word " * 30_000 + "\n and more"])
    assert len(str(raised.value)) < 400
    assert "\n" not in str(raised.value)


@posix
def test_names_that_are_not_utf8_are_read_and_reported(tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    Path(name).mkdir()
    (Path(name) / "\udce9.txt").write_text("one")
    (Path(name) / "\udcff.jsonl").write_text('"two"\nno\n')
    source, report = find_corpus([name]), SkipReport()
    assert joined(source.chunks(report)) == ["one", "two"]
    assert report.broken[0].startswith(f"{tmp_path}/caf?/?.jsonl:2: not JSON")


def test_the_end_of_a_text_inside_a_character_is_a_loss(tmp_path):
    (tmp_path / "a.txt").write_bytes("Grüße, schöne Grüße".encode() + b"\xc3")
    report = SkipReport()
    assert documents_in(tmp_path / "a.txt", report) == ["Grüße, schöne Grüße"]
    assert report.broken == [f"{tmp_path / 'a.txt'}: ends inside a character: 1 byte left out"]
    with pytest.raises(UserError, match="--strict"):
        documents_in(tmp_path / "a.txt", SkipReport(strict=True))


def test_the_name_of_a_field_that_does_nothing_is_said(tmp_path):
    (tmp_path / "posts.js").write_text('posts = [ {"full_text": "one"} ]')
    (tmp_path / "z.txt").write_text("two")

    def said(names, field):
        report = SkipReport()
        list(find_corpus([str(tmp_path / name) for name in names], ReadOptions(field)).chunks(report))
        return report.unused_field_note(field)

    assert said(["posts.js"], "text") == ()
    (line,) = said(["posts.js", "z.txt"], "full_text")
    assert line.startswith(
        f"--text_field full_text does nothing: {tmp_path / 'posts.js'} is read as plain text"
    )
    (tmp_path / "b.jsonl").write_text('{"full_text": "three"}')
    assert said(["b.jsonl"], "full_text") == ()
    (line,) = said(["b.jsonl", "posts.js", "z.txt"], "full_text")
    assert line == f"2 files without fields read as plain text, whole (the first: {tmp_path / 'posts.js'})"


@pytest.mark.parametrize("size", [1, 3, 1 << 17])
def test_byte_order_marks_at_later_lines_of_a_text_are_dropped_and_said(tmp_path, monkeypatch, size):
    monkeypatch.setattr(encoding, "READ_BYTES", size)
    for name, mark in (("utf-8", b"\xef\xbb\xbf"), ("utf-16-le", b"\xff\xfe")):
        raw = (
            mark
            + "one\r\n".encode(name)
            + 2 * mark
            + "two\n".encode(name)
            + mark
            + "thr\ufeffee".encode(name)
        )
        (tmp_path / "a.txt").write_bytes(raw)
        report = SkipReport()
        assert documents_in(tmp_path / "a.txt", report) == ["one\ntwo\nthr\ufeffee"]
        said = "3 byte order marks at the start of a later line dropped (were files joined?)"
        assert report.notes[-1] == f"{tmp_path / 'a.txt'}: {said}"


# Hostile archives


@pytest.mark.parametrize(
    "name", ["../up.txt", "a/../../up.txt", "/etc/passwd", "\\up.txt", "C:\\up.txt", "..\\up"]
)
def test_a_member_that_leads_out_of_its_archive_is_refused_and_counted(tmp_path, name):
    for pack, path in ((zipped, tmp_path / "a.zip"), (tarred, tmp_path / "a.tar")):
        path.write_bytes(pack([("one.txt", b"one"), (name, b"evil"), ("two.txt", b"two")]))
        report = SkipReport()
        assert documents_in(path, report) == ["one", "two"]
        assert report.broken_count == 1
        assert "leads out of the archive" in report.broken[0]


def test_a_colon_in_a_title_is_no_drive(tmp_path):
    (tmp_path / "a.tar").write_bytes(tarred([("Chapter 1: Loomings.txt", b"Call me Ishmael.")]))
    assert documents_in(tmp_path / "a.tar") == ["Call me Ishmael."]


def test_hidden_members_and_folders_are_left_out_silently(tmp_path):
    members = [(".DS_Store", b"\0"), ("__MACOSX/._one.txt", b"\0"), ("./one.txt", b"one"), ("folder/", b"")]
    for pack, path in ((zipped, tmp_path / "a.zip"), (tarred, tmp_path / "a.tar")):
        path.write_bytes(pack(members[: 4 if pack is zipped else 3]))
        report = SkipReport()
        assert documents_in(path, report) == ["one"]
        assert report == SkipReport()


def test_links_and_devices_in_a_tar_are_not_followed(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo(f"member{kind.decode()}.txt")
            member.type, member.linkname = kind, str(secret)
            archive.addfile(member)
        last = tarfile.TarInfo("last.txt")
        last.size = 4
        archive.addfile(last, io.BytesIO(b"last"))
    report = SkipReport()
    assert documents_in(tmp_path / "a.tar", report) == ["last"]
    assert [line.removeprefix(f"{tmp_path / 'a.tar'}/") for line in report.broken] == [
        f"member2.txt: a link that leads out of the archive, to {secret}",
        "member3.txt: a device or a pipe, not a file",
        "member6.txt: a device or a pipe, not a file",
    ]


@pytest.mark.parametrize(
    ("target", "lost"), [("one.txt", 0), ("../one.txt", 0), ("../../one.txt", 1), ("/x", 1)]
)
def test_a_link_in_an_archive_is_a_loss_if_it_leads_out(tmp_path, target, lost):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        member = tarfile.TarInfo("in/link.txt")
        member.type, member.linkname = tarfile.SYMTYPE, target
        archive.addfile(member)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        member = zipfile.ZipInfo("in/link.txt")
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(member, target)
    for path in (tmp_path / "a.tar", tmp_path / "a.zip"):
        report = SkipReport()
        assert documents_in(path, report) == []
        assert (
            report.broken == [f"{path}/in/link.txt: a link that leads out of the archive, to {target}"] * lost
        )


def test_archives_one_after_the_other_in_a_tar_are_all_read(tmp_path):
    (tmp_path / "a.tar").write_bytes(tarred([("1.txt", b"one")]) + tarred([("2.txt", b"two")]))
    assert documents_in(tmp_path / "a.tar") == ["one", "two"]


def test_hidden_members_that_no_system_wrote_are_said(tmp_path):
    (tmp_path / "a.zip").write_bytes(zipped([("in/.env", b"x"), (".git/config", b"y"), ("1.txt", b"one")]))
    report = SkipReport()
    assert documents_in(tmp_path / "a.zip", report) == ["one"]
    assert report.notes == [f"{tmp_path / 'a.zip'}: hidden files and folders left out: 2, the first: in/.env"]


@pytest.mark.parametrize("suffix", [".txt.gz", ".jsonl.bz2", ".csv.xz", ".json.zst", ".zip", ".tar.gz"])
def test_decompression_bombs_are_refused(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(compressed, "BOMB_BYTES", 1 << 20)
    zeros = b" " * (1 << 23)
    path = tmp_path / f"bomb{suffix}"
    if suffix == ".zip":
        path.write_bytes(zipped([("a.txt", b"a" * len(zeros)), ("b.txt", b"text")]))  # no text of it is kept
        report = SkipReport()
        assert documents_in(path, report) == ["text"]
        assert "decompression bomb" in report.broken[0]
        return
    raw = tarred([("a.txt", zeros)]) if suffix == ".tar.gz" else zeros
    path.write_bytes(PACKERS[suffix[suffix.rindex(".") :]](raw))
    try:
        report = SkipReport()
        assert documents_in(path, report) == []
        said = report.broken[0]
    except UserError as error:
        said = str(error)
    assert "decompression bomb" in said


def test_text_that_compresses_well_is_no_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(compressed, "BOMB_BYTES", 1 << 16)
    text = "".join(f"{i} of the same words, nearly.\n" for i in range(20_000))
    for suffix, pack in PACKERS.items():
        (tmp_path / f"a.txt{suffix}").write_bytes(pack(text.encode()))
        assert documents_in(tmp_path / f"a.txt{suffix}") == [text]


@pytest.mark.parametrize("kind", ["gz", "zip"])
def test_archives_too_deep_inside_one_another_are_refused(tmp_path, kind):
    raw, name = b"text", "a.txt"
    for depth in range(1, archives.MAX_DEPTH + 2):
        raw, name = (gzip.compress(raw), f"{name}.gz") if kind == "gz" else (zipped([(name, raw)]), "a.zip")
        (tmp_path / name).write_bytes(raw)
        if depth <= archives.MAX_DEPTH:
            assert documents_in(tmp_path / name) == ["text"]
    report = SkipReport()
    try:
        assert documents_in(tmp_path / name, report) == []
        said = report.broken[0]
    except UserError as error:
        said = str(error)
    assert "archives inside archives, more than 4 deep" in said


# Damage


def damaged_member(raw, name):
    """A zip archive with a byte of the data of a member changed."""
    place = raw.index(name.encode()) + len(name) + 5
    return raw[:place] + bytes([raw[place] ^ 0xFF]) + raw[place + 1 :]


THREE = [("1.txt", b"one" * 20), ("2.txt", b"two" * 20), ("3.txt", b"three" * 20)]


def test_a_damaged_member_of_a_zip_loses_no_other(tmp_path):
    (tmp_path / "a.zip").write_bytes(damaged_member(zipped(THREE, zipfile.ZIP_STORED), "2.txt"))
    report = SkipReport()
    found = documents_in(tmp_path / "a.zip", report)
    assert found[0] == "one" * 20
    assert found[-1] == "three" * 20
    assert report.broken_count == 1
    assert report.broken[0].startswith(f"{tmp_path / 'a.zip'}/2.txt: is damaged")


def test_a_member_of_a_zip_that_cannot_be_opened_loses_no_other(tmp_path):
    raw = zipped(THREE)
    places = [place for place in range(len(raw)) if raw.startswith(b"2.txt", place)]
    encrypted = bytearray(raw)
    encrypted[raw.rindex(b"2.txt") - 46 + 8] |= 1  # the flag in the directory says that it is encrypted
    for changed in (raw[: places[0]] + b"X" + raw[places[0] + 1 :], bytes(encrypted)):
        (tmp_path / "a.zip").write_bytes(changed)
        report = SkipReport()
        assert documents_in(tmp_path / "a.zip", report) == ["one" * 20, "three" * 20]
        assert report.broken_count == 1
        assert "2.txt" in report.broken[0]


def test_a_binary_member_loses_no_other(tmp_path):
    members = [
        ("1.txt", b"one"),
        ("2.png", random.Random(1).randbytes(500)),
        ("3.gz", b"no"),
        ("4.txt", b"four"),
    ]
    for pack, path in ((zipped, tmp_path / "a.zip"), (tarred, tmp_path / "a.tar")):
        path.write_bytes(pack(members))
        report = SkipReport()
        assert documents_in(path, report) == ["one", "four"]
        assert report.broken_count == 2


def test_a_tar_that_is_damaged_in_the_middle_does_not_end_silently(tmp_path):
    raw = tarred(THREE)
    (tmp_path / "a.tar").write_bytes(raw[:1024] + b"\xff" * 512 + raw[1536:])  # the second header
    report = SkipReport()
    try:
        assert documents_in(tmp_path / "a.tar", report) in (["one" * 20], ["one" * 20, "three" * 20])
        said = report.broken
    except UserError as error:
        said = [str(error)]
    assert said


def test_a_tar_that_breaks_off_does_not_end_silently(tmp_path):
    raw = tarred(THREE)
    for size in (700, 1100, 1400, 1600):  # in a member, in a header
        (tmp_path / "a.tar").write_bytes(raw[:size])
        report = SkipReport()
        try:
            documents_in(tmp_path / "a.tar", report)
            said = report.broken
        except UserError as error:
            said = [str(error)]
        assert said, size


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_compressed_file_that_breaks_off_is_damaged(tmp_path, suffix):
    whole = PACKERS[suffix](random.Random(1).randbytes(3000).hex().encode())
    for size in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / f"a.txt{suffix}").write_bytes(whole[:size])
        report = SkipReport()
        try:
            found = documents_in(tmp_path / f"a.txt{suffix}", report)
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017 - it need not be raised: see below
        else:
            assert (size, found) == (0, [])  # an empty file is an empty text


SUFFIXES = [
    *archives.CONTAINERS,
    *(suffix for row in FORMATS.values() for suffix in row.suffixes if suffix != ".pdf"),  # in test_pdf.py
    *(".tar.gz", ".jsonl.gz", ".csv.zst", ".parquet.gz"),
]


def outcome(path):
    """Read a file: it gives documents or is refused in one line, and nothing else."""
    try:
        assert all(isinstance(text, str) for text in documents_in(path, SkipReport()))
        return "read"
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either is right
        return "refused"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_random_bytes_are_documents_or_are_refused(tmp_path, suffix):
    chance = random.Random(suffix)
    path = tmp_path / f"a{suffix}"
    starts = [
        b"",
        b"\x1f\x8b\x08\0",
        b"PK\x03\x04",
        b"\x28\xb5\x2f\xfd",
        b"PAR1",
        b"BZh9",
        b"\xff\xfe",
        b'{"text": "',
    ]
    for start in [*starts, b"\xef\xbb\xbf", b"\xff\xfe\0\0", b"text\n", b'"', b"[", b"\xfd7zXZ\0"]:
        for size in (0, 1, 3, 30, 300, 3000):
            path.write_bytes(start + chance.randbytes(size))
            outcome(path)
            path.write_bytes(start + bytes(chance.choices(b'ab {}[]",:\n\r\t\\\x00\xe9', k=size)))
            outcome(path)


SAMPLES = {
    **PLAIN,
    "a.txt": "Some text — with a dash.\r\n".encode() * 5,
    "utf16.jsonl": PLAIN["a.jsonl"].decode().encode("utf-16"),
    "utf16.csv": PLAIN["a.csv"].decode().encode("utf-16"),
    "utf16.json": PLAIN["a.json"].decode().encode("utf-16"),
    "a.jsonl.gz": gzip.compress(PLAIN["a.jsonl"]),
    "a.jsonl.bz2": bz2.compress(PLAIN["a.jsonl"]),
    "a.jsonl.xz": lzma.compress(PLAIN["a.jsonl"]),
    "a.jsonl.zst": zstd.compress(PLAIN["a.jsonl"]),
    "a.zip": zipped([("ä.txt", b"text"), ("b.jsonl", PLAIN["a.jsonl"])]),
    "a.tar": tarred([("a" * 120 + "ä.txt", b"text"), ("b.jsonl", PLAIN["a.jsonl"])]),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_files_cut_short_or_with_flipped_bits_are_documents_or_are_refused(tmp_path, name):
    chance = random.Random(name)
    raw, path = SAMPLES[name], tmp_path / name
    path.write_bytes(raw)
    assert outcome(path) == "read"
    for size in sorted(chance.sample(range(len(raw)), min(len(raw), 60))):
        path.write_bytes(raw[:size])
        outcome(path)
    for _ in range(150):
        changed = bytearray(raw)
        for _ in range(chance.choice((1, 1, 4))):
            changed[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        outcome(path)


def test_a_parquet_file_with_bytes_that_are_no_text_is_no_crash(tmp_path):
    raw = pa.array([b"one", b"caf\xe9", b"two"], pa.binary()).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": raw}), tmp_path / "a.parquet")
    assert outcome(tmp_path / "a.parquet") in ("read", "refused")
