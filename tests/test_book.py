"""The built book in a real browser, as a reader meets it: from disk and from a server, on a phone, in the dark.

Skipped, with the reason, unless the book is built and a browser is found. MHA_BOOK_REQUIRED=1 makes that a failure.
"""

import functools
import http.server
import os
import re
import shutil
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from support.built_book import HTML, NO_BOOK, ROOT, needs_book

BROWSERS = [
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
]  # any other address fails, visibly
VIEWS = {
    "file": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"},
    "served": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"},
    "phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
}
LOOK = (Path(__file__).parent / "support" / "look_at_page.js").read_text(encoding="utf8")


# Whether there is something to look at, and something to look with


def browser_path() -> str | None:
    "The first browser of the list that this machine has; $CHROMIUM goes before them."
    found = (shutil.which(name) for name in [os.environ.get("CHROMIUM", ""), *BROWSERS] if name)
    return next(filter(None, found), None)


def no_browser() -> str:
    "Why there is no browser to test with; empty if there is one."
    try:
        import playwright  # noqa: F401
    except ImportError:
        return "playwright is not installed: make setup"
    return "" if browser_path() else f"no browser: none of {', '.join(BROWSERS[:3])}, nor $CHROMIUM"


REQUIRED = os.environ.get("MHA_BOOK_REQUIRED") == "1"
NO_BROWSER = no_browser()
PAGES = sorted(
    p.relative_to(HTML).as_posix()
    for p in HTML.rglob("*.html")
    if not {"_static", "_modules"} & set(p.relative_to(HTML).parts)
)
NOTEBOOK_PAGES = [page for page in PAGES if (ROOT / "nbs" / page).with_suffix(".ipynb").exists()]
needs_browser = pytest.mark.skipif(bool(NO_BROWSER), reason=NO_BROWSER)
needs_both = pytest.mark.skipif(bool(NO_BOOK or NO_BROWSER), reason=NO_BOOK or NO_BROWSER)


@pytest.mark.skipif(not REQUIRED, reason="only where MHA_BOOK_REQUIRED=1")
def test_nothing_is_missing():
    assert [NO_BOOK, NO_BROWSER] == ["", ""]
    assert len(PAGES) > 3


# Opening pages


class Quiet(http.server.SimpleHTTPRequestHandler):
    "A file server that logs nothing."

    def log_message(self, *args):
        pass


class Reader:
    "A browser that opens each page once a view, and remembers what was seen."

    def __init__(self, browser):
        self.contexts = {view: browser.new_context(**options) for view, options in VIEWS.items()}
        self.servers, self.seen = {}, {}

    def address(self, root: Path, view: str) -> str:
        "Where the pages under `root` are found: on disk for the view `file`, or else on a server of our own."
        if view == "file":
            return root.as_uri() + "/"
        if root not in self.servers:
            handler = functools.partial(Quiet, directory=str(root))
            self.servers[root] = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
            threading.Thread(target=self.servers[root].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self.servers[root].server_port}/"

    def look(self, root: Path, name: str, view: str) -> dict:
        "What look_at_page.js finds on a page, and under `noise` what the browser complained of."
        key = (root, name, view)
        if key not in self.seen:
            page, noise = self.contexts[view].new_page(), []
            listen(page, self.address(root, view), noise)
            page.goto(self.address(root, view) + name, wait_until="load")
            self.seen[key] = {**page.evaluate(LOOK), "noise": noise}
            page.close()
        return self.seen[key]

    def close(self):
        for server in self.servers.values():
            server.shutdown()
            server.server_close()


def listen(page, base: str, noise: list[str]) -> None:
    "Note errors, failed requests, and requests that leave the book."
    page.on("console", lambda m: noise.append(f"console: {m.text}") if m.type == "error" else None)
    page.on("pageerror", lambda error: noise.append(f"script: {error}"))
    page.on("requestfailed", lambda r: noise.append(f"failed: {r.url}"))
    page.on("response", lambda r: noise.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
    within = (base, "data:", "blob:")
    page.on("request", lambda r: None if r.url.startswith(within) else noise.append(f"leaves: {r.url}"))


@pytest.fixture(scope="module")
def reader():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=browser_path(), args=FLAGS)
        reader = Reader(browser)
        yield reader
        reader.close()
        browser.close()


# What every page must be


FAULTS = {
    "opens quietly and offline from disk": ("file", "noise"),
    "opens quietly and offline from a server": ("served", "noise"),
    "its images say what they show": ("served", "without_alt"),
    "no source shows through": ("served", "raw"),
    "nothing leaves a phone's screen": ("phone", "too_wide"),
    "its text has contrast": ("served", "faint"),
    "its text has contrast in the dark": ("dark", "faint"),
    "a keyboard reaches what scrolls": ("phone", "unreachable"),
    "its captions are seen": ("served", "hidden_captions"),
    "its captions are seen in the dark": ("dark", "hidden_captions"),
}


@needs_both
@pytest.mark.parametrize("claim", FAULTS)
@pytest.mark.parametrize("page", PAGES)
def test_page_has_no_fault(reader, page, claim):
    view, fault = FAULTS[claim]
    assert reader.look(HTML, page, view)[fault] == []


@needs_both
@pytest.mark.parametrize("page", PAGES)
def test_figures_are_readable_in_the_dark(reader, page):
    seen = reader.look(HTML, page, "dark")
    assert seen["theme"] == "dark"
    assert seen["dark_on_dark"] == []


@needs_both
def test_search_finds_a_word(reader):
    page = reader.contexts["served"].new_page()
    page.goto(reader.address(HTML, "served") + "search.html?q=attention")
    page.wait_for_selector("#search-results li a", timeout=10_000)
    assert page.locator("#search-results li a").count() > 0
    page.close()


@needs_both
@pytest.mark.parametrize("name", ["MultiHeadAttention", "window_mask"])
def test_search_finds_a_public_name_in_the_reference(reader, name):
    page = reader.contexts["served"].new_page()
    page.goto(reader.address(HTML, "served") + f"search.html?q={name}")
    page.wait_for_selector(f"#search-results li a[href*='#mha_book.{name}']", timeout=10_000)
    page.close()


@needs_both
@pytest.mark.parametrize("view", ["served", "phone"])
def test_a_term_shows_its_sentence(reader, view):
    page = reader.contexts[view].new_page()
    page.goto(reader.address(HTML, view) + "90_figures.html")
    term, bubble = page.locator("a.term-link").first, page.locator("#term-bubble")
    assert not bubble.is_visible()
    term.scroll_into_view_if_needed()
    term.hover()
    bubble.wait_for(state="visible", timeout=5_000)
    assert len(bubble.inner_text().split()) > 3
    assert term.get_attribute("aria-describedby") == "term-bubble"
    page.keyboard.press("Escape")
    assert not bubble.is_visible()
    term.focus()
    assert bubble.is_visible()
    page.close()


@needs_both
def test_a_tap_on_a_term_explains_it_and_stays_on_the_page(reader):
    context = reader.contexts["phone"].browser.new_context(viewport=VIEWS["phone"]["viewport"], has_touch=True)
    page = context.new_page()
    page.goto(reader.address(HTML, "phone") + "90_figures.html")
    page.locator("a.term-link").first.tap()
    page.locator("#term-bubble").wait_for(state="visible", timeout=5_000)
    assert page.url.endswith("90_figures.html")
    context.close()


@needs_both
@pytest.mark.parametrize("view, shown, hidden", [("served", "light", "dark"), ("dark", "dark", "light")])
def test_a_page_shows_the_figure_that_fits(reader, view, shown, hidden):
    page = reader.contexts[view].new_page()
    page.goto(reader.address(HTML, view) + "90_figures.html")
    assert all(image.is_visible() for image in page.locator(f"img.only-{shown}").all()[:2])
    assert not any(image.is_visible() for image in page.locator(f"img.only-{hidden}").all())
    page.close()


# Stamps


@needs_both
@pytest.mark.parametrize("page", NOTEBOOK_PAGES)
def test_notebook_page_is_stamped(reader, page):
    stamp = reader.look(HTML, page, "served")["stamp"]
    assert set(stamp) == {"torch", "python", "device", "threads", "date", "seconds"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\dZ", stamp["date"]) and float(stamp["seconds"]) > 0


@needs_book
def test_status_page_lists_every_notebook_page():
    table = (HTML / "status.html").read_text(encoding="utf8").split("page-stamps", 1)[1].split("</table>")[0]
    assert sorted(re.findall(r'href="([^"#]+\.html)"', table)) == sorted(NOTEBOOK_PAGES)


# Links


class Anchors(HTMLParser):
    "The links of a page and the places in it that links may name."

    def __init__(self, text: str):
        super().__init__()
        self.links, self.places = [], {""}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.places |= {values[key] for key in ("id", "name") if values.get(key)}
        self.links += [values[key] for key in ("href", "src") if values.get(key)]


@functools.cache
def anchors(path: Path) -> Anchors:
    return Anchors(path.read_text(encoding="utf8"))


def broken_links(root: Path, page: str) -> list[str]:
    "Links within the book that name a file, or a place in a page, that is not there."
    broken = []
    for link in anchors(root / page).links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = ((root / page).parent / unquote(parts.path)).resolve() if parts.path else root / page
        if not target.is_file():
            broken.append(link)
        elif target.suffix == ".html" and unquote(parts.fragment) not in anchors(target).places:
            broken.append(link)
    return broken


@needs_book
@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    assert broken_links(HTML, page) == []


# Each of these checks can fail

BAD = """<!doctype html><html data-theme="dark"><body style="margin:0; background:#111"><article>
<p>see {ref}`there`</p><p>#| export</p><p>$$x$$</p>
<img src="missing.png"><img src="a.svg" alt="_images/a.svg"><img src="a.svg" alt="a curve">
<figure><figcaption style="display:none">lost</figcaption></figure>
<p style="color:#777; background:#888">faint</p><p style="color:#888; background:#fff; font-size:30px">large</p>
<table class="numbers"><tr><th>unsaid</th></tr></table>
<pre style="overflow-x:auto; width:50px">a line that is longer than its box</pre>
<div style="width:2000px">wide</div><div style="overflow-x:auto"><div style="width:2000px">scrolls</div></div>
<a href="#nowhere">a</a><a href="none.html">b</a><a href="#here">c</a><i id="here"></i>
<script src="https://example.org/x.js"></script><script>undefinedFunction()</script></article></body></html>"""
GOOD = """<!doctype html><html data-theme="dark"><body style="margin:0; background:#111; color:#eee"><article>
<pre>#| export  $$x$$</pre><img src="a.svg" alt="a curve" style="background:#fff">
<a href="#here" style="color:#9cf">c</a><i id="here"></i>
<div style="overflow-x:auto"><div style="width:2000px">scrolls</div></div></article></body></html>"""
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"><path d="M0 0L9 9" stroke="black"/></svg>'


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Path:
    "Two pages: one with every fault, one with none."
    root = tmp_path_factory.mktemp("pages")
    for name, text in {"bad.html": BAD, "good.html": GOOD, "a.svg": SVG, "favicon.ico": ""}.items():
        (root / name).write_text(text)
    return root


@needs_browser
def test_bad_page_is_seen(reader, samples):
    seen = reader.look(samples, "bad.html", "served")
    noise = " ".join(seen["noise"])
    assert all(word in noise for word in ("leaves: https://example.org", "404: ", "script: ", "failed: "))
    assert len(seen["raw"]) == 3 and len(seen["without_alt"]) == 2
    assert len(reader.look(samples, "bad.html", "phone")["too_wide"]) == 1
    assert len(seen["hidden_captions"]) == 1
    assert [fault.split(": ")[-1] for fault in seen["faint"] if "faint" in fault or "large" in fault] == ["faint"]
    assert len(seen["unreachable"]) == 2
    assert len(reader.look(samples, "bad.html", "dark")["dark_on_dark"]) == 3
    assert reader.look(samples, "bad.html", "file")["noise"]


@needs_browser
def test_good_page_passes(reader, samples):
    for view in VIEWS:
        seen = reader.look(samples, "good.html", view)
        assert not any(seen[key] for key in seen if key not in ("theme", "stamp"))


def test_broken_links_are_seen(samples):
    assert broken_links(samples, "good.html") == []
    assert broken_links(samples, "bad.html") == ["missing.png", "#nowhere", "none.html"]
