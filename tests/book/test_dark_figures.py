"""Figures for dark pages: which colours change, which stay, and that a page carries both drawings."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "_ext"))
import dark_figures as dark  # noqa: E402

from mha_book.figures import HEAD_COLORS, LINE_COLORS, head_color, ink  # noqa: E402


@pytest.mark.parametrize("one, other, ratio", [("#000000", "#ffffff", 21), ("#777777", "#ffffff", 4.48)])
def test_contrast_is_that_of_wcag(one, other, ratio):
    assert dark.contrast(one, other) == pytest.approx(ratio, abs=0.01) == dark.contrast(other, one)


@pytest.mark.parametrize("colour", [*HEAD_COLORS, *LINE_COLORS])
def test_a_colour_is_seen_on_both_grounds(colour):
    assert dark.contrast(colour, "#ffffff") >= 3
    assert dark.contrast(dark.in_the_dark(colour), dark.GROUND) >= 3


@pytest.mark.parametrize("colour", HEAD_COLORS)
def test_a_head_keeps_its_colour_in_the_dark(colour):
    assert dark.in_the_dark(colour) == colour.lower()


def test_nine_heads_have_nine_colours():
    assert len({head_color(head) for head in range(9)}) == 9 and head_color(9) == head_color(0)


@pytest.mark.parametrize(
    "light, shown",
    [("#ffffff", dark.GROUND), ("#000000", dark.INK), ("#010101", "#010101"), ("#FEFEFE", "#fefefe")],
)
def test_greys_change_places_and_ink_on_colours_stays(light, shown):
    assert dark.in_the_dark(light) == shown


@pytest.mark.parametrize("ground", [*HEAD_COLORS, *LINE_COLORS, "#F6D7A7", "#FFFFFF", "#1B1035"])
def test_ink_is_read_on_its_ground(ground):
    assert dark.contrast(ink(ground), ground) >= 3.4
    assert dark.in_the_dark(ink(ground)) == ink(ground).lower()


SVG = '<svg width="9"><path style="fill: #ffffff; stroke: #0072b2"/><g><use/></g><text fill="#000000">a</text></svg>'


def test_a_twin_is_the_same_drawing_in_other_ink():
    twin = dark.dark_twin(SVG)
    assert re.findall(r"#[0-9a-f]{6}", twin) == [dark.INK, dark.GROUND, "#0072b2", dark.INK]
    assert re.sub(r"#[0-9a-f]{6}", "", twin.replace(f' fill="{dark.INK}"', "", 1)) == re.sub(r"#[0-9a-f]{6}", "", SVG)


def test_a_page_carries_both_drawings():
    page = '<p><img alt="a" src="../_images/a.svg" /><img class="b" src="_images/b.svg"><img src="_images/c.png"></p>'
    context = {"body": page}
    dark.show_both(None, "page", "page.html", context, None)
    tags = re.findall(r"<img[^>]*>", context["body"])
    assert [re.search(r'src="([^"]*)"', tag)[1].split("/")[-1] for tag in tags] == [
        "a.svg", "a.dark.svg", "b.svg", "b.dark.svg", "c.png"
    ]  # fmt: skip
    assert [re.findall("only-(?:light|dark)", tag) for tag in tags] == [
        ["only-light"], ["only-dark"], ["only-light"], ["only-dark"], []
    ]  # fmt: skip


def test_twins_are_drawn_once(tmp_path):
    (tmp_path / "_images").mkdir()
    (tmp_path / "_images/a.svg").write_text(SVG)
    for _ in range(2):
        dark.draw_twins(SimpleNamespace(outdir=tmp_path), None)
    assert sorted(p.name for p in (tmp_path / "_images").iterdir()) == ["a.dark.svg", "a.svg"]
    assert (tmp_path / "_images/a.dark.svg").read_text() == dark.dark_twin(SVG)
