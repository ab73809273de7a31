"""Command line, third part: many molecules."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from openmm_eqflow.cli.progress import stage_progress
from openmm_eqflow.files import write_json
from openmm_eqflow.training.recipes import BUDGETS

__all__ = [
    "SOME_FAILED",
    "campaign",
]

console = Console()
#: Exit code where the campaign is over and a molecule failed.
SOME_FAILED = 3


@click.command()
@click.argument("molecules", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder of the results; the same command goes on with what it holds.",
)
@click.option(
    "--budget",
    type=click.Choice([*BUDGETS, "anneal"]),
    default="standard",
    show_default=True,
    help="Of rows without one; anneal samples without reference data.",
)
@click.option(
    "--n-samples",
    type=click.IntRange(100),
    default=10_000,
    show_default=True,
    help="Independent samples of anneal.",
)
@click.option(
    "--workers",
    type=click.IntRange(1),
    help="Molecules at once on this machine (default one for every two cores).",
)
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Dask scheduler that runs already, such as tcp://host:8786; its workers do the work.",
)
@click.option("--retry", is_flag=True, help="Also do again what failed.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write all rows here.")
def campaign(molecules: Path, out: Path, **given: Any) -> int:
    """Run many molecules, named in a CSV file, each through init and run.

    Columns: name; smiles, sdf, pdb or folder; with pdb forcefield, system or topology; charges,
    temperature, budget, seed. A molecule that fails is told in the tables and stops no other.
    Needs openmm-eqflow[campaign].
    """
    from openmm_eqflow.report.campaign import write_overview
    from openmm_eqflow.runs.campaign import run_campaign

    with stage_progress("campaign", console) as progress:

        def ended(rows: list[dict[str, Any]]) -> None:
            write_overview(out, rows)
            counts = Counter(row["status"] for row in rows)
            over = len(rows) - counts["waiting"]
            text = f"{over} of {len(rows)} molecules, {counts['failed']} failed"
            progress(over / len(rows), text)

        rows = run_campaign(
            molecules,
            out,
            budget=given["budget"],
            n_samples=given["n_samples"],
            n_workers=given["workers"],
            scheduler=given["scheduler"],
            retry=given["retry"],
            ended=ended,
        )
    if given["json_path"] is not None:
        write_json(given["json_path"], {"molecules": rows})
    failed = [row for row in rows if row["status"] == "failed"]
    for row in failed:
        line = f"failed: {row['name']}: {row['message']}"
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    console.print(
        f"{len(rows) - len(failed)} of {len(rows)} molecules done; wrote {out / 'index.html'}",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
    return SOME_FAILED if failed else 0
