"""Test NLL against the number of training frames (Köhler, Klein, Noé 2020, data efficiency).

Four fields, with and without data augmentation, on dw4 and lj13:

    python examples/paper_2020/nll_vs_size.py --out paper
"""

from __future__ import annotations

from collections.abc import Sequence

from experiment import (
    all_records,
    argument_parser,
    errors_in_one_line,
    prepare,
    tasks_of,
    train_all,
)
from tables import draw_nll, nll_table, write_result


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure, write table and plot."""
    parser = argument_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", type=int, default=[10, 100, 1_000, 10_000])
    arguments = parser.parse_args(argv)
    with errors_in_one_line():
        frames = prepare(arguments, arguments.sizes)
        train_all(tasks_of(arguments, arguments.sizes), frames, arguments)
        records = all_records(arguments.out / "trainings")
        write_result(arguments.out, "nll_vs_size", nll_table(records), draw_nll(records))


if __name__ == "__main__":
    main()
