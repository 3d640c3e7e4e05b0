"""The reference that is made from the package's source: what is read there, and that every public name is all there."""

import functools
import re
import sys
from pathlib import Path

import pytest

import mha_book
from support.built_book import HTML, needs_book

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "_ext"))
import api_reference  # noqa: E402
import api_source  # noqa: E402

PACKAGE = api_source.Package(ROOT / "mha_book")
PUBLIC = [PACKAGE.homes[name] for name in sorted(PACKAGE.homes)]


def entry(source: str) -> api_source.Entry:
    "The only entry of a small module."
    (found,) = api_source.read_module(source, "heads.small")
    return found


def meanings(source: str) -> dict[str, str]:
    "The parameters of the only entry, with their comments."
    return {param.name: param.meaning for param in entry(source).params if param.name}


# Comments


@pytest.mark.parametrize(
    "source, expected",
    [
        ("def f(\n    a: int,    # first\n    b: int,    # second\n): ...", {"a": "first", "b": "second"}),
        ("def f(\n    # first\n    a: int,\n    b: int,    # second\n): ...", {"a": "first", "b": "second"}),
        (
            "def f(\n    a: int,    # first,\n               # and more\n    b: int,\n): ...",
            {"a": "first, and more", "b": ""},
        ),
        ("def f(\n    # all as there\n    a: int, b: int,\n    c: int,\n): ...", dict.fromkeys("abc", "all as there")),
        ("def f(\n    # not all\n    a: int,\n    c: int,\n): ...", {"a": "not all", "c": ""}),
        ("def f(\n    a: int = (    # first\n        3),\n): ...", {"a": "first"}),
        (
            "def f(\n    *rest: int,    # others\n    b: int = 1,    # with a name\n): ...",
            {"rest": "others", "b": "with a name"},
        ),
        ("class C:\n    def __init__(\n        self,\n        a: int,    # first\n    ): ...", {"a": "first"}),
        (
            "class C:\n    # above\n    a: int\n    b: int = 3   # behind\n    _c: int = 4   # hidden",
            {"a": "above", "b": "behind"},
        ),
        ("def f(a: int):    # of the function\n    ...", {"a": "of the function"}),
        ("# %% where the cell comes from\ndef f(a: int):\n    ...", {"a": ""}),
        ("def f(\n    a: int,\n) -> int:    # what comes out\n    ...", {"a": ""}),
        ("def f(\n    device=None, dtype=None,\n): ...", api_source.COMMON),
        ('def f(\n    a: str = "# no comment",\n): ...', {"a": ""}),
    ],
)
def test_a_comment_belongs_to_the_parameter_beside_or_below_it(source, expected):
    assert meanings(source) == expected


def test_the_comment_behind_the_arrow_says_what_is_returned():
    returns = entry("def f(\n    a: int,    # in\n) -> int:    # out\n    ...").returns
    assert (returns.meaning, api_source.shape_text(returns.annotation)) == ("out", "int")
    assert entry("def f(\n    a: int,    # in\n) -> int:\n    ...").returns.meaning == ""


def test_where_a_comment_only_points_the_meaning_is_found_there():
    weights = PACKAGE.homes["attention_weights"]
    param = next(p for p in weights.params if p.name == "is_causal")
    assert param.meaning.startswith("all options as in `attention`")
    there = next(p for p in PACKAGE.homes["attention"].params if p.name == "is_causal")
    assert PACKAGE.meaning(param, weights) == there.meaning != param.meaning


# Where a name comes from


MARKED = """
# %% ../../nbs/01_one.ipynb #cut-1
def f(): "F."

# %% ../../nbs/01_one.ipynb #b
class C:
    "C."
    def m(self): "M."
"""


def test_the_line_before_a_definition_names_its_cell():
    f, c = api_source.read_module(MARKED, "heads.one")
    assert [(x.page, x.cell) for x in (f, c, *c.members)] == [("01_one", "cut-1"), ("01_one", "b"), ("01_one", "b")]


def test_a_plain_module_has_entries_and_no_chapter():
    found = api_source.read_module(re.sub(r"# %%.*", "", MARKED), "bench.one")
    assert [(x.name, x.page, x.cell) for x in found] == [("f", None, None), ("C", None, None)]


def test_private_names_and_names_that_all_leaves_out_have_no_entry():
    source = 'def f(): "F."\ndef g(): "G."\ndef _h(): "H."\n'
    assert [x.name for x in api_source.read_module(source, "m")] == ["f", "g"]
    assert [x.name for x in api_source.read_module('__all__ = ["g", "_h"]\n' + source, "m")] == ["g"]


# In words


@pytest.mark.parametrize(
    "annotation, expected",
    [
        ("Float[Tensor, 'b h n d']", "Float b h n d"),
        ("Bool[Tensor, '...'] | None", "Bool tensor | None"),
        ("tuple[Float[Tensor, 'b n'], Int[Tensor, 'b']]", "tuple[Float b n, Int b]"),
        ("dict[str, Tensor]", "dict[str, Tensor]"),
        ("Literal['q', 'k']", "Literal['q', 'k']"),
    ],
)
def test_arrays_are_written_by_their_axes(annotation, expected):
    assert api_source.shape_text(api_source.ast.parse(annotation, mode="eval").body) == expected


def test_a_docstring_falls_into_prose_errors_and_papers():
    doc = "What it does, e.g. this.\n\nMore. Raises ValueError for x.\nSource: A 2020, arXiv 1; B 2021."
    parts = api_source.split_doc(doc)
    assert parts == {
        "prose": ["What it does, e.g. this.", "More."],
        "Raises": ["ValueError for x."],
        "Source": ["A 2020, arXiv 1; B 2021."],
    }
    assert api_source.split_doc("It never Raises its voice.")["Raises"] == []


def test_groups_are_the_comments_of_the_list():
    source = '__all__ = []\nx = "a"\n__all__ = [\n    # One\n    "a", "b",\n    # Two `x`\n    "c",\n]\n'
    groups = [(group.title, group.names) for group in api_source.read_groups(source)]
    assert groups == [("One", ["a", "b"]), ("Two `x`", ["c"])]


# Every public name


def lacking(found: api_source.Entry, package=PACKAGE) -> list[str]:
    "What an entry leaves unsaid: itself, its page, or a parameter."
    faults = [] if found.doc else ["a docstring"]
    notebook = ROOT / "nbs" / f"{found.page}.ipynb"
    faults += (
        [] if found.page and notebook.exists() and f'"id": "{found.cell}"' in notebook.read_text() else ["a chapter"]
    )
    return faults + [param.name for param in found.params if param.name and not package.meaning(param, found)]


def test_every_public_name_stands_in_a_group_and_has_an_entry():
    assert sorted(PACKAGE.homes) == sorted(mha_book.__all__)
    assert all(group.title for group in PACKAGE.groups)
    assert sum(len(group.names) for group in PACKAGE.groups) == len(set(mha_book.__all__)) == len(mha_book.__all__)


@pytest.mark.parametrize("found", PUBLIC, ids=lambda found: found.name)
def test_every_public_name_says_what_it_is_and_what_each_parameter_means(found):
    assert lacking(found) == []


def test_what_an_entry_leaves_unsaid_is_seen():
    bad = entry("# %% ../../nbs/01_nowhere.ipynb #x\ndef f(\n    a: int,\n    b: int,   # said\n): ...")
    assert lacking(bad) == ["a docstring", "a chapter", "a"]


# Names in prose


@pytest.mark.parametrize(
    "code, name",
    [
        ("attention", "attention"),
        ("attention(q, k, v)", "attention"),
        ("mha_book.attention", "attention"),
        ("MultiHeadAttention(48,\n6)", "MultiHeadAttention"),
        ("layer.attention", None),
        ("partial(attention, window=4)", None),
        ("attention_", None),
        ("forward", None),
    ],
)
def test_only_a_public_name_or_its_call_is_one(code, name):
    assert api_reference.public_name(api_reference.nodes.literal("", code), PACKAGE) == name


def test_headings_links_and_an_entry_itself_are_no_prose():
    nodes, addnodes = api_reference.nodes, api_reference.addnodes
    prose = {}
    for kind in (nodes.paragraph, nodes.title, nodes.reference, addnodes.pending_xref, nodes.literal_block):
        code = nodes.literal("", "attention")
        outer = kind()
        outer += code
        prose[kind.__name__] = api_reference.is_prose(code, "mha_book.attention")
    assert [kind for kind, is_prose in prose.items() if is_prose] == ["paragraph"]
    code = nodes.literal("", "attention")
    sign = addnodes.desc_signature("", "", ids=["mha_book.attention"])
    addnodes.desc("", sign, addnodes.desc_content("", nodes.paragraph("", "", code)))
    assert not api_reference.is_prose(code, "mha_book.attention")
    assert api_reference.is_prose(code, "mha_book.causal_mask")


# The built pages


@functools.cache
def inventory() -> dict[str, str]:
    "Name -> address of each Python object of the built book."
    from sphinx.util.inventory import InventoryFile

    with (HTML / "objects.inv").open("rb") as file:
        kinds = InventoryFile.load(file, "", lambda base, uri: uri)
    return {name: item[2] for kind, items in kinds.items() if kind.startswith("py:") for name, item in items.items()}


def entry_html(page: str, title: str) -> str:
    "An entry in a built page: from its own id to the next entry's that is no member of it."
    text = page[page.index(f'id="{title}"') :]
    ids = re.finditer(r'<dt class="sig[^>]*?\sid="([^"]+)"', text)
    end = next((m.start() for m in ids if not m[1].startswith(f"{title}.")), len(text))
    return text[:end]


def cell_html(page: str, cell: str) -> str:
    "A code cell of a built page, up to the next one."
    return page.split(f'id="cell-{cell}"', 1)[1].split('id="cell-', 1)[0]


def unbuilt(page: str, found: api_source.Entry, title: str) -> list[str]:
    "What an entry's HTML lacks: a row for each parameter, the chapter, its source."
    text = entry_html(page, title)
    rows = re.findall(r"<tr[^>]*><td><p><code[^>]*><span class=\"pre\">\*{0,2}(\w+)</span>", text)
    faults = [param.name for param in found.params if param.name and param.name not in rows]
    faults += [] if f'href="{found.page}.html#cell-{found.cell}"' in text else ["chapter"]
    return faults + ([] if found.kind == "data" or "_modules/" in text else ["source"])


@needs_book
@pytest.mark.parametrize("found", PUBLIC, ids=lambda found: found.name)
def test_every_public_name_is_found_in_the_built_book(found):
    title = PACKAGE.title(found)
    page = inventory()[title].split("#")[0]
    assert unbuilt((HTML / page).read_text(encoding="utf8"), found, title) == []
    assert f'href="{page}#{title}"' in (HTML / "genindex.html").read_text(encoding="utf8")
    assert f">{found.name}<" in cell_html((HTML / f"{found.page}.html").read_text(encoding="utf8"), found.cell)


def test_an_entry_that_lacks_something_in_the_page_is_seen():
    found = PACKAGE.homes["split_heads"]
    head = '<dt class="sig" id="mha_book.split_heads">'
    row = '<tr class="row-even"><td><p><code class="x"><span class="pre">{}</span></code>'
    whole = head + row.format("x") + row.format("num_heads")
    whole += f'<a href="{found.page}.html#cell-{found.cell}"></a><a href="_modules/x.html"></a>'
    later = '<dt class="sig" id="mha_book.other">' + row.format("x")
    assert unbuilt(whole + later, found, "mha_book.split_heads") == []
    assert unbuilt(head + row.format("x") + later, found, "mha_book.split_heads") == ["num_heads", "chapter", "source"]
    assert unbuilt(head + later, found, "mha_book.split_heads") == ["x", "num_heads", "chapter", "source"]


def test_a_definition_in_the_next_cell_is_not_taken_for_this_one():
    page = '<div id="cell-a"><i>f</i></div><div id="cell-b"><i>g</i></div>'
    assert ">f<" in cell_html(page, "a") and ">g<" not in cell_html(page, "a") and ">g<" in cell_html(page, "b")
