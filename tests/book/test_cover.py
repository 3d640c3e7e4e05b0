"""The cover in nbs/images is what the book draws. `make cover` draws it again."""

import io
from pathlib import Path

import matplotlib

matplotlib.use("svg")
COVER = Path(__file__).resolve().parents[2] / "nbs" / "images" / "cover.svg"


def drawn() -> str:
    from mha_book.figures import cover

    file = io.StringIO()
    cover().savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def test_the_cover_is_what_the_book_draws():
    assert COVER.read_text(encoding="utf8") == drawn()


def test_drawing_is_repeatable():
    assert drawn() == drawn()
