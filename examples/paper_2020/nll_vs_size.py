"""Test NLL against the number of training frames (Köhler, Klein, Noé 2020, data efficiency).

Four fields, with and without data augmentation, on dw4 and lj13:

    python examples/paper_2020/nll_vs_size.py --out paper
"""

from __future__ import annotations

from collections.abc import Sequence

from experiment import argument_parser, budget_of, errors_in_one_line, prepare, tasks_of, train_all
from tables import draw_nll, nll_table, write_result


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure, write table and plot."""
    parser = argument_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", type=int, default=[10, 100, 1_000, 10_000])
    arguments = parser.parse_args(argv)
    with errors_in_one_line():
        frames = prepare(arguments, arguments.sizes)
        records = train_all(tasks_of(arguments, arguments.sizes), frames, arguments)
        text = nll_table(records, budget_of(arguments))
        write_result(arguments.out, "nll_vs_size", text, draw_nll(records))


if __name__ == "__main__":
    main()
