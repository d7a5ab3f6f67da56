from __future__ import annotations

from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from mmformer.report.html import Markup, render, section, table, tag


class Reader(HTMLParser):
    """Collects tags and text, to compare what was meant with what a browser would see."""

    def __init__(self):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def read(markup: str) -> Reader:
    reader = Reader()
    reader.feed(markup)
    reader.close()
    return reader


@given(st.text(), st.text())
def test_no_text_becomes_markup(content, value):
    reader = read(tag("p", content, title=value))
    assert [name for name, _ in reader.tags] == ["p"]
    assert reader.tags[0][1] == {"title": value}
    # A NUL and a carriage return are not kept by the standard's own rules.
    clean = content.translate({0: None, 13: None})
    assert reader.text.translate({0: None, 13: None, 0xFFFD: None}) == clean.translate({0xFFFD: None})


def test_markup_is_kept_and_nested_content_is_joined():
    inner = tag("b", "a & b")
    assert tag("p", [inner, None, ["x", 3]], class_="c", data_x=True, hidden=False) == (
        '<p class="c" data-x><b>a &amp; b</b>x3</p>'
    )
    assert render(Markup("<i>")) == "<i>"
    assert tag("img", src="a") == '<img src="a"/>'


def test_a_section_without_content_is_left_out():
    assert section("Title", None, []) == ""
    assert "<h2>Title</h2>" in section("Title", "x")


def test_numbers_of_a_table_stand_on_the_right():
    made = table(["name", "n"], [["<a>", 3]], numeric=(1,))
    assert '<td>&lt;a&gt;</td><td class="number">3</td>' in made
