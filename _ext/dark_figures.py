"""Figures for dark pages: beside each SVG of the book stands a twin in light ink, and a page shows the one that fits.

Light and dark greys change places, white with the page's dark ground. Colours stay, since a head keeps its colour;
those too dark to be seen are lightened. Ink on a colour is written as `#010101` or `#fefefe`, and stays too.
"""

from __future__ import annotations

import colorsys
import re
from pathlib import Path

GROUND = "#121212"  # of a dark page
INK = "#e6e6e6"  # what black becomes
KEPT = "#010101", "#fefefe"  # ink on a coloured ground
CONTRAST = 4.5  # what a colour is lightened to where it has less than 3
COLOUR = re.compile(r"#[0-9a-fA-F]{6}\b")
IMAGE = re.compile(r"<img\b[^>]*?\bsrc=\"(?P<path>[^\"]*_images/[^\"]+)\.svg\"[^>]*>")


def channels(colour: str) -> tuple[float, float, float]:
    "Red, green and blue, 0 to 1."
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def written(values) -> str:
    "Red, green and blue as #rrggbb."
    return "#" + "".join(f"{round(255 * min(1, max(0, value))):02x}" for value in values)


def luminance(colour: str) -> float:
    "Relative luminance, by WCAG 2."
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels(colour))
    return sum(share * c for share, c in zip((0.2126, 0.7152, 0.0722), linear))


def contrast(one: str, other: str) -> float:
    "The ratio of their luminances, 1 to 21, by WCAG 2."
    darker, lighter = sorted(map(luminance, (one, other)))
    return (lighter + 0.05) / (darker + 0.05)


def in_the_dark(colour: str) -> str:
    "What a colour of a figure becomes on a dark page."
    colour = colour.lower()
    if colour in KEPT:
        return colour
    values = channels(colour)
    if contrast(colour, GROUND) >= 3 and contrast(colour, "#ffffff") >= 3:
        return colour
    if max(values) - min(values) < 0.08:  # a grey: from the ground, for white, to the ink, for black
        share = 1 - sum(values) / 3
        return written(g + share * (i - g) for g, i in zip(channels(GROUND), channels(INK)))
    if contrast(colour, "#ffffff") > 12:  # nearly black, whatever its hue
        return INK
    if contrast(colour, GROUND) >= 3:
        return colour
    hue, light, saturation = colorsys.rgb_to_hls(*values)
    while contrast(colour, GROUND) < CONTRAST:
        light += 0.02
        colour = written(colorsys.hls_to_rgb(hue, light, saturation))
    return colour


def dark_twin(svg: str) -> str:
    "The drawing for a dark page. What names no colour is black, and gets the colour of the whole."
    svg = COLOUR.sub(lambda match: in_the_dark(match[0]), re.sub(r"(?<=[:\"])\s*white\b", "#ffffff", svg))
    return svg.replace("<svg ", f'<svg fill="{INK}" ', 1)


def with_class(tag: str, name: str) -> str:
    "An image's tag with a class more."
    if 'class="' in tag:
        return tag.replace('class="', f'class="{name} ', 1)
    return tag.replace("<img", f'<img class="{name}"', 1)


def both(match: re.Match) -> str:
    "An image, and its twin for dark pages."
    twin = match[0].replace(f"{match['path']}.svg", f"{match['path']}.dark.svg")
    return with_class(match[0], "only-light") + with_class(twin, "only-dark")


def show_both(app, pagename, templatename, context, doctree) -> None:
    "Each page carries both drawings; the theme hides the one that does not fit."
    if context.get("body"):
        context["body"] = IMAGE.sub(both, context["body"])


def draw_twins(app, failed) -> None:
    "Write the twins beside the drawings."
    for path in (Path(app.outdir) / "_images").glob("*.svg"):
        if not path.name.endswith(".dark.svg"):
            path.with_suffix(".dark.svg").write_text(dark_twin(path.read_text(encoding="utf8")), encoding="utf8")


def setup(app):
    "Register with Sphinx."
    app.connect("html-page-context", show_both)
    app.connect("build-finished", draw_twins)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
