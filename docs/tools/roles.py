r"""Docstrings are written in reStructuredText; the API pages are Markdown.

Roles become links where their target is documented, ``:math:`` and ``.. math::`` become the
equations of the pages, literal blocks and tables become code blocks.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`(~?)([^`]+)`", re.S)
MATH = re.compile(r":math:`([^`]+)`", re.S)
MATH_BLOCK = re.compile(r"^( *)\.\. math::(.*(?:\n(?:\1 +.*| *(?=\n\1 +)))*)", re.M)
LITERAL = re.compile(r"^( *)(\S.*)::\n((?: *\n|\1 +.*(?:\n|$))+)", re.M)
TABLE = re.compile(r"^( *)=+ [= ]*=\n(?:.*\n)*?\1=+ [= ]*=\n(?:.*\n)*?\1=+ [= ]*=$", re.M)
PARAMETERS = re.compile(r"^Parameters\n-+\n(.*?)(?=^\w[\w ]*\n-+\n|\Z)", re.M | re.S)
NAMES = re.compile(r"^(\w+(?:, \**\w+)+)\n((?:\s+\S.*(?:\n|$)|\n(?= ))+)", re.M)
PROMPTS = re.compile(r"(?:^>>> .*\n(?:^(?:>>>|\.\.\.) .*(?:\n|$))*)", re.M)


def _role(match: re.Match[str]) -> str:
    target = " ".join(match[2].split())
    shown = target.rsplit(".", 1)[-1] if match[1] else target
    if "." not in target:
        return f"`{shown}`"
    return f'<autoref optional identifier="{target}"><code>{shown}</code></autoref>'


def _math_block(match: re.Match[str]) -> str:
    equation = " ".join(match[2].split())
    return f"{match[1]}$$\n{match[1]}{equation}\n{match[1]}$$\n"


def _fence(text: str, indent: str) -> str:
    body = textwrap.indent(textwrap.dedent(text).strip("\n"), indent)
    return f"{indent}```text\n{body}\n{indent}```"


def _one_by_one(section: re.Match[str]) -> str:
    """Give each of several parameters described together an entry with its own type."""
    return NAMES.sub(
        lambda m: "".join(f"{name}\n{m[2].rstrip()}\n" for name in m[1].split(", ")), section[0]
    )


def _session(match: re.Match[str]) -> str:
    return "```pycon\n" + re.sub(r" *# doctest:.*", "", match[0]).rstrip() + "\n```\n"


def markdown(text: str) -> str:
    """Rewrite one docstring."""
    text = MATH_BLOCK.sub(_math_block, text)
    text = TABLE.sub(lambda m: "\n" + _fence(m[0], m[1]) + "\n", text)
    text = LITERAL.sub(lambda m: f"{m[1]}{m[2]}:\n\n{_fence(m[3], m[1])}\n\n", text)
    text = PARAMETERS.sub(_one_by_one, text)
    if "\nExamples\n---" not in text:  # sections of that name are known as they are
        text = PROMPTS.sub(_session, text)
    text = MATH.sub(lambda m: f"${' '.join(m[1].split())}$", text)
    return ROLE.sub(_role, text)


class Roles(Extension):
    """Rewrite every docstring once, when its object is made."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None and not obj.is_alias:
            obj.docstring.value = markdown(obj.docstring.value)
