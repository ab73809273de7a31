"""Put tables and plots of a results folder into the documentation.

    python examples/paper_2020/results_page.py paper

rewrites what is between the markers of docs/paper_2020.md and copies the plots to docs/images/.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from openmm_eqflow.files import atomic_path, write_text

ROOT = Path(__file__).resolve().parents[2]
TITLES = {
    "nll_vs_size": "Test NLL of {}",
    "reweighting": "Raw relative ESS of {}",
    "new_minima": "Minima found by {}",
}


def section(out: Path, name: str, images: Path) -> str:
    """Text of one experiment; copies its plot."""
    if not (out / f"{name}.md").is_file():
        return f"Not run yet: `python examples/paper_2020/{name}.py`.\n"
    picture = f"paper-2020-{name.replace('_', '-')}.png"
    with atomic_path(images / picture) as temporary:
        shutil.copyfile(out / f"{name}.png", temporary)
    title = TITLES[name].format("the four fields")
    text = (out / f"{name}.md").read_text(encoding="utf-8")
    return f"{text}\n![{title}]({images.name}/{picture})\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Rewrite the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder given to the experiments as --out")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "paper_2020.md")
    arguments = parser.parse_args(argv)
    if not any((arguments.out / f"{name}.md").is_file() for name in TITLES):
        raise SystemExit(f"error: {arguments.out} has no tables; run an experiment with --out")
    text = arguments.page.read_text(encoding="utf-8")
    for name in TITLES:
        made = section(arguments.out, name, arguments.page.parent / "images")
        before, found, after = text.partition(f"<!-- begin {name} -->\n")
        _, closed, rest = after.partition(f"<!-- end {name} -->")
        if not (found and closed):
            raise SystemExit(f"error: {arguments.page} has no markers for {name}; restore them")
        text = f"{before}{found}\n{made}\n{closed}{rest}"
    write_text(arguments.page, text)
    print(f"wrote {arguments.page}")


if __name__ == "__main__":
    main()
