"""Terms: a link to the glossary carries its sentence, and the glossary says on which page each term stands first."""

from __future__ import annotations

from docutils import nodes
from sphinx import addnodes

GLOSSARY = "glossary"


def note_terms(app, doctree) -> None:
    "Remember which terms a page links."
    found = {ref["reftarget"].lower() for ref in doctree.findall(addnodes.pending_xref) if ref.get("reftype") == "term"}
    app.env.__dict__.setdefault("mha_book_terms", {})[app.env.docname] = found


def meanings(glossary: nodes.document) -> dict[str, str]:
    "The place of each term in the glossary -> its sentence, without the Chinese name behind it."
    found = {}
    for item in glossary.findall(nodes.definition_list_item):
        text = item.children[-1].astext().rpartition(". ")[0] + "."
        found |= {place: text for term in item.findall(nodes.term) for place in term["ids"]}
    return found


def first_pages(app) -> dict[str, str]:
    "Each term, in lower case, and the first page in reading order that links it."
    pages, found = getattr(app.env, "mha_book_terms", {}), {}
    for page in getattr(app.env, "external_site_map", {}):
        for term in pages.get(page, ()):
            found.setdefault(term, page)
    return found


def explain_terms(app, doctree, docname: str) -> None:
    "Give the page's links their sentences; in the glossary, link each term's first page."
    if docname == GLOSSARY:
        name_first_pages(app, doctree)
        return
    sentences = None
    for reference in doctree.findall(nodes.reference):
        inner = reference.children[0] if reference.children else None
        if isinstance(inner, nodes.inline) and "std-term" in inner.get("classes", []):
            if sentences is None:
                sentences = meanings(app.env.get_doctree(GLOSSARY))
            reference["classes"].append("term-link")
            reference["reftitle"] = sentences[reference["refuri"].partition("#")[2]]


def name_first_pages(app, doctree) -> None:
    "Behind each term's sentence, the page that it stands on first."
    first = first_pages(app)
    for item in doctree.findall(nodes.definition_list_item):
        pages = [first[term.astext().lower()] for term in item.findall(nodes.term) if term.astext().lower() in first]
        if pages:
            page = pages[0]
            title = app.env.titles[page].astext()
            uri = app.builder.get_relative_uri(GLOSSARY, page)
            link = nodes.reference("", title, internal=True, refuri=uri)
            item.children[-1].children[-1].extend([nodes.Text(" · "), link])


def setup(app):
    "Register with Sphinx. The book loads `_static/terms.js` by itself, as all that lies there."
    app.connect("doctree-read", note_terms)
    app.connect("doctree-resolved", explain_terms)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
