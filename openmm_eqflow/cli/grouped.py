"""Options under headings in the help of a command that has many."""

from __future__ import annotations

from typing import Any

import click

__all__ = [
    "Grouped",
]


class Grouped(click.Command):
    """A command whose help lists options under headings.

    Parameters
    ----------
    headings
        Names of parameters by heading, in the order of the help; the others come last.
    """

    def __init__(
        self, *arguments: Any, headings: dict[str, tuple[str, ...]], **named: Any
    ) -> None:
        super().__init__(*arguments, **named)
        self.headings = headings

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write them."""
        options = (p for p in self.get_params(ctx) if isinstance(p, click.Option))
        found = {str(p.name): p.get_help_record(ctx) for p in options}
        listed = {name for names in self.headings.values() for name in names}
        rest = tuple(name for name in found if name not in listed)
        for heading, names in {**self.headings, "Other": rest}.items():
            rows = [found[name] for name in names]
            with formatter.section(heading):
                formatter.write_dl([row for row in rows if row is not None])
