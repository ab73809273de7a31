"""What MkDocs does to the pages.

``<!-- modules: PATTERNS -->`` becomes the reference of those modules. Parts marked
``<!-- generate: NAME -->`` are made from the package itself, so that they cannot drift: the
command line from click, the recipes from the code, the equation map from the package's docstring,
changelog and citation from their files. Equations become MathML, which browsers draw without any
script.
"""

from __future__ import annotations

import inspect
import re
import sys
from fnmatch import fnmatch
from html import escape, unescape
from pathlib import Path
from typing import Any

import click
import yaml
from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import openmm_eqflow  # noqa: E402
from openmm_eqflow.cli import cli, measure  # noqa: E402
from openmm_eqflow.training.recipes import BUDGETS, make_recipe  # noqa: E402


def commands() -> list[tuple[str, click.Command]]:
    """Every command with its full name, groups before their members."""
    measure.register(cli)
    found: list[tuple[str, click.Command]] = []

    def walk(name: str, command: click.Command) -> None:
        found.append((name, command))
        if isinstance(command, click.Group):
            for key in command.commands:
                walk(f"{name} {key}", command.commands[key])

    walk("openmm-eqflow", cli)
    return found


def cell(text: str) -> str:
    """One line of HTML: a bar would end the cell of a table, in code too."""
    return escape(" ".join(text.split()), quote=False).replace("|", "&#124;")


def command_line() -> str:
    lines = []
    for name, command in commands():
        context = click.Context(command, info_name=name, **cli.context_settings)
        usage = " ".join([name, *command.collect_usage_pieces(context)])
        help_text = inspect.cleandoc(command.help or "")
        lines += [f"## {name}", "", help_text, "", "```text", usage, "```", ""]
        if isinstance(command, click.Group):
            members = ", ".join(f"`{key}`" for key in command.commands)
            lines += [f"Commands: {members}.", ""]
        options = [p for p in command.get_params(context) if isinstance(p, click.Option)]
        lines += ["| option | meaning |", "|---|---|"]
        for option in options:
            record = option.get_help_record(context)
            if record is not None:
                lines.append(f"| <code>{cell(record[0])}</code> | {cell(record[1])} |")
        lines.append("")
    return "\n".join(lines)


def map_rows() -> list[tuple[str, str, str, str]]:
    """Rows of the map: equation, symbol, dotted path, test (split as the test of the map does)."""
    lines = (openmm_eqflow.__doc__ or "").splitlines()
    rulers = [k for k, line in enumerate(lines) if line.startswith("====")]
    rows = []
    for line in lines[rulers[1] + 1 : rulers[2]]:
        left, dotted, test = line.rsplit(None, 2)
        equation, symbol = re.split(r"\s{2,}", left, maxsplit=1)
        rows.append((equation, symbol, dotted, test))
    return rows


def equation_map() -> str:
    lines = ["| equation | symbol | code, and the test of it |", "|---|---|---|"]
    for equation, symbol, dotted, test in map_rows():
        file, name = test.split("::")
        where = f"[`{dotted}`][openmm_eqflow.{dotted}]"
        lines.append(
            f"| <code>{cell(equation)}</code> | {cell(symbol)} "
            f"| {where}<br>`{file}::{name}` |"
        )
    return "\n".join(lines)


def changelog() -> str:
    return (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("\n", 1)[1]


def citation() -> str:
    """BibTeX entries from CITATION.cff."""
    record: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    (paper,) = record["references"]
    names = " and ".join(f"{a['family-names']}, {a['given-names']}" for a in paper["authors"])
    return f"""```text
@inproceedings{{koehler2020equivariant,
  title     = {{{paper["title"]}}},
  author    = {{{names}}},
  booktitle = {{{paper["collection-title"]}}},
  volume    = {{{paper["volume"]}}},
  pages     = {{{paper["start"]}--{paper["end"]}}},
  year      = {{{paper["year"]}}}
}}

@software{{{record["title"]},
  title   = {{{record["title"]}}},
  author  = {{{{{record["authors"][0]["name"]}}}}},
  version = {{{record["version"]}}}
}}
```"""


def modules() -> list[str]:
    """Every module of the package, without its own name; packages by their plain name."""
    package = ROOT / "openmm_eqflow"
    paths = (p.relative_to(package).with_suffix("") for p in package.rglob("*.py"))
    names = {".".join(p.parts).removesuffix("__init__").rstrip(".") for p in paths}
    return sorted(names - {"", "__main__"})


LISTED = re.compile(r"^<!-- modules: (.*?) -->$", re.M)


def listed(page: str) -> list[str]:
    """Modules a page asks for, in order: names or patterns; ``rest`` is what no page names."""
    found: list[str] = []
    for pattern in " ".join(LISTED.findall(page)).split():
        if pattern == "rest":
            pages = [p.read_text(encoding="utf-8") for p in (ROOT / "docs" / "api").glob("*.md")]
            named = {m for text in pages if " rest " not in text for m in listed(text)}
            found += [m for m in modules() if m not in named]
        else:
            found += [m for m in modules() if fnmatch(m, pattern) and m not in found]
    return found


def recipes() -> str:
    """Settings of molecules and clusters; three values are those of the three budgets."""
    kinds = ("molecule", "cluster")
    made = {kind: [make_recipe(kind, b).to_dict() for b in BUDGETS] for kind in kinds}
    lines = ["| key | molecule | cluster |", "|---|---|---|"]
    for key in made["molecule"][0]:
        row = []
        for kind in kinds:
            values = [recipe[key] for recipe in made[kind]]
            if not any(isinstance(value, dict) for value in values):
                shown = [f"{v:g}" if isinstance(v, float) else str(v) for v in values]
                row.append(shown[0] if len(set(shown)) == 1 else " / ".join(shown))
        if len(row) == 2:
            lines.append(f"| `{key}` | {row[0]} | {row[1]} |")
    return "\n".join(lines)


GENERATORS = {
    "command-line": command_line,
    "equation-map": equation_map,
    "changelog": changelog,
    "citation": citation,
    "recipes": recipes,
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in generated parts, drop what is meant for the tests."""
    markdown = re.sub(r"^<!-- test: .*? -->\n", "", markdown, flags=re.M | re.S)
    reference = "\n\n".join(f"::: openmm_eqflow.{name}" for name in listed(markdown))
    markdown = LISTED.sub(lambda _: reference, markdown, count=1)
    return re.sub(
        r"^<!-- generate: ([a-z-]+) -->$", lambda m: GENERATORS[m[1]](), markdown, flags=re.M
    )


def mathml(source: str, display: str) -> str:
    """Convert LaTeX; a function's name needs a space before its argument, as TeX puts it."""
    tex = re.sub(r"\\(log|sin|cos|exp|det)\s*(?=[A-Za-z\\])", r"\\\1\\,", unescape(source).strip())
    return str(convert(tex, display=display))


def on_page_content(html: str, **_: Any) -> str:
    """Turn arithmatex spans into MathML."""

    def inline(match: re.Match[str]) -> str:
        return mathml(match[1], "inline")

    def block(match: re.Match[str]) -> str:
        return mathml(match[1], "block")

    html = re.sub(
        r'<span class="arithmatex">\\\((.*?)\\\)</span>', inline, html, flags=re.S
    )
    return re.sub(
        r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', block, html, flags=re.S
    )
