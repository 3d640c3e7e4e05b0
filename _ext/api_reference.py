"""The reference of the package, made from its source when the book is built.

`api-folder:: heads` is a folder's page, a section a module and an entry a name. `public-names::` is the list of what
`from mha_book import …` gives, in the groups of `__all__`. A public name in backticks anywhere in the book becomes
a link to its entry, and a chapter's code cells become places that entries can point to.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
from api_source import Entry, Package, Param, first_sentence, shape_text, split_doc
from docutils import nodes
from nbdev_bridge import merge_setup
from sphinx import addnodes
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[1]
CALL = re.compile(r"(?:mha_book\.)?(\w+)(?:\(.*\))?", re.S)
CODE = re.compile(r"`([^`]+)`")
OUTSIDE = (
    nodes.title,
    nodes.reference,
    addnodes.pending_xref,
    addnodes.desc_signature,
    nodes.literal_block,
    nodes.rubric,
)
MAY_CHANGE = "importable from its module, may change"
PROOFS = 3  # tests of a page that an entry points to


# Pieces of text


def inline(words: str) -> list[nodes.Node]:
    "Text with `code` in backticks."
    parts = CODE.split(words)
    return [nodes.literal("", part) if i % 2 else nodes.Text(part) for i, part in enumerate(parts) if part]


def paragraph(words: str, **options) -> nodes.paragraph:
    "A paragraph of such text."
    return nodes.paragraph("", "", *inline(words), **options)


def block(words: str) -> nodes.Element:
    "A paragraph, a list, or a piece of code, as a docstring writes them."
    if words.startswith("    "):
        return nodes.literal_block("", "\n".join(line[4:] for line in words.splitlines()), language="python")
    if words.startswith("- "):
        items = re.split(r"\n(?=- )", words)
        return nodes.bullet_list("", *[nodes.list_item("", paragraph(" ".join(i[2:].split()))) for i in items])
    return paragraph(words)


def page_link(docname: str, anchor: str = "", words: str = "") -> nodes.reference:
    "A link to a page, or a place in it, filled in when all pages are read; its words are the title unless told."
    return nodes.reference("", words, internal=True, refuri="", api_page=docname, api_anchor=anchor)


def to_entry(title: str, words: str, **options) -> addnodes.pending_xref:
    "A link to an entry, in code letters."
    code = nodes.literal("", words)
    return addnodes.pending_xref("", code, refdomain="py", reftype="obj", reftarget=title, refexplicit=True, **options)


def table(head: list[str], rows: list[list[list[nodes.Node]]]) -> nodes.table:
    "A docutils table: each cell is a list of inline nodes."

    def row(cells):
        return nodes.row("", *[nodes.entry("", nodes.paragraph("", "", *cell)) for cell in cells])

    columns = [nodes.colspec(colwidth=1) for _ in head]
    top = nodes.thead("", row([[nodes.Text(words)] for words in head]))
    group = nodes.tgroup("", *columns, top, nodes.tbody("", *map(row, rows)), cols=len(head))
    return nodes.table("", group, classes=["api-parameters"])


# A signature


def parameter(param: Param) -> addnodes.desc_parameter:
    "One parameter of a signature: name, shape, default."
    node = addnodes.desc_parameter()
    node += addnodes.desc_sig_name("", param.prefix + param.name if param.name else param.mark)
    if param.annotation is not None:
        node += nodes.Text(": ")
        node += addnodes.desc_sig_name("", shape_text(param.annotation), classes=["api-shape"])
    if param.default is not None:
        node += nodes.Text(" = " if param.annotation is not None else "=")
        node += nodes.inline("", param.default, classes=["default_value"])
    return node


def signature(entry: Entry, title: str) -> addnodes.desc_signature:
    "The line that names an entry and says how it is called."
    prefix, name = title.rpartition(".")[::2]
    full = f"mha_book.{entry.path}"
    node = addnodes.desc_signature("", "", module=f"mha_book.{entry.module}", fullname=entry.name, _toc_name=name)
    node["ids"] = [title] if title == full else [title, full]
    if entry.kind in ("class", "property"):
        node += addnodes.desc_annotation("", f"{entry.kind} ")
    node += addnodes.desc_addname("", f"{prefix}.")
    node += addnodes.desc_name("", name)
    if entry.kind not in ("property", "data") and not is_contract(entry):
        several = len(entry.params) > 1
        listed = addnodes.desc_parameterlist(multi_line_parameter_list=several, multi_line_trailing_comma=False)
        node += listed
        listed.extend(parameter(param) for param in entry.params)
    if entry.returns is not None and entry.returns.annotation is not None:
        arrow = addnodes.desc_returns if entry.kind not in ("property", "data") else addnodes.desc_annotation
        colon = "" if arrow is addnodes.desc_returns else ": "
        node += arrow("", colon + shape_text(entry.returns.annotation))
    return node


def is_contract(entry: Entry) -> bool:
    "Whether a class is a Protocol: nobody calls it."
    return "Protocol" in entry.bases


# What stands under it


class Writer:
    "Writes the entries of one page."

    def __init__(self, env, package: Package):
        self.env, self.package, self.domain = env, package, env.get_domain("py")

    def entry(self, entry: Entry) -> list[nodes.Node]:
        "The entry of a name, with its members inside, and its lines in the index."
        title = self.package.title(entry)
        kind = {"property": "property", "method": "method", "class": "class"}.get(entry.kind, entry.kind)
        sign = signature(entry, title)
        node = addnodes.desc("", sign, domain="py", objtype=kind, desctype=kind, classes=["py", kind, "api-entry"])
        node += addnodes.desc_content("", *self.content(entry))
        for index, name in enumerate(sign["ids"]):
            self.domain.note_object(name, kind, title, aliased=index > 0, location=("api", entry.line))
        words = f"{title.rpartition('.')[2]} ({self.owner(entry, title)})"
        return [addnodes.index(entries=[("single", words, title, "", None)]), node]

    def owner(self, entry: Entry, title: str) -> str:
        "What the index says behind a name."
        kind = {"data": "value"}.get(entry.kind, entry.kind)
        return f"{kind} of {title.rpartition('.')[0]}"

    def content(self, entry: Entry) -> list[nodes.Node]:
        "Prose, parameters, results, errors, papers, chapter, members."
        doc = split_doc(entry.doc)
        inside = entry.kind in ("method", "property")
        small = [] if self.package.is_public(entry) or inside else [paragraph(MAY_CHANGE, classes=["api-private"])]
        body = [*small, *map(block, doc["prose"])]
        params = [param for param in entry.params if param.name]
        if any(param.meaning for param in params):  # elsewhere the sentence above says it
            rows = [self.row(param, entry) for param in params]
            body.append(table(["Name", "Type and shape", "Default", "Meaning"], rows))
        listed = self.facts(entry, doc)
        body += [nodes.field_list("", *listed, classes=["api-facts"])] if listed else []
        for member in entry.members:
            body += self.entry(member)
        return body

    def row(self, param: Param, entry: Entry) -> list[list[nodes.Node]]:
        "A parameter in the table."
        kind, default = shape_text(param.annotation), param.default
        return [
            [nodes.literal("", param.prefix + param.name)],
            [nodes.literal("", kind)] if kind else [],
            [nodes.literal("", default)] if default is not None else [nodes.Text("required")],
            inline(self.package.meaning(param, entry)),
        ]

    def facts(self, entry: Entry, doc: dict) -> list[nodes.field]:
        "What is returned, raised and cited, and where it is explained."
        found = []
        if entry.returns is not None and entry.returns.meaning:
            found.append(fact("Returns", inline(f"`{shape_text(entry.returns.annotation)}`: {entry.returns.meaning}")))
        found += [fact(name, inline(" ".join(doc[name]))) for name in ("Raises", "Source") if doc[name]]
        found += [fact("Builds on", self.bases(entry))] if self.bases(entry) else []
        if entry.kind not in ("method", "property") and entry.page in self.env.found_docs:
            found.append(fact("Chapter", [page_link(entry.page, f"cell-{entry.cell}" if entry.cell else "")]))
            proofs = proving_cells(Path(self.env.srcdir) / f"{entry.page}.ipynb", entry.name)
            found += [fact("Proved by", joined(entry.page, proofs))] if proofs else []
        return found

    def bases(self, entry: Entry) -> list[nodes.Node]:
        "Links to the package's own classes that a class inherits from."
        own = [self.package.find(base) for base in entry.bases]
        links = [to_entry(self.package.title(base), base.name) for base in own if base]
        return [node for link in links for node in (nodes.Text(", "), link)][1:]


def fact(name: str, body: list[nodes.Node]) -> nodes.field:
    "A line `name: body` of a list of fields."
    return nodes.field("", nodes.field_name("", name), nodes.field_body("", nodes.paragraph("", "", *body)))


def joined(page: str, proofs: dict[str, str]) -> list[nodes.Node]:
    "Links to cells, separated by semicolons."
    links = [page_link(page, f"cell-{cell}", words) for cell, words in proofs.items()]
    return [node for link in links for node in (nodes.Text("; "), link)][1:]


def proving_cells(notebook: Path, name: str) -> dict[str, str]:
    "The first tests of a page that use `name`: cell id -> the test's name as a sentence."
    found, word = {}, re.compile(rf"\b{re.escape(name)}\b")
    for cell in json.loads(notebook.read_text(encoding="utf8"))["cells"]:
        source = "".join(cell["source"])
        match = re.search(r"^def test_(\w+)\(", source, re.M)
        if cell["cell_type"] == "code" and match and word.search(source) and len(found) < PROOFS:
            found[cell["id"]] = match[1].replace("_", " ")
    return found


# The directives


class ApiFolder(SphinxDirective):
    "`api-folder:: heads`: the entries of a folder, module by module, public names first."

    required_arguments = 1

    def run(self):
        package, folder = package_of(self.env), self.arguments[0]
        if folder not in package.folders:
            raise self.error(f"no folder is called {folder!r}; there is {', '.join(package.folders)}")
        writer = Writer(self.env, package)
        return [section(writer, module) for module in package.folders[folder] if package.entries[module]]


def section(writer: Writer, module: str) -> nodes.section:
    "A module: what it says of itself, then its entries."
    package = writer.package
    title = nodes.title("", "", nodes.Text(module.rpartition(".")[2]))
    node = nodes.section("", title, ids=[f"module-mha_book.{module}"], names=[module])
    node += paragraph(package.docs[module]) if package.docs[module] else []
    for entry in sorted(package.entries[module], key=lambda entry: not package.is_public(entry)):
        node += writer.entry(entry)
    return node


class PublicNames(SphinxDirective):
    "`public-names::`: all public names in the groups of `__all__`, each with the first sentence of its docstring."

    def run(self):
        package = package_of(self.env)
        return [node for group in package.groups for node in self.group(package, group)]

    def group(self, package, group):
        "A group's title, and its names with a sentence each."
        rows = []
        for entry in (package.homes[name] for name in group.names if name in package.homes):
            link = to_entry(package.title(entry), entry.name)
            rows.append(nodes.definition_list_item("", nodes.term("", "", link), self.line(entry)))
        title = nodes.title("", "", *inline(group.title))
        ids = [nodes.make_id(f"names {group.title}")]
        return [nodes.section("", title, nodes.definition_list("", *rows, classes=["api-names"]), ids=ids, names=ids)]

    def line(self, entry):
        "What a name is, and where it is explained."
        known = entry.page in self.env.found_docs
        chapter = [nodes.Text(" "), page_link(entry.page, f"cell-{entry.cell}", "Explained here.")] if known else []
        return nodes.definition("", nodes.paragraph("", "", *inline(first_sentence(entry.doc)), *chapter))


def package_of(env) -> Package:
    "The package, read once a build."
    if not hasattr(env.app, "mha_book_package"):
        env.app.mha_book_package = Package(ROOT / "mha_book")
    return env.app.mha_book_package


# What happens on every page


def public_name(node: nodes.literal, package: Package) -> str | None:
    "The public name that a piece of code in prose is, or calls."
    match = CALL.fullmatch(node.astext())
    return match[1] if match and match[1] in package.homes else None


def ancestors(node: nodes.Node):
    "The nodes that a node stands in, from the inside out."
    while (node := node.parent) is not None:
        yield node


def is_prose(node: nodes.literal, title: str) -> bool:
    "Whether a piece of code stands in prose: not in a heading, a link, a signature, nor in the entry it would lead to."
    for outer in ancestors(node):
        own = isinstance(outer, addnodes.desc) and title in outer[0]["ids"]
        if own or isinstance(outer, OUTSIDE):
            return False
    return True


def link_names(app, doctree) -> None:
    "Make a link of each public name in backticks."
    package = package_of(app.env)
    for node in list(doctree.findall(nodes.literal)):
        name = public_name(node, package)
        if name and is_prose(node, package.title(package.homes[name])):
            link = to_entry(package.title(package.homes[name]), node.astext(), classes=["api-link"])
            link[0]["classes"] += ["api-link"]
            node.replace_self(link)


def name_cells(app, doctree) -> None:
    "Give each code cell of a notebook the id `cell-…`, so that entries can point to it."
    notebook = Path(app.env.doc2path(app.env.docname))
    if notebook.suffix != ".ipynb":
        return
    cells = merge_setup(nbformat.read(notebook, as_version=4).cells)
    for node in doctree.findall(nodes.container):
        index = node.get("cell_index", 0) - 1  # the stamp's cell comes first
        if node.get("nb_element") == "cell_code" and 0 <= index < len(cells) and "id" in cells[index]:
            node["ids"].append(f"cell-{cells[index]['id']}")


def fill_links(app, doctree, docname: str) -> None:
    "Addresses and titles of links to pages."
    for node in doctree.findall(nodes.reference):
        if target := node.attributes.pop("api_page", None):
            anchor = node.attributes.pop("api_anchor")
            node["refuri"] = app.builder.get_relative_uri(docname, target) + (f"#{anchor}" if anchor else "")
            if not node.children:
                node += nodes.Text(app.env.titles[target].astext())


def setup(app):
    "Register with Sphinx."
    app.add_directive("api-folder", ApiFolder)
    app.add_directive("public-names", PublicNames)
    app.connect("doctree-read", name_cells)
    app.connect("doctree-read", link_names, priority=50)  # before pending links are counted
    app.connect("doctree-resolved", fill_links)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
