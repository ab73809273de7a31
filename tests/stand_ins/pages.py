"""What every page of a report must be."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from openmm_eqflow.report.theme import COLOURS, EMPTY, INK


def check_page(html, *, least=10):
    """Self-contained, small, well-formed figures, no id twice, no placeholder colour left."""
    assert len(html) < 5_000_000
    for value in re.findall(r'(?:src|href)="([^"]*)"', html):
        assert value.startswith(("#", "data:")), value
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    figures = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert figures
    for svg in figures:
        root = ElementTree.fromstring(svg)
        assert root.get("role") == "img"
        assert root.get("aria-label")
        drawn = [e for e in root.iter() if e.tag.endswith(("path", "use", "image"))]
        assert len(drawn) > least
    for placeholder in (*COLOURS.values(), INK, EMPTY):
        assert placeholder not in html
    assert "nan" not in re.sub(r'"[^"]*"', "", html).lower().split()
    return {key for key in re.findall(r'<figure id="figure-([^"]+)"', html)}
