"""HTML, EPUB and Word files give what a reader sees; bombs, traps and mazes are refused or harmless."""

import sys
import zipfile

import pytest
from reading import documents_in, refusal, zipped

from nanogpt.text import compressed, encoding, markup, word_lists
from nanogpt.text.documents import SkipReport

PAGE = """\
<!DOCTYPE html>
<html><head><title>Title</title><style>p { color: red }</style><script>if (a < b) { "</p>" }</script></head>
<body><nav><a href="/">Home</a></nav>
<h1>One &amp; two</h1>
<p>A   paragraph
with <b>bold</b>, <i>it&eacute;</i><sup>2</sup> and a soft\u00adhyphen.<p>Another<br>line<br><br>after it.
<ul><li>first<li>sec<b>ond</b><ul><li><p>inner</p></ul></ul>
<table><tr><th>a<th>b</tr><tr><td><p>1</p><td><p>2</p></td></tr><tr><td></td><td>3</table>
<pre>
  keep
    this</pre>
<form><input value=x><select><option>o</select><textarea>t</textarea><button>Go</button></form>
<p hidden>hidden</p><div style="margin: 0; Display : None">too<br></div>
<div>block<div>in a block</div>end</div><svg><text>z</text></svg><template>x</template>
<ruby>漢<rt>kan</rt></ruby></body></html>
"""

PAGE_TEXT = """\
One & two

A paragraph with bold, ité2 and a softhyphen.

Another
line

after it.

- first
- second

- inner

a\tb
1\t2
3

  keep
    this

block
in a block
end
漢"""


def html_of(path, raw, **settings):
    path.write_bytes(raw)
    return documents_in(path, **settings)


@pytest.mark.parametrize("size", [1, 100, 1 << 16])
def test_a_page_as_a_reader_sees_it(tmp_path, monkeypatch, size):
    monkeypatch.setattr(markup, "READ_BYTES", size)
    report = SkipReport()
    assert html_of(tmp_path / "a.html", PAGE.encode(), report=report) == [PAGE_TEXT]
    assert report.reading_notes("text") == (
        f"{tmp_path / 'a.html'}: read as HTML (--input_format text: as plain text, as it is)",
    )
    assert html_of(tmp_path / "a.html", PAGE.encode(), input_format="text") == [PAGE]


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ('<meta charset="koi8-r"><p>Привет'.encode("koi8-r"), "Привет"),
        (b'<?xml version="1.0" encoding="iso-8859-1"?><html><p>\xfc', "ü"),
        ('<meta charset="latin-1"><p>ü'.encode(), "ü"),  # the page is wrong
        ("<p>ü → €".encode("utf-16"), "ü → €"),
        (b"<p>Stra\xdfe und Gr\xfc\xdfe, sch\xf6ne T\xe4ler", "Straße und Grüße, schöne Täler"),
        (b'<meta charset="no-such-thing"><p>Stra\xdfe und Gr\xfc\xdfe', "Straße und Grüße"),
    ],
)
def test_the_encoding_of_a_page(tmp_path, raw, text):
    assert html_of(tmp_path / "a.htm", raw) == [text]


def test_a_page_without_its_suffix_is_recognized_or_said(tmp_path):
    raw = b"<!-- saved -->\n<!doctype HTML><p>text"
    assert html_of(tmp_path / "page", raw) == ["text"]
    report = SkipReport()
    assert html_of(tmp_path / "page.txt", raw, report=report) == [raw.decode()]
    assert (
        "looks like HTML: read as it is (--input_format html reads its text alone)"
        in report.reading_notes("text")[0]
    )
    assert html_of(tmp_path / "page.txt", raw, input_format="html") == ["text"]
    for start, says in (("<?xml version='1.0'?><a/>", "looks like XML"), ("{\\rtf1 x}", "looks like RTF")):
        report = SkipReport()
        assert html_of(tmp_path / "x.txt", start.encode(), report=report) == [start]
        assert says in report.reading_notes("text")[0]


def test_mazes_of_tags_and_bombs_of_entities_are_harmless(tmp_path):
    deep = b"<div>" * 100_000 + b"deep" + b"</div>" * 100_000
    assert html_of(tmp_path / "a.html", deep) == ["deep"]
    assert html_of(tmp_path / "a.html", b"<b><table><i>" * 3000 + b"deep") == ["deep"]
    entities = b'<!DOCTYPE html [<!ENTITY a "boom"><!ENTITY b "&a;&a;">]><html><p>&b;</p>'
    assert "boom" not in html_of(tmp_path / "a.html", entities)[0]
    assert "is not a text file" in refusal(tmp_path / "a.html", b"<p>\0")
    comments = b"<!-- -->" * 5000  # not one way too many to match them
    assert html_of(tmp_path / "a.txt", comments) == [comments.decode()]
    assert html_of(tmp_path / "a.html", b"") == []
    assert html_of(tmp_path / "a.html", b"<script>x</script>") == []


def test_a_page_needs_its_library_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lxml", None)
    message = refusal(tmp_path / "a.html", b"<p>x")
    assert message == (
        f"--input_file {tmp_path / 'a.html'} needs the package lxml: pip install nanogpt[documents]"
    )


# EPUB

CONTAINER = (
    '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles><rootfile '
    'full-path="OEBPS/book.opf" media-type="application/oebps-package+xml"/></rootfiles></container>'
)

CONTENTS = (
    '<!DOCTYPE package PUBLIC "x" "http://127.0.0.1:9/x.dtd"><package xmlns="http://www.idpf.org/2007/opf"><manifest>'
    '<item id="n" href="nav.xhtml" media-type="application/xhtml+xml" properties="nav"/>'
    '<item id="2" href="text/two%20b.xhtml" media-type="application/xhtml+xml"/>'
    '<item id="1" href="../one.xhtml#start" media-type="application/xhtml+xml"/>'
    '<item id="p" href="p.png" media-type="image/png"/>'
    '</manifest><spine><itemref idref="n"/><itemref idref="1"/><itemref idref="p"/><itemref idref="2"/>'
    '<itemref idref="none"/></spine></package>'
)

BOOK = {
    "mimetype": "application/epub+zip",
    "META-INF/container.xml": CONTAINER,
    "OEBPS/book.opf": CONTENTS,
    "OEBPS/nav.xhtml": "<html><body><p>Contents</p></body></html>",
    "OEBPS/text/two b.xhtml": '<?xml version="1.0"?><html><body><h2>Two</h2><p>the end&nbsp;…</p></html>',
    "one.xhtml": "<html><head><title>t</title></head><body><h2>One</h2><p>It begins.</p></body></html>",
    "OEBPS/p.png": "no text",
}


def test_a_book_has_its_chapters_in_reading_order(tmp_path):
    (tmp_path / "a.epub").write_bytes(zipped(BOOK.items()))
    assert documents_in(tmp_path / "a.epub") == ["One\n\nIt begins.\n\nTwo\n\nthe end\xa0…"]
    outer = zipped([("books/a.epub", zipped(BOOK.items())), ("b.txt", "more")])
    (tmp_path / "a.zip").write_bytes(outer)
    assert documents_in(tmp_path / "a.zip") == ["One\n\nIt begins.\n\nTwo\n\nthe end\xa0…", "more"]


def test_a_broken_or_locked_book(tmp_path):
    path = tmp_path / "a.epub"
    report = SkipReport()
    path.write_bytes(zipped((name, text) for name, text in BOOK.items() if name != "one.xhtml"))
    assert documents_in(path, report) == ["Two\n\nthe end\xa0…"]
    assert report.broken == [f"{path}/one.xhtml: a chapter that is not in the book"]
    outside = BOOK | {"OEBPS/book.opf": CONTENTS.replace("../one.xhtml#start", "../../../../etc/passwd")}
    path.write_bytes(zipped(outside.items()))
    report = SkipReport()
    assert documents_in(path, report) == ["Two\n\nthe end\xa0…"]
    assert report.broken == [f"{path}/../../../etc/passwd: a chapter that is not in the book"]
    repeated = BOOK | {
        "OEBPS/book.opf": CONTENTS.replace("</spine>", '<itemref idref="2"/>' * 1000 + "</spine>")
    }
    path.write_bytes(zipped(repeated.items()))
    assert documents_in(path) == ["One\n\nIt begins.\n\nTwo\n\nthe end\xa0…"]
    locked = '<encryption><CipherReference URI="OEBPS/text/two%20b.xhtml"/></encryption>'
    path.write_bytes(zipped((BOOK | {"META-INF/encryption.xml": locked}).items()))
    assert refusal(path).endswith("is encrypted (DRM): its text cannot be read")
    path.write_bytes(zipped([("a", "b")]))
    assert "has no part META-INF/container.xml" in refusal(path)
    assert "is damaged" in refusal(path, b"no zip")


# Word

WORD_NAMES = (
    'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main" '
    'xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"'
)


def run(text):
    return f'<w:r><w:t xml:space="preserve">{text}</w:t></w:r>'


def paragraph(inner):
    return f"<w:p><w:pPr><w:tabs><w:tab/></w:tabs></w:pPr>{inner}</w:p>"


def cell(*texts):
    return "<w:tc>" + "".join(paragraph(run(text)) for text in texts) + "</w:tc>"


BOX = paragraph(run("box"))
WORD = (
    f"<w:document {WORD_NAMES}><w:body>"
    + paragraph(run("Title ") + run("&amp; more"))
    + paragraph(
        f"<w:ins>{run('in')}</w:ins><w:del><w:r><w:delText>out</w:delText></w:r></w:del>"
        "<w:sdt><w:sdtContent><w:r><w:tab/><w:t>field</w:t><w:br/><w:t>line</w:t></w:r></w:sdtContent></w:sdt>"
    )
    + f"<w:tbl><w:tr>{cell('a')}{cell('b')}</w:tr><w:tr>{cell('c', 'd')}</w:tr></w:tbl>"
    + paragraph(
        f"<w:hyperlink>{run('link')}</w:hyperlink><w:r><w:instrText>PAGE</w:instrText></w:r><mc:AlternateContent>"
        f"<mc:Choice>{BOX}</mc:Choice><mc:Fallback>{BOX}</mc:Fallback></mc:AlternateContent>"
    )
    + f"<w:moveFrom>{run('moved')}</w:moveFrom></w:body></w:document>"
)

NOTES = f"<w:footnotes {WORD_NAMES}><w:footnote>{paragraph(run('A note.'))}</w:footnote></w:footnotes>"

RELATIONS = (
    '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships"><Relationship '
    'Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument" '
    'Target="word/document2.xml"/></Relationships>'
)

WORD_FILE = {"_rels/.rels": RELATIONS, "word/document2.xml": WORD, "word/footnotes.xml": NOTES}


def test_a_word_file(tmp_path):
    path = tmp_path / "a.docx"
    path.write_bytes(zipped(WORD_FILE.items()))
    text = "Title & more\nin\tfield\nline\n\na\tb\nc\nd\n\nlink\nbox\nA note."
    assert documents_in(path) == [text]


def listed(text, number=None, level=0, style=None):
    """A paragraph of a list: by its number, by its style, or both."""
    name = "" if style is None else f'<w:pStyle w:val="{style}"/>'
    of = "" if number is None else f'<w:numPr><w:ilvl w:val="{level}"/><w:numId w:val="{number}"/></w:numPr>'
    return (
        f"<w:p><w:pPr>{name}{of}<w:pPrChange><w:pPr/></w:pPrChange></w:pPr>{run(text) if text else ''}</w:p>"
    )


def level_of(number, form, text, start=1):
    """A level in numbering.xml."""
    return (
        f'<w:lvl w:ilvl="{number}"><w:start w:val="{start}"/><w:numFmt w:val="{form}"/>'
        f'<w:lvlText w:val="{text}"/></w:lvl>'
    )


NUMBERING = (
    f"<w:numbering {WORD_NAMES}>"
    '<w:abstractNum w:abstractNumId="0">'
    + level_of(0, "decimal", "%1.")
    + level_of(1, "lowerLetter", "%2)")
    + level_of(2, "decimalZero", "%1.%2.%3")
    + '</w:abstractNum><w:abstractNum w:abstractNumId="1">'
    + level_of(0, "bullet", "\uf0b7")
    + '</w:abstractNum><w:abstractNum w:abstractNumId="2">'
    + level_of(0, "upperRoman", "Part %1:", start=9)
    + level_of(1, "none", "%2")
    + "</w:abstractNum>"
    + "".join(
        f'<w:num w:numId="{number}"><w:abstractNumId w:val="{of}"/>{more}</w:num>'
        for number, of, more in (
            (1, 0, ""),
            (2, 1, ""),
            (3, 2, ""),
            (4, 0, '<w:lvlOverride w:ilvl="0"><w:startOverride w:val="5"/></w:lvlOverride>'),
        )
    )
    + "</w:numbering>"
)

STYLES = (
    f'<w:styles {WORD_NAMES}><w:style w:styleId="Dots"><w:pPr><w:numPr><w:numId w:val="2"/></w:numPr></w:pPr>'
    '</w:style><w:style w:styleId="Small"><w:basedOn w:val="Dots"/></w:style></w:styles>'
)


def test_the_lists_of_a_word_file(tmp_path):
    """Bullets and numbers are no text in the file: they follow from the lists."""
    paragraphs = [
        *(listed("one", 1), listed("sub", 1, 1), listed("sub", 1, 1), listed("deep", 1, 2), listed("two", 1)),
        *(listed("sub", 1, 1), listed("", 1), paragraph(run("plain")), listed("four", 1)),
        *(listed("dot", style="Dots"), listed("dot", style="Small"), listed("no dot", 0, style="Small")),
        *(listed("nine", 3), listed("bare", 3, 1), listed("ten", 3), listed("on", 4), listed("on", 4)),
        *(listed("still", 1), listed("unknown", 77), listed("no style", style="None")),
    ]
    document = f"<w:document {WORD_NAMES}><w:body>{''.join(paragraphs)}</w:body></w:document>"
    package = WORD_FILE | {"word/numbering.xml": NUMBERING, "word/styles.xml": STYLES}
    del package["word/footnotes.xml"]
    (tmp_path / "a.docx").write_bytes(zipped((package | {"word/document2.xml": document}).items()))
    (text,) = documents_in(tmp_path / "a.docx")
    assert text.splitlines() == [
        *("1. one", "a) sub", "b) sub", "1.b.1 deep", "2. two", "a) sub", "plain", "4. four"),
        *("- dot", "- dot", "no dot", "Part IX: nine", "bare", "Part X: ten", "5. on", "6. on", "7. still"),
        *("unknown", "no style"),
    ]


def test_the_numbers_of_lists_are_bounded(tmp_path):
    """Numbers in letters and a marker can be made as long as one likes."""
    forms = {"lowerLetter": ["z", "aa", "123456"], "upperRoman": ["XXVI", "XXVII", "123456"]}
    for form, expected in forms.items():
        assert [word_lists.written(number, form) for number in (26, 27, 123456)] == expected
    lists = word_lists.WordLists()
    for tag, values in (
        ("abstractNum", {"abstractNumId": "0"}),
        *(("lvl", {"ilvl": "0"}), ("start", {"val": "9" * 5000}), ("lvlText", {"val": "%1" * 10_000})),
        *(("num", {"numId": "1"}), ("abstractNumId", {"val": "0"})),
    ):
        lists.start(tag, values)
    assert lists.marker({"numId": "1"}) == "1" * 16 + " "
    assert lists.marker({"numId": "1", "ilvl": "\u00b2"}) == "2" * 16 + " "


def test_a_hostile_package_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.docx"
    bomb = '<!DOCTYPE x [<!ENTITY a "boom"><!ENTITY b "&a;&a;">]>' + WORD.replace("link", "&b;")
    path.write_bytes(zipped((WORD_FILE | {"word/document2.xml": bomb}).items()))
    assert refusal(path).endswith("declares XML entities: refused, as a possible bomb")
    file = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>' + WORD.replace("link", "&a;")
    path.write_bytes(zipped((WORD_FILE | {"word/document2.xml": file}).items()))
    assert refusal(path).endswith("declares XML entities: refused, as a possible bomb")
    path.write_bytes(zipped((WORD_FILE | {"word/document2.xml": WORD[:200]}).items()))
    assert "is damaged: unclosed token" in refusal(path)
    assert "is an old .doc file, or has a password" in refusal(path, b"\xd0\xcf\x11\xe0" + bytes(1000))
    assert "has no text: it is no Word file" in refusal(path, zipped([("_rels/.rels", "<a/>")]))
    deep = "<w:p xmlns:w='w'>" * 50_000 + "</w:p>" * 50_000
    path.write_bytes(zipped((WORD_FILE | {"word/document2.xml": deep}).items()))
    assert documents_in(path) == ["A note."]
    monkeypatch.setattr(compressed, "BOMB_BYTES", 1 << 16)
    path.write_bytes(zipped((WORD_FILE | {"word/document2.xml": WORD + " " * (1 << 20)}).items()))
    assert refusal(path).endswith("expands to more than 200 times its size: refused, as a decompression bomb")


def test_a_package_that_lies_about_its_sizes_is_damaged(tmp_path):
    raw = bytearray(zipped((WORD_FILE | {"word/document2.xml": WORD}).items(), zipfile.ZIP_STORED))
    size = len(WORD.encode()).to_bytes(4, "little")
    start = raw.rindex(size)
    raw[start : start + 4] = (10).to_bytes(4, "little")
    (tmp_path / "a.docx").write_bytes(raw)
    assert "is damaged" in refusal(tmp_path / "a.docx")


def test_tags_come_in_pairs_whatever_the_page():
    """What is left out is counted by depth: each start has its end."""
    pages = [
        "<p><script>x<p>y",
        "<nav><p>a</nav>b",
        "<svg><p>c</svg>d",
        "</nav>e",
        "<select><option>f<p>g",
        "<head>h<p>i",
    ]
    texts = ["".join(markup.html_text([page + "<div>end"])) for page in pages]
    assert [text.endswith("end") for text in texts] == [False, True, True, True, False, True]


def test_only_encodings_of_text_are_encodings():
    assert encoding.is_encoding("utf-8")
    assert not any(map(encoding.is_encoding, ("rot13", "no-such", "idna", "unicode_escape", "hex", "a\0b")))
