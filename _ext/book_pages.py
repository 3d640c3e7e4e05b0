"""What the book's pages know of themselves: the chapter's number before its title, and the list of stamps."""

from __future__ import annotations

import html
import re

from docutils import nodes
from nbdev_bridge import PROVED
from sphinx import addnodes
from sphinx.util.docutils import SphinxDirective

CHAPTER = re.compile(r"^(\d\d)([a-z]?)_")
NUMBER = re.compile(r"^((?:[Cc]hapter )?)\d+[a-z]?$")
STAMP_VALUE = re.compile(r'data-(\w+)="([^"]*)"')
COLUMNS = {
    "seconds": "Seconds",
    "date": "Run on (UTC)",
    "device": "Device",
    "threads": "Threads",
    "torch": "torch",
    "python": "Python",
}


class stamp_list(nodes.General, nodes.Element):
    "Stands for the list until every page is read."


class chapter_map(nodes.General, nodes.Element):
    "Stands for the map until every page is read."


class ChapterMap(SphinxDirective):
    "The directive `chapter-map`: all chapters by parts, each with the line under its title."

    def run(self):
        return [chapter_map()]


class StampList(SphinxDirective):
    "The directive `page-stamps`: a table of all executed pages, in reading order, with what their stamps say."

    def run(self):
        return [stamp_list()]


def shown_numbers(pages) -> dict[str, str]:
    """The number of each chapter as a reader sees it, from pages in reading order: without the gaps that file names
    leave for chapters to come, and with the letter of NNa_name. Parts below 90 are chapters; the rest are helpers."""
    chapters = [match for match in map(CHAPTER.match, pages) if match and int(match[1]) < 90]
    counted = list(dict.fromkeys(match[1] for match in chapters))
    return {match.string: f"{counted.index(match[1]) + 1}{match[2]}" for match in chapters}


def number_chapter(app, doctree) -> None:
    "Put a chapter's number before its title, and into links to chapters whose text is a number."
    numbers = shown_numbers(app.env.external_site_map)
    title = next(doctree.findall(nodes.title), None)
    if app.env.docname in numbers and title is not None:
        title.insert(0, nodes.Text(f"{numbers[app.env.docname]}. "))
    for link_node in doctree.findall(addnodes.pending_xref):
        number = numbers.get(re.sub(r"(\.ipynb)?(#.*)?$", "", link_node.get("reftarget", "")))
        for text in list(link_node.findall(nodes.Text)) if number else ():
            text.parent.replace(text, nodes.Text(NUMBER.sub(rf"\g<1>{number}", text.astext())))


def collect_subtitle(app, doctree) -> None:
    "Remember the line under a page's title, if one stands there: a paragraph that is emphasised as a whole."
    subtitles = app.env.__dict__.setdefault("mha_book_subtitles", {})
    subtitles.pop(app.env.docname, None)
    first = next(doctree.findall(nodes.paragraph), None)
    if first is not None and len(first) == 1 and isinstance(first[0], nodes.emphasis):
        subtitles[app.env.docname] = first.astext()


def fill_chapter_map(app, doctree, docname: str) -> None:
    "Replace the directive's place by the parts and their chapters."
    site, subtitles = app.env.external_site_map, getattr(app.env, "mha_book_subtitles", {})
    numbers, content = shown_numbers(site), []
    for part in site[site.root.docname].subtrees:
        chapters = [page for page in map(str, part.items) if page in numbers]
        lines = [link(app, docname, page) for page in chapters]
        for line, page in zip(lines, chapters):
            line += nodes.Text(f": {subtitles.get(page, '')}")
        entries = [nodes.list_item("", line) for line in lines]
        if chapters:
            head = nodes.paragraph("", "", nodes.strong("", part.caption))
            content += [head, nodes.bullet_list("", *entries, classes=["chapter-map"])]
    for place in list(doctree.findall(chapter_map)):
        place.replace_self(content)


def collect_stamp(app, doctree) -> None:
    "Remember the values of a page's stamp."
    stamps = app.env.__dict__.setdefault("mha_book_stamps", {})
    stamps.pop(app.env.docname, None)
    for node in doctree.findall(nodes.raw):
        if 'class="stamp"' in node.astext():
            stamps[app.env.docname] = {k: html.unescape(v) for k, v in STAMP_VALUE.findall(node.astext())}


def state_proofs(app, doctree) -> None:
    "Over each proof its sentence: that it was proved, where the run left its mark, and else that it was not."
    for cell in list(doctree.findall(nodes.container)):
        if "tag_proof" not in cell.get("classes", []):
            continue
        marks = [raw for raw in cell.findall(nodes.raw) if 'class="proof-ran"' in raw.astext()]
        for mark in marks:
            remove(bundle_of(mark), cell)
        for source in cell.findall(nodes.literal_block):
            if source.astext().endswith(PROVED):
                source.rawsource = source.astext().removesuffix(PROVED)
                source[:] = [nodes.Text(source.rawsource)]
        opening = "Proved here: " if marks else "Not run, so not proved: "
        cell["prompt_show"] = cell["prompt_hide"] = opening + cell["prompt_show"]
        cell["classes"].append("proved" if marks else "unproved")


def bundle_of(raw):
    "The whole output that a piece of HTML is one form of."
    node = raw
    while node is not None and node.get("nb_element") != "mime_bundle":
        node = node.parent
    return raw if node is None else node


def remove(node, cell) -> None:
    "Take an output out of its cell, with the containers that held nothing else."
    while node is not cell:
        parent = node.parent
        parent.remove(node)
        if parent.children:
            break
        node = parent


def link(app, source: str, target: str) -> nodes.paragraph:
    "A paragraph with a link from one page to another."
    title = app.env.titles[target].astext()
    uri = app.builder.get_relative_uri(source, target)
    return nodes.paragraph("", "", nodes.reference("", title, internal=True, refuri=uri))


def table(head: list[str], rows: list[list[nodes.paragraph]]) -> nodes.table:
    "A docutils table of these cells."

    def row(cells):
        return nodes.row("", *[nodes.entry("", cell) for cell in cells])

    columns = [nodes.colspec(colwidth=1) for _ in head]
    top = nodes.thead("", row([nodes.paragraph("", text) for text in head]))
    group = nodes.tgroup("", *columns, top, nodes.tbody("", *map(row, rows)), cols=len(head))
    return nodes.table("", group, classes=["page-stamps"])


def fill_stamp_list(app, doctree, docname: str) -> None:
    "Replace the directive's place by the table."
    stamps = getattr(app.env, "mha_book_stamps", {})
    pages = [page for page in app.env.external_site_map if page in stamps]
    rows = [[link(app, docname, page), *[nodes.paragraph("", stamps[page][key]) for key in COLUMNS]] for page in pages]
    total = sum(float(stamps[page]["seconds"]) for page in pages)
    note = nodes.paragraph("", f"{len(pages)} pages, {total:.0f} seconds in all.")
    for place in list(doctree.findall(stamp_list)):
        place.replace_self([table(["Page", *COLUMNS.values()], rows), note])


def setup(app):
    "Register with Sphinx."
    app.add_node(stamp_list)
    app.add_node(chapter_map)
    app.add_directive("chapter-map", ChapterMap)
    app.add_directive("page-stamps", StampList)
    app.connect("doctree-read", number_chapter, priority=100)  # before Sphinx collects the titles
    app.connect("doctree-read", collect_subtitle)
    app.connect("doctree-read", collect_stamp)
    app.connect("doctree-read", state_proofs)
    app.connect("doctree-resolved", fill_stamp_list)
    app.connect("doctree-resolved", fill_chapter_map)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
