"""The documentation builds without a warning, needs no network, and leaves nothing out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import click
import pytest
from stand_ins import ROOT

import openmm_eqflow
from openmm_eqflow.cli import cli, measure


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def pages(site: Path) -> dict[str, str]:
    found = {str(p.relative_to(site)): p.read_text("utf-8") for p in site.rglob("*.html")}
    assert len(found) >= 20
    return found


def test_every_page_is_in_the_site(site: Path) -> None:
    written = pages(site)
    for source in (ROOT / "docs").rglob("*.md"):
        name = str(source.relative_to(ROOT / "docs").with_suffix(".html"))
        assert name in written
    # What is meant for the tests and the generators does not reach the reader.
    for name, text in written.items():
        assert not re.search(r"<!-- (test|generate|modules):", text), name
    assert not list(site.rglob("*.py"))


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    tags = r"<(?:script|link|img|iframe|source)\b"
    loading = re.compile(tags + r"[^>]*(?:src|href)=[\"']?(?:https?:)?//")
    for name, text in pages(site).items():
        assert not loading.search(text), name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", sheet.read_text("utf-8"))


def test_docstrings_read_as_markdown(site: Path) -> None:
    """No role, directive or equation of reStructuredText is left as it was typed."""
    for name, text in pages(site).items():
        assert not re.search(r":(?:math|class|func|meth|mod):|\.\. math|arithmatex", text), name
        assert "\\log" not in text, name


def test_command_line_page_has_every_option(site: Path) -> None:
    text = unescape(re.sub(r"<[^>]*>", "", (site / "command-line.html").read_text("utf-8")))
    measure.register(cli)

    def check(name: str, command: click.Command) -> None:
        assert name in text
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                for option in parameter.opts:
                    assert option in text, f"{name} {option}"
        if isinstance(command, click.Group):
            for key, member in command.commands.items():
                check(f"{name} {key}", member)

    check("openmm-eqflow", cli)


def test_reference_covers_the_package(site: Path) -> None:
    text = "".join(t for name, t in pages(site).items() if name.startswith("api/"))
    package = ROOT / "openmm_eqflow"
    for path in package.rglob("*.py"):
        module = ".".join(("openmm_eqflow", *path.relative_to(package).with_suffix("").parts))
        module = module.removesuffix(".__init__")
        if module != "openmm_eqflow":
            assert f'id="{module}"' in text, module
    for name, home in openmm_eqflow._HOMES.items():
        defined = getattr(openmm_eqflow, name).__module__
        assert f'id="{defined}.{name}"' in text, f"{home}.{name}"


def test_equation_map_is_that_of_the_package(site: Path) -> None:
    text = (site / "equation-map.html").read_text("utf-8")
    lines = (openmm_eqflow.__doc__ or "").splitlines()
    rulers = [k for k, line in enumerate(lines) if line.startswith("====")]
    for line in lines[rulers[1] + 1 : rulers[2]]:
        _, dotted, test = line.rsplit(None, 2)
        assert f"#openmm_eqflow.{dotted}" in text
        assert test.split("::")[1] in text
