"""A text file is read right in whatever encoding it has, however it is cut, or refused in one line."""

import codecs
import io
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt.cli.main import run_command
from nanogpt.data.config import PrepareConfig
from nanogpt.data.dataset import load_dataset
from nanogpt.errors import UserError
from nanogpt.text import encoding
from nanogpt.text.encoding import decode_file, find_encoding
from nanogpt.text.markup import decode_html

quick = settings(deadline=None, derandomize=True, max_examples=100)

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


def read(raw):
    """The text of a file, and the notes on it."""
    pieces, notes = decode_file(io.BytesIO(raw))
    return b"".join(pieces).decode(), notes


def refusal(raw):
    """The one line with which a file is refused."""
    with pytest.raises(UserError) as raised:
        read(raw)
    assert "\n" not in str(raised.value)
    return str(raised.value)


MARKS = [
    (b"", "utf-8", None),
    (codecs.BOM_UTF8, "utf-8", "UTF-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le", "UTF-16"),
    (codecs.BOM_UTF16_BE, "utf-16-be", "UTF-16"),
    (codecs.BOM_UTF32_LE, "utf-32-le", "UTF-32"),
    (codecs.BOM_UTF32_BE, "utf-32-be", "UTF-32"),
]


@pytest.mark.parametrize(("mark", "name", "said"), MARKS)
def test_unicode_with_and_without_a_mark(mark, name, said):
    text, notes = read(mark + MIXED.encode(name))
    assert text == MIXED
    if said is None:
        assert notes == ()
    else:
        assert len(notes) == 1
        assert said in notes[0]
        assert "byte order mark" in notes[0]


OLDER = [
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
]


@pytest.mark.parametrize(("text", "name"), OLDER)
def test_older_encodings_are_detected_and_said(text, name):
    found, notes = read(text.encode(name))
    assert found == text
    assert len(notes) == 1
    assert notes[0].startswith("not UTF-8: read as ")


@pytest.mark.parametrize("size", [300, 301])
def test_detection_on_the_beginning_may_cut_a_character_in_half(monkeypatch, size):
    monkeypatch.setattr(encoding, "DETECTION_BYTES", size)
    assert read((JAPANESE * 8).encode("shift_jis"))[0] == JAPANESE * 8


# Files that are decoded piece by piece


@quick
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), st.data())
def test_unicode_in_pieces_of_any_size_is_the_same_text(text, draw):
    mark, name, _ = draw.draw(st.sampled_from(MARKS))
    if not mark:
        text = text.removeprefix("\ufeff")  # that is a mark
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "HEAD_BYTES", draw.draw(st.integers(4, 12)))
        patch.setattr(encoding, "READ_BYTES", draw.draw(st.integers(1, 5)))
        assert read(mark + text.encode(name))[0] == text


@pytest.mark.parametrize(("text", "name"), [(FRENCH, "latin-1"), (JAPANESE * 20, "shift_jis")])
@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_older_encodings_in_pieces_of_any_size_are_the_same_text(monkeypatch, text, name, size):
    monkeypatch.setattr(encoding, "DETECTION_BYTES", 300)
    monkeypatch.setattr(encoding, "HEAD_BYTES", 401)
    monkeypatch.setattr(encoding, "READ_BYTES", size)
    found, notes = read(text.encode(name))
    assert found == text
    assert len(notes) == 1


def test_a_short_spanish_text_is_not_korean():
    text = "En un lugar de la Mancha vivía un hidalgo. ¿Qué? ¡Año! mañana\n" * 10
    assert find_encoding(text.encode("cp1252"), whole=True)[0] == "cp1252"


CZECH = "Byl pozdní večer, první máj, večerní máj, byl lásky čas.\n"


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".srt", ".html"])
def test_an_encoding_that_is_given_is_not_detected(tmp_path, capsys, suffix):
    wrapped = {
        ".jsonl": json.dumps({"text": CZECH}, ensure_ascii=False),
        ".csv": f'text\n"{CZECH}"\n',
        ".srt": f"1\n00:00:01,000 --> 00:00:02,000\n{CZECH}",
        ".html": f"<p>{CZECH}</p>",
    }
    old, new = tmp_path / f"old{suffix}", tmp_path / f"new{suffix}"
    old.write_bytes(wrapped.get(suffix, CZECH).encode("cp1250"))
    new.write_text(wrapped.get(suffix, CZECH), "utf-8")
    arguments = ["--encoding", "cp1250", "--data_dir", str(tmp_path / "data")]
    assert run_command("data", ["--input_file", str(old), str(new), *arguments], "nanogpt data") == 0
    assert f"{old}: not UTF-8: read as cp1250, as --encoding says" in capsys.readouterr().out
    dataset = load_dataset(tmp_path / "data")
    text = dataset.tokenizer.decode([*map(int, dataset.train), *map(int, dataset.val)])
    assert text.count(CZECH.strip()) == 2


def test_what_a_file_says_of_itself_comes_before_the_flag():
    text = "Größe " * 20
    assert find_encoding(text.encode("utf-16"), whole=True, otherwise="cp1250")[0] == "utf-16"
    assert find_encoding(text.encode(), whole=True, otherwise="cp1250")[0] == "utf-8"
    page = b'<meta charset="iso-8859-1">' + text.encode("latin-1")
    assert "".join(decode_html(io.BytesIO(page), page, otherwise="cp437")).endswith(text)
    assert find_encoding("plain".encode("utf-16-le"), whole=True, otherwise="utf-16-le")[0] == "utf-16-le"


def test_an_unknown_encoding_is_a_mistake():
    with pytest.raises(UserError, match=r"^--encoding klingon is not known: use auto, "):
        PrepareConfig(encoding="klingon")


def test_ascii_that_is_something_else_later_is_refused_and_not_garbled(monkeypatch):
    monkeypatch.setattr(encoding, "HEAD_BYTES", 100)
    monkeypatch.setattr(encoding, "READ_BYTES", 10)
    assert "at about byte 20" in refusal(b"a" * 205 + b"\xe9" + b"b" * 300)


def test_a_nul_after_the_beginning_is_refused(monkeypatch):
    monkeypatch.setattr(encoding, "HEAD_BYTES", 100)
    monkeypatch.setattr(encoding, "READ_BYTES", 10)
    assert "is not a text file" in refusal(b"a" * 205 + b"\0" + b"b" * 300)


# Refusals

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
def test_binary_files(raw):
    assert "is not a text file" in refusal(raw)


@quick
@given(st.binary(max_size=300))
def test_any_bytes_are_text_or_refused(raw):
    try:
        said = read(raw)[0]
    except UserError as error:
        said = str(error).replace("\n", "\0")
    assert "\0" not in said


# Almost UTF-8


@pytest.mark.parametrize("beginning", [1 << 24, 100])
@pytest.mark.parametrize(
    ("char", "there"), [("ж", 1), ("—", 1), ("—", 2), ("\U0001f600", 1), ("\U0001f600", 3)]
)
def test_a_text_cut_inside_a_character_loses_no_more_than_that(monkeypatch, beginning, char, there):
    monkeypatch.setattr(encoding, "HEAD_BYTES", beginning)
    monkeypatch.setattr(encoding, "READ_BYTES", 32)
    lost = []
    pieces, notes = decode_file(io.BytesIO((RUSSIAN * 3).encode() + char.encode()[:there]), lost.append)
    assert b"".join(pieces).decode() == RUSSIAN * 3
    assert notes == ()
    assert lost == [f"ends inside a character: {there} {'byte' if there == 1 else 'bytes'} left out"]


def test_one_bad_byte_is_named_and_not_taken_for_another_encoding():
    raw = (FRENCH * 3).encode()
    assert "is UTF-8 but for the byte 0xFF at 60" in refusal(raw[:60] + b"\xff" + raw[60:])


def test_a_beginning_that_ends_inside_a_character_is_utf8_all_the_same():
    raw = RUSSIAN.encode()
    assert find_encoding(raw[:1001], whole=False) == find_encoding(raw, whole=True) == ("utf-8", ())
