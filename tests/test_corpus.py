"""Any text file is read right or refused in one line; Tiny Shakespeare comes from where it should, whole.

No test leaves the machine: the web is a server on 127.0.0.1, pip is a stand-in.
"""

import codecs
import hashlib
import http.server
import random
import socket
import subprocess
import threading
import zipfile
from pathlib import Path

import pytest

from nanogpt import corpus
from nanogpt.config import UserError
from nanogpt.corpus import download, read_text, tiny_shakespeare, unpack_wheel

FRENCH = """Longtemps, je me suis couché de bonne heure. Parfois, à peine ma bougie éteinte, mes yeux se
fermaient si vite que je n'avais pas le temps de me dire: «Je m'endors.» Et, une demi-heure après, la pensée
qu'il était temps de chercher le sommeil m'éveillait; je voulais poser le volume que je croyais avoir encore
dans les mains et souffler ma lumière; je n'avais pas cessé en dormant de faire des réflexions sur ce que je
venais de lire, mais ces réflexions avaient pris un tour un peu particulier; il me semblait que j'étais
moi-même ce dont parlait l'ouvrage: une église, un quatuor, la rivalité de François Ier et de Charles-Quint.
"""
SPANISH = """En un lugar de la Mancha, de cuyo nombre no quiero acordarme, no ha mucho tiempo que vivía un
hidalgo de los de lanza en astillero, adarga antigua, rocín flaco y galgo corredor. Una olla de algo más vaca
que carnero, salpicón las más noches, duelos y quebrantos los sábados, lentejas los viernes, algún palomino de
añadidura los domingos, consumían las tres partes de su hacienda. ¿Qué pasó? ¡Era el señor de la montaña!
"""
GERMAN = """Als Gregor Samsa eines Morgens aus unruhigen Träumen erwachte, fand er sich in seinem Bett zu
einem ungeheueren Ungeziefer verwandelt. Er lag auf seinem panzerartig harten Rücken und sah, wenn er den Kopf
ein wenig hob, seinen gewölbten, braunen, von bogenförmigen Versteifungen geteilten Bauch, auf dessen Höhe die
Bettdecke, zum gänzlichen Niedergleiten bereit, sich kaum noch halten konnte. Die Straße war schmal und groß.
"""
SWEDISH = """Det var en gång en liten flicka som hette Åsa; hon bodde på en ö i skärgården med sin mormor.
Älgen går över ån när snön är djup, och räven raskar över isen. På våren kommer svalorna åter, och då sår
bonden sitt korn på åkern, medan barnen plockar blåsippor i hagen och solen står högt över de gröna ängarna.
"""
PORTUGUESE = """Não há ninguém tão são que não tenha coração; a mãe do João põe a mesa e às vezes vê visões.
A Amélia é avó, e também o avô é português. Quem não tem cão caça com gato, mas a razão e a emoção são boas,
e as estações do ano vão e vêm sem pressa alguma: o verão, o outono, a primavera e as manhãs frias.
"""
ENGLISH = (
    "“Curly quotes — and dashes,” he said; it\u2019s the naïve café\u2019s œuvre… déjà vu, and on.\n" * 12
)
RUSSIAN = """Мой дядя самых честных правил, когда не в шутку занемог, он уважать себя заставил и лучше
выдумать не мог. Пример такой другим наука; но какая скука над больным сидеть и день и ночь, не отходя ни шагу
прочь! Какое низкое коварство полуживого забавлять, ему подушки поправлять, печально подносить лекарство,
вздыхать и думать про себя: когда же черт возьмет тебя! Так думал молодой повеса, летя в пыли на почтовых.
"""
JAPANESE = """吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。
何でも薄暗いじめじめした所でニャーニャー泣いていた事だけは記憶している。
"""
MIXED = "Grüße, “naïve” 中文 \U0001f600 Привет\n"


def written(tmp_path, raw):
    path = tmp_path / "text.txt"
    path.write_bytes(raw)
    return path


def refusal(path):
    """The one line with which `path` is refused."""
    with pytest.raises(UserError) as raised:
        read_text(path)
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith("--input_file")
    assert ": " in message  # what is wrong, and the fix
    return message


# Encodings


@pytest.mark.parametrize(
    ("mark", "encoding", "said"),
    [
        (b"", "utf-8", None),
        (codecs.BOM_UTF8, "utf-8", "UTF-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le", "UTF-16"),
        (codecs.BOM_UTF16_BE, "utf-16-be", "UTF-16"),
        (codecs.BOM_UTF32_LE, "utf-32-le", "UTF-32"),
        (codecs.BOM_UTF32_BE, "utf-32-be", "UTF-32"),
    ],
)
def test_unicode_with_and_without_a_mark(tmp_path, mark, encoding, said):
    path = written(tmp_path, mark + MIXED.encode(encoding))
    source = read_text(path)
    assert source.text == MIXED
    assert source.name == str(path)
    if said is None:
        assert source.notes == ()
    else:
        assert len(source.notes) == 1
        assert said in source.notes[0]
        assert "byte order mark" in source.notes[0]


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (FRENCH, "latin-1"),
        (SPANISH, "latin-1"),
        (GERMAN, "latin-1"),
        (SWEDISH, "latin-1"),
        (PORTUGUESE, "latin-1"),
        (FRENCH, "cp1252"),
        (ENGLISH, "cp1252"),
        (RUSSIAN, "cp1251"),
        (RUSSIAN, "koi8-r"),
        (JAPANESE * 8, "shift_jis"),
    ],
)
def test_older_encodings_are_detected_and_said(tmp_path, text, encoding):
    source = read_text(written(tmp_path, text.encode(encoding)))
    assert source.text == text
    assert len(source.notes) == 1
    assert source.notes[0].startswith("not UTF-8: read as ")


@pytest.mark.parametrize("size", [300, 301])
def test_detection_on_the_beginning_may_cut_a_character_in_half(tmp_path, monkeypatch, size):
    monkeypatch.setattr(corpus, "DETECTION_BYTES", size)
    text = JAPANESE * 8
    assert read_text(written(tmp_path, text.encode("shift_jis"))).text == text


def test_windows_line_ends_are_folded_and_said(tmp_path):
    source = read_text(written(tmp_path, b"one\r\ntwo\r\n\r\nthree\nfour\rfive"))
    assert source.text == "one\ntwo\n\nthree\nfour\rfive"
    assert len(source.notes) == 1
    assert source.notes[0].startswith("3 Windows line ends (CRLF) folded")


def test_unix_line_ends_are_left_alone(tmp_path):
    source = read_text(written(tmp_path, b"one\ntwo\n"))
    assert (source.text, source.notes) == ("one\ntwo\n", ())


# Refusals


def test_missing_file(tmp_path):
    assert "does not exist" in refusal(tmp_path / "none.txt")


def test_a_name_too_long_for_any_file(tmp_path):
    refusal(tmp_path / ("x" * 300))  # somebody gave the text instead of its file


def test_folder(tmp_path):
    assert "is a folder" in refusal(tmp_path)


def test_a_file_used_as_a_folder(tmp_path):
    refusal(written(tmp_path, b"text") / "inside.txt")


def test_a_file_that_fails_to_be_read(tmp_path, monkeypatch):
    def fail(_path):
        raise PermissionError(13, "Permission denied")

    path = written(tmp_path, b"text")
    monkeypatch.setattr(Path, "read_bytes", fail)
    assert "cannot be read: Permission denied" in refusal(path)


@pytest.mark.parametrize(
    "raw", [b"", b" \n\t\r\n  ", codecs.BOM_UTF8, codecs.BOM_UTF16_LE, "\u2003\n".encode()]
)
def test_nothing_but_white_space(tmp_path, raw):
    assert "is empty" in refusal(written(tmp_path, raw))


PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x02\x00\x00\x00\x02\x00\x08\x06\x00\x00\x00"


@pytest.mark.parametrize(
    "raw",
    [
        random.Random(1).randbytes(300),
        random.Random(2).randbytes(50_000),
        b"\x00" * 100,
        b"text with a \x00 in it",
        PNG,
        PNG + random.Random(3).randbytes(5000),
        b"\x7fELF\x02\x01\x01" + bytes(9) + random.Random(4).randbytes(2000),
        codecs.BOM_UTF16_LE + b"odd",
        codecs.BOM_UTF16_LE + b"\x00\xd8a\x00",  # half a surrogate pair
        codecs.BOM_UTF32_LE + random.Random(5).randbytes(400),
        codecs.BOM_UTF8 + b"\xff\xfe\xfd",
        codecs.BOM_UTF8 + b"text with a \x00 in it",
        FRENCH.encode("latin-1") + b"\x00" * 50,
    ],
    ids=lambda raw: f"{raw[:6].hex()}-{len(raw)}",
)
def test_binary_files(tmp_path, raw):
    assert "is not a text file" in refusal(written(tmp_path, raw))


# Tiny Shakespeare

POEM = b"Shall I compare thee to a summer's day?\n"


@pytest.fixture
def sources(monkeypatch):
    """Stand-ins for the web and for pip. Returns the list of those that were asked."""
    asked = []

    def web(url):
        asked.append(url)
        return POEM

    def pip():
        asked.append("wheel")
        return POEM

    monkeypatch.setattr(corpus, "download", web)
    monkeypatch.setattr(corpus, "unpack_wheel", pip)
    monkeypatch.setattr(corpus, "SHAKESPEARE_SHA256", hashlib.sha256(POEM).hexdigest())
    return asked


def unreachable(_url):
    try:
        raise ConnectionRefusedError("Connection refused")
    except ConnectionRefusedError as error:
        raise OSError("HTTPSConnectionPool(host='...'): retries\nexceeded with url") from error


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_copy_that_is_there_is_used_without_asking_anyone(sources, tmp_path):
    (tmp_path / "input.txt").write_bytes(POEM)
    source = tiny_shakespeare(tmp_path)
    assert source.text == POEM.decode()
    assert source.notes == (f"from {tmp_path / 'input.txt'}",)
    assert sources == []


@pytest.mark.parametrize("kind", ["another text", "folder"])
def test_something_else_that_is_there_is_refused_and_untouched(sources, tmp_path, kind):
    path = tmp_path / "input.txt"
    if kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"my own novel")
    with pytest.raises(UserError) as raised:
        tiny_shakespeare(tmp_path)
    message = str(raised.value)
    assert "is not Tiny Shakespeare" in message
    assert f"--input_file {path}" in message
    assert "\n" not in message
    assert sources == []
    assert path.is_dir() if kind == "folder" else path.read_bytes() == b"my own novel"


def test_the_web_comes_first_and_what_it_gave_is_kept(sources, tmp_path):
    folder = tmp_path / "new" / "data"
    source = tiny_shakespeare(folder)
    assert source.text == POEM.decode()
    assert "downloaded" in source.notes[0]
    assert (folder / "input.txt").read_bytes() == POEM
    assert contents(folder) == ["input.txt"]
    assert sources == [corpus.SHAKESPEARE_URL]
    assert tiny_shakespeare(folder).text == POEM.decode()
    assert sources == [corpus.SHAKESPEARE_URL]  # nobody is asked twice


def test_without_the_web_the_wheel_with_one_line_said(sources, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "download", unreachable)
    source = tiny_shakespeare(tmp_path)
    assert source.text == POEM.decode()
    assert corpus.SHAKESPEARE_WHEEL in source.notes[0]
    assert sources == ["wheel"]
    assert (tmp_path / "input.txt").read_bytes() == POEM
    (line,) = capsys.readouterr().out.splitlines()
    assert "cannot be reached (Connection refused)" in line
    assert corpus.SHAKESPEARE_WHEEL in line


@pytest.mark.parametrize("broken", ["download", "unpack_wheel"])
@pytest.mark.parametrize("body", [POEM[:-1], b"", b"<html>Please log in</html>"])
def test_damaged_in_transit_is_refused_and_nothing_is_written(sources, tmp_path, monkeypatch, broken, body):
    monkeypatch.setattr(corpus, "download", unreachable)
    monkeypatch.setattr(corpus, broken, lambda *_: body)
    with pytest.raises(UserError, match="damaged") as raised:
        tiny_shakespeare(tmp_path)
    assert "\n" not in str(raised.value)
    assert contents(tmp_path) == []
    assert sources == []


def test_no_source_at_all(sources, tmp_path, monkeypatch):
    def none():
        raise UserError("Tiny Shakespeare cannot be fetched")

    monkeypatch.setattr(corpus, "download", unreachable)
    monkeypatch.setattr(corpus, "unpack_wheel", none)
    with pytest.raises(UserError, match="cannot be fetched"):
        tiny_shakespeare(tmp_path)
    assert contents(tmp_path) == []
    assert sources == []


def test_a_folder_that_cannot_be_made(sources, tmp_path):
    with pytest.raises(UserError):
        tiny_shakespeare(written(tmp_path, b"a file") / "data")
    assert sources in ([], [corpus.SHAKESPEARE_URL])


# The web, as a server on this machine

BODY = random.Random(6).randbytes(200_000)


class Handler(http.server.BaseHTTPRequestHandler):
    """/body: BODY; /chunks: BODY without a length; /torn: less than was promised; else 404."""

    def do_GET(self):
        if self.path == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        if self.path != "/chunks":
            self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY[: 70_000 if self.path == "/torn" else None])

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()
        thread.join()


@pytest.fixture
def direct(monkeypatch):
    """No proxy between the test and its own machine."""
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.mark.usefixtures("direct")
@pytest.mark.parametrize("path", ["/body", "/chunks"])
def test_download_brings_every_byte(server, path, capsys):
    assert download(server + path) == BODY
    assert capsys.readouterr().out.strip() == ""  # the bar is for terminals


@pytest.mark.usefixtures("direct")
@pytest.mark.parametrize("path", ["/missing", "/torn"])
def test_a_failed_download_is_an_oserror(server, path):
    with pytest.raises(OSError, match=r"404|IncompleteRead"):
        download(server + path)


@pytest.mark.usefixtures("direct")
def test_nobody_listening_is_an_oserror_with_a_short_reason():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(OSError, match="refused") as raised:
            download(f"http://127.0.0.1:{unused.getsockname()[1]}/")
    assert "refused" in corpus.reason(raised.value)
    assert len(corpus.reason(raised.value)) < 60


# The wheel, by a stand-in for pip


def pip(monkeypatch, act):
    """Let `act(folder)` do pip's work; returns the commands that were run."""
    commands = []

    def run(command, **settings):
        assert settings["timeout"] > 0
        commands.append(command)
        return act(Path(command[command.index("--dest") + 1])) or subprocess.CompletedProcess(
            command, 0, "", ""
        )

    monkeypatch.setattr(corpus.subprocess, "run", run)
    return commands


def test_the_wheel_is_put_together_in_order(monkeypatch):
    def act(folder):
        with zipfile.ZipFile(folder / "dm_sonnet-1.36-py3-none-any.whl", "w") as wheel:
            for part in ("test", "valid", "train"):
                wheel.writestr(f"sonnet/examples/data/ts.{part}.txt", f"<{part}>")

    commands = pip(monkeypatch, act)
    assert unpack_wheel() == b"<train><valid><test>"
    assert len(commands) == 1
    assert commands[0][-1] == corpus.SHAKESPEARE_WHEEL
    assert "install" not in commands[0]


def fails(_folder):
    return subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution\n")


def fails_silently(_folder):
    return subprocess.CompletedProcess([], 1, "", "")


def hangs(_folder):
    raise subprocess.TimeoutExpired(["pip"], 120)


def is_missing(_folder):
    raise FileNotFoundError(2, "No such file or directory")


@pytest.mark.parametrize("act", [fails, fails_silently, hangs, is_missing])
def test_pip_that_fails_ends_in_one_line(monkeypatch, act):
    pip(monkeypatch, act)
    with pytest.raises(UserError, match="--input_file") as raised:
        unpack_wheel()
    assert "\n" not in str(raised.value)
    if act is fails:
        assert "ERROR: No matching distribution" in str(raised.value)


# Almost UTF-8


def test_a_text_cut_inside_a_character_loses_no_more_than_that(tmp_path):
    source = read_text(written(tmp_path, (RUSSIAN * 3).encode()[:-2] + "ж".encode()[:1]))
    assert source.text == (RUSSIAN * 3).encode()[:-2].decode()
    assert source.notes == ("ends inside a character: 1 bytes left out",)


def test_one_bad_byte_is_named_and_not_taken_for_another_encoding(tmp_path):
    raw = (FRENCH * 3).encode()
    assert "is UTF-8 but for the byte 0xFF at 60" in refusal(written(tmp_path, raw[:60] + b"\xff" + raw[60:]))
