"""Terms: what their links carry, and which page the glossary names."""

import sys
from pathlib import Path
from types import SimpleNamespace

from docutils import nodes
from sphinx import addnodes

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "_ext"))
import glossary_terms  # noqa: E402

ITEM = nodes.definition_list_item


def glossary() -> nodes.section:
    "One entry with two names."
    names = [nodes.term("", name, ids=[f"term-{name}"]) for name in ("gap", "ulp")]
    meaning = nodes.definition("", nodes.paragraph("", "From one float to the next. It grows. 间隔"))
    return nodes.section("", nodes.definition_list("", ITEM("", *names, meaning)))


def app_of(**pages: set[str]) -> SimpleNamespace:
    titles = {page: nodes.title("", page.upper()) for page in pages}
    env = SimpleNamespace(
        docname="b",
        external_site_map=["index", *sorted(pages)],
        mha_book_terms=pages,
        titles=titles,
        get_doctree=lambda name: glossary(),
    )
    return SimpleNamespace(env=env, builder=SimpleNamespace(get_relative_uri=lambda a, b: f"{b}.html"))


def test_the_terms_of_a_page_are_noted():
    app = app_of()
    refs = [addnodes.pending_xref("", reftype=kind, reftarget=name) for kind, name in (("term", "Gap"), ("doc", "ulp"))]
    glossary_terms.note_terms(app, nodes.section("", nodes.paragraph("", "", *refs)))
    assert app.env.mha_book_terms == {"b": {"gap"}}


def test_a_link_carries_the_sentence_without_the_chinese_name():
    inner = nodes.inline("", "ulps", classes=["std", "std-term"])
    link = nodes.reference("", "", inner, refuri="glossary.html#term-ulp")
    other = nodes.reference("", "", nodes.inline("", "x", classes=["doc"]), refuri="a.html")
    glossary_terms.explain_terms(app_of(), nodes.section("", nodes.paragraph("", "", link, other)), "b")
    assert link["reftitle"] == "From one float to the next. It grows." and "term-link" in link["classes"]
    assert "reftitle" not in other


def test_the_glossary_names_the_first_page_in_reading_order():
    page = glossary()
    glossary_terms.explain_terms(app_of(d={"ulp"}, c={"gap"}, e={"gap"}), page, "glossary")
    links = [link["refuri"] for link in page.findall(nodes.reference)]
    assert links == ["c.html"] and page.astext().endswith("C")


def test_a_term_that_no_page_links_has_no_page():
    page = glossary()
    glossary_terms.explain_terms(app_of(c={"stride"}), page, "glossary")
    assert not list(page.findall(nodes.reference))
