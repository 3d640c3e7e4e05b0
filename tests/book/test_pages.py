"""The order of the pages: the sidebar's, the letters that pages show, and where each one sends its reader next."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from docutils import nodes
from sphinx import addnodes

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "_ext"))
import book_pages  # noqa: E402

NEXT = re.compile(r"^\*\*Next:\*\*.*", re.M)
LINK = re.compile(r"\]\(([\w./-]+?)(?:\.(?:md|ipynb))?(?:#[\w-]*)?\)")


def pages(toc: dict) -> list[str]:
    "All pages but the first in the order of the sidebar."

    def flat(entries):
        for entry in entries:
            yield entry["file"]
            yield from flat(entry.get("sections", []))

    return [page for part in toc["parts"] for page in flat(part["chapters"])]


def prose(path: Path) -> str:
    "The text of a page: a notebook's markdown, or the whole file."
    if path.suffix == ".md":
        return path.read_text(encoding="utf8")
    cells = json.loads(path.read_text(encoding="utf8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def is_chapter(page: str) -> bool:
    "Whether a page has a chapter's number; from 90 on stand helpers."
    match = book_pages.CHAPTER.match(page)
    return bool(match) and int(match[1]) < 90


def wrong_next(order: list[str], texts: dict[str, str]) -> dict[str, str]:
    "Page -> what is wrong with its `Next` line: all chapters but the last have one, and it names the page after."
    chapters, faults = [page for page in order if is_chapter(page)], {}
    for page, following in zip(order, [*order[1:], None]):
        line, last = NEXT.search(texts[page]), page == (chapters or [None])[-1]
        target = LINK.search(line[0]) if line else None
        if line and (target is None or target[1] != following):
            faults[page] = f"links to {target and target[1]}, before {following}"
        elif not line and is_chapter(page) and not last:
            faults[page] = "has no Next line"
    return faults


TOC = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf8"))
FILES = {path.stem: path for path in [*(ROOT / "nbs").glob("*.md"), *(ROOT / "nbs").glob("*.ipynb")]}


def test_every_page_sends_its_reader_to_the_page_that_follows_in_the_sidebar():
    order = pages(TOC)
    assert wrong_next(order, {page: prose(FILES[page]) for page in order}) == {}


@pytest.mark.parametrize(
    "text, caught",
    [
        ("**Next:** [b](02_b)", False),
        ("**Next:** [b](02_b) and later [c](03_c)", False),
        ("text\n\n**Next:** it is [b](02_b.ipynb#there)", False),
        ("**Next:** [c](03_c), and [b](02_b)", True),
        ("**Next:** b", True),
        ("no line", True),
    ],
)
def test_a_wrong_next_line_is_seen(text, caught):
    order = ["01_a", "02_b", "03_c", "run"]
    texts = {"01_a": text, "02_b": "**Next:** [c](03_c)", "03_c": "the end", "run": ""}
    assert list(wrong_next(order, texts)) == (["01_a"] if caught else [])
    assert "03_c" in wrong_next(["03_c"], {"03_c": "**Next:** [b](02_b)"})


def test_chapters_stand_in_the_order_of_their_files():
    chapters = [page for page in pages(TOC) if is_chapter(page)]
    assert chapters == sorted(chapters)
    assert len(set(chapters)) == len(chapters) > 20


def test_pages_inside_pages_are_found():
    toc = {"parts": [{"chapters": [{"file": "a", "sections": [{"file": "b"}]}]}, {"chapters": [{"file": "c"}]}]}
    assert pages(toc) == ["a", "b", "c"]


ORDER = ["index", "03a_cut", "03b_layer", "07_ways", "12_floats", "91_testing", "api_heads"]


@pytest.mark.parametrize(
    "page, shown",
    [
        ("03a_cut", "1a. Title"),
        ("03b_layer", "1b. Title"),
        ("07_ways", "2. Title"),
        ("12_floats", "3. Title"),
        ("91_testing", "Title"),
        ("api_heads", "Title"),
    ],
)
def test_chapters_are_numbered_without_gaps_and_with_the_letters_of_their_files(page, shown):
    title = nodes.title("", "Title")
    book_pages.number_chapter(app_of(page), nodes.section("", title))
    assert title.astext() == shown


def app_of(page: str) -> SimpleNamespace:
    return SimpleNamespace(env=SimpleNamespace(docname=page, external_site_map=ORDER))


@pytest.mark.parametrize(
    "text, target, shown",
    [
        ("chapter 12", "12_floats", "chapter 3"),
        ("Chapter 3", "03b_layer#there", "Chapter 1b"),
        ("3a", "03a_cut.ipynb", "1a"),
        ("the 12 floats", "12_floats", "the 12 floats"),
        ("chapter 12", "status", "chapter 12"),
    ],
)
def test_links_to_chapters_show_the_same_number(text, target, shown):
    link = addnodes.pending_xref("", nodes.inline("", text), reftarget=target)
    book_pages.number_chapter(app_of("index"), nodes.section("", nodes.paragraph("", "", link)))
    assert link.astext() == shown


def test_no_page_names_a_chapter_by_a_number_of_its_own():
    """Numbers in links are filled in when the book is built; others would go stale."""
    loose = re.compile(r"(?<!\[)\b[Cc]hapters? \d")
    assert {page: loose.findall(prose(FILES[page])) for page in pages(TOC) if loose.search(prose(FILES[page]))} == {}


def test_pages_of_one_number_all_have_letters():
    numbers = {}
    for page in filter(is_chapter, pages(TOC)):
        number, letter = book_pages.CHAPTER.match(page).groups()
        numbers.setdefault(number, []).append(letter)
    shared = {number: letters for number, letters in numbers.items() if len(letters) > 1}
    assert all(letters == list("abcdefg"[: len(letters)]) for letters in shared.values())
    assert shared


def cell_of_a_proof(*outputs: str) -> nodes.container:
    "A proof's cell as the book's reader makes it, each output in two forms."
    code = nodes.literal_block("", 'assert 1\n__import__("page_stamp").proved()')
    cell = nodes.container("", nodes.container("", code, nb_element="cell_code_source"), classes=["cell", "tag_proof"])
    held = nodes.container(nb_element="cell_code_output")
    for html in outputs:
        forms = [nodes.container("", node) for node in (nodes.literal_block("", "text"), nodes.raw("", html))]
        held += nodes.container("", *forms, nb_element="mime_bundle")
    cell += held
    cell["prompt_show"] = "one is one"
    return nodes.section("", cell)


@pytest.mark.parametrize(
    "outputs, says, left",
    [
        (['<span class="proof-ran"></span>'], "Proved here: one is one", 0),
        (["<table></table>", '<span class="proof-ran"></span>'], "Proved here: one is one", 1),
        (["<table></table>"], "Not run, so not proved: one is one", 1),
        ([], "Not run, so not proved: one is one", 0),
    ],
)
def test_only_a_proof_that_ran_is_called_one(outputs, says, left):
    page = cell_of_a_proof(*outputs)
    book_pages.state_proofs(None, page)
    cell = page.children[0]
    assert cell["prompt_show"] == cell["prompt_hide"] == says
    assert len([node for node in cell.findall(nodes.container) if node.get("nb_element") == "mime_bundle"]) == left
    assert next(cell.findall(nodes.literal_block)).astext() == "assert 1"
    assert ("proved" in cell["classes"]) == says.startswith("Proved") != ("unproved" in cell["classes"])


def test_the_first_page_tells_what_the_page_of_the_wrong_cut_asserts():
    counts = re.search(
        r"== \[(\d+), (\d+), (\d+)\]", (ROOT / "nbs/21_pretrained.ipynb").read_text(encoding="utf8")
    ).groups()
    told = re.search(r"of (\d+) sentences \1 times.*finds (\d+)\. .*finds (\d+):", prose(FILES["index"]))
    assert told and told.groups() == counts
