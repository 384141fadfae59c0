"""Chats become lines "Name: message", whatever the phone, its language and the layout of the export."""

import json

import pytest
from reading import documents_in

from nanogpt.errors import UserError
from nanogpt.text import json_formats, records
from nanogpt.text.corpus import find_corpus
from nanogpt.text.documents import SkipReport
from nanogpt.text.speakers import Speakers, require_known


def chat(tmp_path, text, name="WhatsApp Chat with Ben.txt", **settings):
    (tmp_path / name).write_text(text, "utf-8")
    return documents_in(tmp_path / name, **settings)


# WhatsApp


STAMPS = [
    "[31/12/2022, 11:40:26] ",
    "[31.12.22, 11:40:26] ",
    "[2017-09-07, 7:58:30 AM] ",
    "[24/10/24, 9:18:35\u202fAM] ",
    "[2026/7/9 02:28:09] ",
    "\u200e[01-29-2018, 23:33:00] ",
    "[2023. 1. 2. 오후 3:45:12] ",
    "8/8/19, 1:25 PM - ",
    "31.12.22, 11:40 - ",
    "2021-03-18, 3:02 p.m. - ",
    "2023/1/2 下午3:45 - ",
    "24.10.24 9.18 - ",
    "٢٣\u200f/٧\u200f/٢٠٢١, ١٠:٥٤ ص - ",  # noqa: RUF001 - the digits of Arabic
]


@pytest.mark.parametrize("stamp", STAMPS)
def test_whatsapp_with_the_dates_of_any_country(tmp_path, stamp):
    said = ["Anna Müller: Hi: there\nsecond line\n", "\u202a+49 151 23\u202c: ok", "~\u202fBen: 10:30?"]
    text = "".join(f"{stamp}{message}\n" for message in said)
    assert chat(tmp_path, text) == ["Anna Müller: Hi: there\nsecond line\n+49 151 23: ok\nBen: 10:30?\n"]


def test_lines_of_the_system_and_messages_without_text_are_left_out_and_counted(tmp_path):
    text = (
        "1/2/24, 10:00 - Messages and calls are end-to-end encrypted.\n"
        '1/2/24, 10:00 - Anna changed the subject to "Trip: June"\n'
        "1/2/24, 10:01 - Anna: <Medien ausgeschlossen>\n"
        "1/2/24, 10:01 - Anna: IMG-20240101-WA0001.jpg (Datei angehängt)\nThe view\n"
        "1/2/24, 10:02 - Ben: This message was deleted\n"
        "1/2/24, 10:02 - Ben: null\n"
        "1/2/24, 10:03 - Ben: Nice <3 <This message was edited>\n"
        "1/2/24, 10:03 - Ben: Diese Nachricht wurde gelöscht.\n"
        "1/2/24, 10:03 - Anna: Eliminaste este mensaje\n"
        "1/2/24, 10:03 - Anna: Gut <Diese Nachricht wurde bearbeitet.>\n"
        "1/2/24, 10:03 - Anna: a <b> and <br/>\n"
        "1/2/24, 10:04 - Ben: \n"
    )
    report = SkipReport()
    assert chat(tmp_path, text, report=report) == [
        "Anna: The view\nBen: Nice <3\nAnna: Gut\nAnna: a <b> and <br/>\n"
    ]
    path = tmp_path / "WhatsApp Chat with Ben.txt"
    assert report.notes == [f"{path}: 8 lines of the system, or without text, left out"]
    text = (
        "[1/2/24, 10:00:00] Trip: \u200eMessages and calls are end-to-end encrypted.\n"
        "\u200e[1/2/24, 10:00:01] Ben: \u200eBild weggelassen\n"
        "[1/2/24, 10:00:02] Ben: Well \u200e<Diese Nachricht wurde bearbeitet.>\n"
    )
    assert chat(tmp_path, text, "_chat.txt") == ["Ben: Well\n"]


def test_a_chat_is_read_as_one_by_its_name_and_a_log_is_not(tmp_path):
    lines = ["INFO: one", "INFO: two", "DEBUG: three"]
    text = "".join(f"[2024-01-02 10:00:0{n}] {line}\n" for n, line in enumerate(lines))
    report = SkipReport()
    assert chat(tmp_path, text, "server.txt", report=report) == [text]
    (line,) = report.reading_notes("text")
    assert line == (
        f"{tmp_path / 'server.txt'}: looks like a WhatsApp chat: read as it is "
        "(--input_format whatsapp reads its text alone)"
    )
    assert chat(tmp_path, text, "server.txt", input_format="whatsapp") == [
        "INFO: one\nINFO: two\nDEBUG: three\n"
    ]
    report = SkipReport()
    chat(tmp_path, text, report=report)
    assert report.reading_notes("text") == (
        f"{tmp_path / 'WhatsApp Chat with Ben.txt'}: read as a WhatsApp chat "
        "(--input_format text: as plain text, as it is)",
        'Messages by INFO (2), DEBUG (1) (--speakers "INFO=Name" renames, "INFO=" leaves out)',
    )
    with pytest.raises(UserError, match="has no message with a date and a time"):
        chat(tmp_path, "Just a text.\n", "a.txt", input_format="whatsapp")


def test_a_line_that_is_too_long_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_RECORD_CHARS", 100)
    report = SkipReport()
    text = "1/2/24, 10:00 - Anna: Hi\n" + "x" * 200 + "\n1/2/24, 10:00 - Ben: Ho\n"
    assert chat(tmp_path, text, report=report) == ["Anna: Hi\nBen: Ho\n"]
    assert report.broken == [f"{tmp_path / 'WhatsApp Chat with Ben.txt'}:2: longer than 100 characters"]


def test_messages_made_to_take_for_ever_take_little(tmp_path):
    said = "a" + " " * 200_000 + "b" + "<" * 50_000 + "1/2/24, " * 20_000
    assert chat(tmp_path, f"1/2/24, 10:00 - Anna: {said}\n") == [f"Anna: {said.strip()}\n"]


# Who speaks


CHAT = "".join(
    f"1/2/24, 10:0{n} - {name}: {n}\n" for n, name in enumerate(["Anna Müller", "Bot", "Ben", "Bot"])
)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (["Anna Müller=Anna", "Bot="], "Anna: 0\nBen: 2\n"),
        (["Anna Mu\u0308ller = A"], "A: 0\nBot: 1\nBen: 2\nBot: 3\n"),
        (["Ben=Ben", "*="], "Ben: 2\n"),
        (["*=Somebody", "Bot=Robo=1"], "Somebody: 0\nRobo=1: 1\nSomebody: 2\nRobo=1: 3\n"),
    ],
)
def test_speakers_are_renamed_and_left_out(tmp_path, rules, expected):
    report = SkipReport()
    assert chat(tmp_path, CHAT, rules=rules, report=report) == [expected]
    assert report.speakers == {"Anna Müller": 1, "Bot": 2, "Ben": 1}
    require_known(rules, report.used_rules, report.speakers)


def test_a_wrong_rule_is_refused_before_anybody_is_trained_on(tmp_path):
    with pytest.raises(UserError, match='--speakers "Anna" is no rule: write "Anna=Ann" to rename somebody'):
        Speakers.parse(["Anna"])
    with pytest.raises(UserError, match='--speakers "=Anna" is no rule'):
        Speakers.parse(["=Anna"])
    with pytest.raises(UserError, match='--speakers has two rules for "Anna"'):
        Speakers.parse(["Anna=A", " Anna="])
    report = SkipReport()
    chat(tmp_path, CHAT, rules=["Ana="], report=report)
    with pytest.raises(UserError, match=r'"Ana=\.\.\.": nobody has that name, the names are "Bot", "Anna'):
        require_known(["Ana="], report.used_rules, report.speakers)
    with pytest.raises(UserError, match="there is no chat or mail among the texts"):
        require_known(["Ana="], (), SkipReport().speakers)


# Telegram


def telegram_chat(number, texts):
    messages = [{"id": 0, "type": "service", "actor": "Anna", "action": "invite_members", "text": ""}]
    messages += [
        {"id": n, "type": "message", "from": name, "from_id": "user1", "text": text, "text_entities": []}
        for n, (name, text) in enumerate(texts, 1)
    ]
    return {"name": f"Chat {number}", "type": "private_group", "id": number, "messages": messages}


TELEGRAM = [
    [
        ("Anna", "Hi"),
        (None, "Bye"),
        ("Ben", ["see ", {"type": "link", "text": "http://x"}, "!"]),
        ("Ben", ""),
    ],
    [("Anna", 'a "messages": [ and ] in a text\n{"messages": []}'), ("Ben", "ü" * 50), ("Anna", "")],
]

TELEGRAM_TEXTS = [
    "Anna: Hi\nDeleted Account: Bye\nBen: see http://x!\n",
    f'Anna: a "messages": [ and ] in a text\n{{"messages": []}}\nBen: {"ü" * 50}\n',
]


@pytest.mark.parametrize("size", [1, 7, 1 << 16])
@pytest.mark.parametrize("indent", [None, 1])
def test_telegram_one_chat_and_all_of_them(tmp_path, monkeypatch, size, indent):
    from nanogpt.text import chats

    monkeypatch.setattr(chats, "READ_CHARS", size)
    everything = {
        "about": "Here is the data you requested.",
        "personal_information": {"user_id": 1, "first_name": "Anna"},
        "chats": {"about": "", "list": [telegram_chat(n, texts) for n, texts in enumerate(TELEGRAM)]},
    }
    path = tmp_path / "result.json"
    report = SkipReport()
    path.write_text(json.dumps(everything, indent=indent, ensure_ascii=False), "utf-8")
    assert documents_in(path, report) == TELEGRAM_TEXTS
    assert report.notes == [f"{path}: 4 messages of the system, or without text, left out"]
    path.write_text(json.dumps(telegram_chat(1, TELEGRAM[0]), indent=indent), "utf-8")
    assert documents_in(path) == TELEGRAM_TEXTS[:1]


def test_telegram_cut_short_is_damaged_and_what_came_before_is_there(tmp_path):
    whole = json.dumps(telegram_chat(1, TELEGRAM[0]))
    (tmp_path / "a.json").write_text(whole[: whole.index("Bye")])
    (tmp_path / "b.txt").write_text("more")
    report, found = SkipReport(), b""
    for raw, _ in find_corpus([str(tmp_path)]).chunks(report):
        found += raw
    assert b"more" in found
    assert report.broken_count == 1
    assert "a.json: is damaged: not JSON" in report.broken[0]


def test_json_with_a_field_is_read_by_its_field(tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(telegram_chat(1, TELEGRAM[0][:1])))
    assert documents_in(path, text_field="messages.text") == ["Hi"]


# Signal


def lines_of(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def test_signal_with_a_document_for_each_chat(tmp_path):
    def item(chat_id, author, text, kind="standardMessage"):
        message = {"text": {"body": text}} if text is not None else {}
        return {"chatItem": {"chatId": chat_id, "authorId": author, "dateSent": "1", kind: message}}

    frames = [
        {"version": "1", "backupTimeMs": "1700000000000"},
        {"account": {"givenName": "Carla", "familyName": "Diaz"}},
        {"recipient": {"id": "1", "self": {}}},
        {"recipient": {"id": "2", "contact": {"profileGivenName": "Anna", "systemGivenName": "Anna B."}}},
        {"recipient": {"id": "3", "contact": {"e164": "49151", "nickname": {"given": "Ben"}}}},
        {"recipient": {"id": "4", "contact": {"e164": "49152"}}},
        {"chat": {"id": "7", "recipientId": "2"}},
        item("7", "2", "Hi"),
        item("8", "3", "Yo"),
        item("7", "1", "Hello\nyou"),
        item("7", "2", None, "updateMessage"),
        item("8", "4", "who?"),
    ]
    (tmp_path / "main.jsonl").write_text(lines_of(frames))
    assert documents_in(tmp_path / "main.jsonl") == [
        "Anna B.: Hi\nCarla Diaz: Hello\nyou\n",
        "Ben: Yo\n49152: who?\n",
    ]


def test_signal_export(tmp_path):
    messages = [
        {"date": "2024-01-01T10:00:00", "sender": "Anna", "body": "Hi", "quote": "", "reactions": []},
        {"date": "2024-01-01T10:00:01", "sender": "Me", "body": "", "sticker": None},
        {"date": "2024-01-01T10:00:02", "sender": "Me", "body": "Ho"},
    ]
    (tmp_path / "data.json").write_text(lines_of(messages) + "{no\n")
    report = SkipReport()
    assert documents_in(tmp_path / "data.json", report) == ["Anna: Hi\nMe: Ho\n"]
    assert report.broken[0].startswith(f"{tmp_path / 'data.json'}:4: not JSON")


# Discord and Twitter


def test_discord(tmp_path):
    text = (
        "\ufeffAuthorID,Author,Date,Content,Attachments,Reactions\n"
        '"1","Anna#1234","17-May-20 02:21 AM","Hi, ""you""","",""\n'
        '"1","Anna#1234","17-May-20 02:21 AM","","http://x.png",""\n'
        '"2","ben","2024-01-01T00:00:00","two\nlines","","👍 (1)"\n'
        '"2","ben"\n'
    )
    (tmp_path / "general.csv").write_text(text, "utf-8")
    report = SkipReport()
    assert documents_in(tmp_path / "general.csv", report) == ['Anna: Hi, "you"\nben: two\nlines\n']
    assert report.broken == [f"{tmp_path / 'general.csv'}:6: 2 fields instead of 6"]
    with pytest.raises(UserError, match="has no column 'Content'"):
        chat(tmp_path, "a,b\n1,2\n", "a.csv", input_format="discord")


def test_twitter(tmp_path, monkeypatch):
    posts = [
        {"tweet": {"full_text": "RT @a: theirs", "id": "1"}},
        {
            "tweet": {
                "full_text": "A &lt;b&gt; &amp; c https://t.co/1 https://t.co/2",
                "entities": {
                    "urls": [{"url": "https://t.co/1", "expanded_url": "https://example.org/x"}],
                    "media": [{"url": "https://t.co/2", "media_url": "http://pic"}],
                },
            }
        },
        {"tweet": {"id": "3"}},
        {"full_text": "@ben old one\nwith a line"},
    ]
    path = tmp_path / "tweets.js"
    path.write_text("window.YTD.tweets.part0 = " + json.dumps(posts, indent=2))
    for size in (40, 1 << 16):
        monkeypatch.setattr(json_formats, "READ_CHARS", size)
        report = SkipReport()
        assert documents_in(path, report) == [
            "A <b> & c https://example.org/x",
            "@ben old one\nwith a line",
        ]
        assert report.broken == [f"{path}, record 3: a post without text"]
        assert report.notes == [f"{path}: 1 repost (RT @...) left out: others wrote them"]
    (tmp_path / "like.js").write_text('window.YTD.like.part0 = [ {"like": {"fullText": "x"}} ]')
    report = SkipReport()
    assert documents_in(tmp_path / "like.js", report) == []
    assert report.notes == [
        f"{tmp_path / 'like.js'}: no posts in this part of a Twitter archive (like): left out"
    ]
    with pytest.raises(UserError, match="it is no file of a Twitter archive"):
        chat(tmp_path, "var x = 1", "a.js", input_format="twitter")


@pytest.mark.parametrize("name", ["telegram", "signal"])
def test_what_is_no_export_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="has no messages: it is no export"):
        chat(tmp_path, '{"a": 1}\n', "a.json", input_format=name)
