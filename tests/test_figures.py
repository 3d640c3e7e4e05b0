"""The tables of the book: what they show, how they are read aloud, and what makes none."""

from html.parser import HTMLParser

import pytest

from mha_book.figures import table
from support.refusals import refused

ROWS = [
    {"layer": "3 heads of `16`", "weights": 9216, "time (ms)": 0.51239, "exact": True},
    {"layer": "1 head & <b>no</b> more", "weights": None, "time (ms)": float("nan"), "exact": False},
]


class Cells(HTMLParser):
    "The cells of a table with their attributes, and the text of each."

    def __init__(self, html: str):
        super().__init__()
        self.cells, self.rows, self.box, self.caption = [], [], {}, ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        if tag in ("td", "th", "caption"):
            self.cells.append([tag, dict(attributes), ""])
        elif tag == "tr":
            self.rows.append(dict(attributes))
        elif tag == "div":
            self.box = dict(attributes)

    def handle_data(self, text):
        self.cells[-1][2] += text


def test_a_table_shows_its_values_and_is_read_aloud():
    seen = Cells(table(ROWS, caption="Two `layers`", mark=[1], formats={"time (ms)": ".2f"})._repr_html_())
    (caption, *head), first, second = seen.cells[:5], seen.cells[5:9], seen.cells[9:]
    assert caption[2] == "Two layers" and seen.box["aria-label"] == "Two `layers`" and seen.box["tabindex"] == "0"
    assert [cell[2] for cell in head] == list(ROWS[0]) and all(cell[1]["scope"] == "col" for cell in head)
    assert [cell[2] for cell in first] == ["3 heads of 16", "9,216", "0.51", "yes"]
    assert [cell[2] for cell in second] == ["1 head & <b>no</b> more", "–", "NaN", "no"]
    assert all(row[0][1]["scope"] == "row" for row in (first, second))
    assert [cell[1]["class"] for cell in first] == ["text", "number", "number", "text"]
    assert seen.rows == [{}, {}, {"class": "marked"}]


def test_numbers_without_a_format_show_three_digits():
    rows = [{"a": 1.23456, "b": 12}, {"a": float("inf"), "b": 1}, {"a": float("-inf"), "b": 1}]
    seen = Cells(table(rows, caption="c", formats={})._repr_html_()).cells
    assert [cell[2] for cell in seen[3:]] == ["1.23", "12", "∞", "1", "−∞", "1"]


@pytest.mark.parametrize(
    "rows, options, words",
    [
        ([], {}, ("rows", "empty")),
        ([{"a": 1}, {"b": 1}], {}, ("columns differ", "'a'", "'b'")),
        ([{"a": 1, "b": 2}, {"b": 1, "a": 2}], {}, ("columns differ",)),
        ([{"a": 1}], {"formats": {"b": ".2f"}}, ("formats", "'b'", "'a'")),
        ([{"a": 1}], {"mark": [1]}, ("mark", "[1]", "there are 1")),
        ([{"a": 1}], {"mark": [-1]}, ("mark", "[-1]")),
    ],
)
def test_what_makes_no_table_is_refused(own_messages, rows, options, words):
    with refused(ValueError, *words):
        table(rows, caption="c", **options)
