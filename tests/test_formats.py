"""How a file is read is said, and chosen by a flag; no damaged file of any format ends in a traceback."""

import gzip
import json
import random
from dataclasses import fields

import pytest
import torch
from reading import documents_in, zipped
from test_chats import CHAT, TELEGRAM, telegram_chat
from test_mail import MAILS, TEXTS, mbox
from test_markup import BOOK, PAGE, WORD_FILE
from test_subtitles import CELLS, SRT, VTT, notebook

from nanogpt.cli.config import EvaluateConfig
from nanogpt.cli.parse import parse
from nanogpt.data.config import PrepareConfig
from nanogpt.data.dataset import load_dataset, prepare_arguments
from nanogpt.data.prepare import main
from nanogpt.errors import UserError
from nanogpt.text.documents import SkipReport
from nanogpt.text.formats import FORMATS
from nanogpt.text.options import ReadOptions

CHAT_NAME = "WhatsApp Chat with Anna.txt"

SAMPLES = {
    "a.html": PAGE.encode(),
    "a.epub": zipped(BOOK.items()),
    "a.docx": zipped(WORD_FILE.items()),
    "a.ipynb": notebook(CELLS),
    "a.mbox": mbox(),
    "a.eml": MAILS[2],
    "a.srt": SRT.encode(),
    "a.vtt": VTT.encode(),
    CHAT_NAME: CHAT.encode(),
    "result.json": json.dumps(telegram_chat(1, TELEGRAM[0])).encode(),
    "data.json": b'{"date": "2024", "sender": "Anna", "body": "Hi"}\n' * 3,
    "general.csv": b'AuthorID,Author,Date,Content,Attachments,Reactions\n"1","Anna","d","Hi","",""\n',
    "tweets.js": b'window.YTD.tweets.part0 = [ {"tweet": {"full_text": "Hi"}} ]',
}


@pytest.mark.parametrize("name", SAMPLES)
def test_files_cut_short_or_with_flipped_bits_are_documents_or_are_refused(tmp_path, name):
    chance = random.Random(name)
    raw, path = SAMPLES[name], tmp_path / name
    path.write_bytes(raw)
    assert documents_in(path)
    changes = [raw[:size] for size in chance.sample(range(len(raw)), 20)]
    for _ in range(60):
        changed = bytearray(raw)
        for _ in range(chance.choice((1, 4, 20))):
            changed[chance.randrange(len(raw))] = chance.randrange(256)
        changes.append(bytes(changed))
    for changed in changes:
        path.write_bytes(changed)
        try:
            assert all(isinstance(text, str) for text in documents_in(path))
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017 - either is right


@pytest.mark.parametrize("name", SAMPLES)
def test_they_are_read_in_archives_too_and_raw_if_asked(tmp_path, name):
    path, raw = tmp_path / name, SAMPLES[name]
    path.write_bytes(raw)
    expected = documents_in(path)
    (tmp_path / "a.zip").write_bytes(zipped([(f"in/{name}", raw)]))
    assert documents_in(tmp_path / "a.zip") == expected
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(raw))
    assert documents_in(tmp_path / f"{name}.gz") == expected
    if name.endswith((".epub", ".docx")):
        with pytest.raises(UserError, match="is not a text file"):
            documents_in(path, input_format="text")
    else:
        text = raw.decode("utf-8", "replace") if name == "a.mbox" else raw.decode("utf-8-sig")
        found = documents_in(path, input_format="text")
        assert len(found) == 1
        assert found[0][:200].split()[:3] == text[:200].split()[:3]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_nonsense_as_text_or_refuses_it(tmp_path, name):
    for raw in (b"", b"word\n", b"\xff\xfe\0", b"{}", b"<a>", b"From x\n\n"):
        (tmp_path / "a.bin").write_bytes(raw)
        try:
            documents_in(tmp_path / "a.bin", input_format=name)
        except UserError as error:
            assert "\n" not in str(error)  # noqa: PT017 - either is right


def test_what_is_said_about_many_files_is_one_line(tmp_path):
    (tmp_path / "a.zip").write_bytes(zipped([(f"{n}.html", f"<p>{n}") for n in range(3)]))
    report = SkipReport()
    assert documents_in(tmp_path / "a.zip", report) == ["0", "1", "2"]
    assert report.reading_notes("text") == (
        f"3 files (the first: {tmp_path / 'a.zip'}/0.html): read as HTML "
        "(--input_format text: as plain text, as it is)",
    )


def test_from_the_flags_to_the_data_folder(tmp_path, capsys):
    box, chat = tmp_path / "inbox", tmp_path / CHAT_NAME
    box.write_bytes(mbox())
    chat.write_text(CHAT, "utf-8")
    arguments = [
        "--input_file",
        str(box),
        str(chat),
        "--speakers",
        "Müller, Anna=Anna",
        "Anna Müller=Anna",
        "Bot=",
    ]
    config = parse(PrepareConfig, [*arguments, "--data_dir", str(tmp_path / "data")], "data")
    assert config.speakers == ("Müller, Anna=Anna", "Anna Müller=Anna", "Bot=")
    assert main(config) == 0
    said = capsys.readouterr().out
    assert f"{box}: read as a mailbox (mbox)" in said
    assert f"{chat}: read as a WhatsApp chat" in said
    assert "Messages by " in said
    data = load_dataset(tmp_path / "data")
    texts = [TEXTS[0].replace("Müller, Anna", "Anna"), *TEXTS[1:], "Anna: 0\nBen: 2\n"]
    end = data.tokenizer.end_of_text
    ids = [*data.train[:].tolist(), *data.val[:].tolist()]
    found, waiting = [], []
    for token in ids:
        if token == end:
            found.append(data.tokenizer.decode(waiting))
            waiting = []
        else:
            waiting.append(token)
    assert found == texts
    assert waiting == []
    saved = torch.load(tmp_path / "data/vocab.pt", weights_only=True)["arguments"]
    assert saved == prepare_arguments(config)
    assert parse(PrepareConfig, saved, "data").speakers == config.speakers


def test_both_commands_have_every_reading_option_and_the_facts_keep_it():
    given = {"text_field": "body", "input_format": "jsonl", "encoding": "cp1252", "speakers": ("Bot=",)}
    assert given.keys() == {field.name for field in fields(ReadOptions)}
    for config in (PrepareConfig, EvaluateConfig):
        made = config(**given)
        assert {name: getattr(made, name) for name in given} == given
    arguments = [
        "--speakers",
        "Bot=",
        "--text_field",
        "body",
        "--input_format",
        "jsonl",
        "--encoding",
        "cp1252",
    ]
    assert prepare_arguments(PrepareConfig(**given)) == arguments


def test_a_name_that_nobody_has_stops_before_anything_is_written(tmp_path):
    (tmp_path / CHAT_NAME).write_text(CHAT)
    with pytest.raises(UserError, match="nobody has that name, the names are"):
        main(PrepareConfig((str(tmp_path / CHAT_NAME),), str(tmp_path / "data"), speakers=("Ana=",)))
    assert not (tmp_path / "data/vocab.pt").exists()
    with pytest.raises(UserError, match="is no rule"):
        PrepareConfig(speakers=("Anna",))
