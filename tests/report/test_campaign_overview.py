"""The overview page of a campaign: what it says, what it links to, what it must not load."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from stand_ins.campaigns import row

from openmm_eqflow.report.campaign import write_overview


class Page(HTMLParser):
    """Tags left open, rows of tables, links and words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br", "link"):
            self.open.append(tag)
        named = dict(attributes)
        self.links += [named["href"]] if named.get("href") else []
        self.ids += [named["id"]] if named.get("id") else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_every_molecule_has_a_line_and_links_that_exist(tmp_path: Path) -> None:
    for file in ("runs/a/metrics.json", "runs/a/report.html", "logs/a.log", "results.csv"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("")
    state = {"torsion": "O1-O2", "state": "anti", "population": 0.25, "population_error": 0.01}
    done = {"n_atoms": 4, "seconds": 3.2, "n_samples": 100, "relative_ess": 0.5}
    rows = [
        row("a", "done", **done, log_z=-9.5, log_z_error=0.02, populations=[state]),
        row("b", "failed", message="no <b>such</b> file & no end"),
        row("c", "waiting", temperature=None),
    ]
    html = write_overview(tmp_path, rows).read_text(encoding="utf-8")
    page = Page(html)
    assert not page.open
    assert {"a", "b", "c"} <= set(page.ids)
    assert sorted(page.links) == [
        "#a", "logs/a.log", "results.csv", "runs/a/metrics.json", "runs/a/report.html",
    ]  # fmt: skip
    words = " ".join(page.words.split())
    assert "3 molecules" in words
    assert all(text in words for text in ("1 done", "1 failed", "1 waiting"))
    assert "-9.500 ± 0.020" in words
    assert "0.2500 ± 0.0100" in words or "0.250 ± 0.010" in words
    assert "no <b>such</b> file & no end" in words  # as text
    assert not re.search(r"https?://|<script|@import|url\(", html)


def test_a_page_before_anything_is_done(tmp_path: Path) -> None:
    page = Page(write_overview(tmp_path, [row("a", "waiting")]).read_text(encoding="utf-8"))
    assert not page.open
    assert page.links == []
    assert "Populations" not in page.words
