"""Markdown tables and plots of the three experiments, made from the records alone."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from openmm_eqflow.files import atomic_path, write_text

Record = dict[str, Any]
#: Okabe and Ito 2008.
COLOURS = {
    "KernelField": "#E69F00",
    "LeaveOneOutField": "#0072B2",
    "EGNNField": "#009E73",
    "MLPField": "#D55E00",
}


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Join cells to a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def over_seeds(values: Sequence[float | None], digits: int = 2) -> str:
    """Mean and standard deviation over seeds; a value that is None was not finite."""
    finite = [v for v in values if v is not None and math.isfinite(v)]
    if not values:
        return "-"
    if len(finite) < len(values):
        return f"not finite ({len(values) - len(finite)} of {len(values)})"
    text = f"{statistics.fmean(finite):.{digits}f}"
    return text if len(finite) < 2 else f"{text} ± {statistics.stdev(finite):.{digits}f}"


def grouped(records: Iterable[Record], *keys: str) -> dict[tuple[Any, ...], list[Record]]:
    """Collect records by entries of their task, in order of appearance."""
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in records:
        groups[tuple(record["task"][key] for key in keys)].append(record)
    return dict(groups)


def label(field: str, augmented: bool) -> str:
    """Name of a row."""
    return f"{field}, augmented" if augmented else field


def seeds_and_machine(records: Sequence[Record]) -> str:
    """Name the seeds and the hardware behind the numbers."""
    seeds = sorted({record["task"]["seed"] for record in records})
    machines = sorted({record["machine"] for record in records})
    return f"Seeds {', '.join(map(str, seeds))}. {'; '.join(machines)}."


def value_table(
    records: Sequence[Record], value: Callable[[Record], float | None], corner: str
) -> str:
    """One row for each field, one column for each size."""
    sizes = sorted({record["task"]["size"] for record in records})
    rows = []
    for (field, augmented), group in grouped(records, "field", "augmented").items():
        by_size = grouped(group, "size")
        cells = [over_seeds([value(r) for r in by_size.get((n,), [])]) for n in sizes]
        rows.append([label(field, augmented), *cells])
    return markdown([corner, *(f"{n:,}" for n in sizes)], rows)


def budgets(records: Sequence[Record]) -> str:
    """Say what every training got."""
    found = set()
    for settings in (record["settings"] for record in records):
        seconds, steps = settings["seconds"], settings["steps"]
        stop = f"{seconds:g} s" if seconds else f"{steps:,} optimiser steps"
        found.add(f"{stop}, {settings['objective']}, batch {settings['batch_size']}")
    return "; or ".join(sorted(found))


def nll_table(records: Sequence[Record]) -> str:
    """Tables of every system and of what they cost."""
    parts = [
        "One thread for each training; mean ± standard deviation over seeds. "
        f"{seeds_and_machine(records)}\n"
    ]
    for (system,), group in grouped(records, "system").items():
        floor, error = group[0]["floor"], group[0]["floor_error"]
        parts += [
            f"**{system}** (every training: {budgets(group)}): mean of -log q over held-out "
            "frames, by number of training frames; "
            f"no model can be below {floor:.2f} ± {error:.2f}.\n",
            value_table(group, lambda r: r["test_nll"], "test NLL"),
            "The same above the floor, as mean log weight of the frames minus log Z (kT):\n",
            value_table(group, lambda r: r["excess"], "excess"),
        ]
    rows = []
    for (system, field), group in grouped(records, "system", "field").items():
        rows.append(
            [
                system,
                field,
                f"{group[0]['n_parameters']:,}",
                f"{statistics.fmean(r['n_steps'] for r in group):,.0f}",
                f"{statistics.fmean(r['training_seconds'] for r in group):.0f}",
                f"{group[0]['n_test']:,}",
                f"{statistics.fmean(r['n_ode_steps'] for r in group):.0f}",
                f"{statistics.fmean(r['evaluation_seconds'] for r in group):.0f}",
            ]
        )
    header = ["system", "field", "weights", "steps", "seconds", "test frames"]
    parts += ["Means over all trainings of a field:\n"]
    parts += [markdown([*header, "ODE steps", "seconds of the test"], rows)]
    return "\n".join(parts)


def ess_table(records: Sequence[Record]) -> str:
    """Relative ESS of flows and priors."""
    rows = []
    keys = ("system", "size", "field", "augmented")
    for (system, size, field, augmented), group in grouped(records, *keys).items():
        rows.append(
            [
                system,
                f"{size:,}",
                label(field, augmented),
                over_seeds([r["relative_ess"] for r in group], 4),
                f"{group[0]['n']:,}",
                over_seeds([r["prior_relative_ess"] for r in group], 4),
                f"{group[0]['prior_n']:,}",
                over_seeds([r["pareto_k"] for r in group]),
                over_seeds([r["log_z"] for r in group]),
                f"{group[0]['known_log_z']:.2f}",
            ]
        )
    header = ["system", "trained on", "field", "relative ESS", "n", "prior alone", "n"]
    note = f"Raw weights, mean ± standard deviation over seeds. {seeds_and_machine(records)}\n"
    return note + "\n" + markdown([*header, "Pareto k", "log Z", "known"], rows)


def minima_table(records: Sequence[Record]) -> str:
    """Distinct minima of every source; means over seeds."""

    def mean(group: Sequence[Record], source: str, key: str) -> str:
        return over_seeds([float(r[source][key]) for r in group], 0)

    rows, low, shares = [], [], []
    keys = ("system", "size", "field", "augmented")
    for (system, size, field, augmented), group in grouped(records, *keys).items():
        name = label(field, augmented)
        cells = [system, f"{size:,}", name, mean(group, "training", "n_distinct")]
        for source in ("flow", "reference", "prior"):
            cells.append(f"{group[0][source]['n_quenched']:,}")
            cells += [mean(group, source, key) for key in ("n_distinct", "n_new")]
        cells.append(over_seeds([float(r["n_new_confirmed"]) for r in group], 0))
        rows.append(cells)
        shares.append(
            [name]
            + [
                over_seeds([r[source]["lowest_share"] for r in group], 3)
                for source in ("training", "reference", "flow", "prior")
            ]
        )
        first = group[0]
        for source in ("energies", "new_energies"):
            what = "all" if source == "energies" else "not in the training set"
            lowest = ", ".join(f"{u:.3f}" for u in first["flow"][source][:5]) or "none"
            low.append([name, str(first["task"]["seed"]), what, lowest])
    header = ["system", "trained on", "field", "training: distinct"]
    for source in ("flow", "unseen frames", "prior"):
        header += [f"{source}: n", "distinct", "new"]
    note = (
        "Distinct minima after quenching, and those that quenching the training set does not "
        "give. The last column: minima new in the flow that the unseen frames have too. Mean ± "
        f"standard deviation over seeds. {seeds_and_machine(records)}\n"
    )
    lowest_note = "Lowest energies among the quenched flow samples, kT:\n"
    lowest = markdown(["field", "seed", "minima", "five lowest"], low)
    table = markdown([*header, "confirmed"], rows)
    share_note = "Share that ends in the lowest minimum of all:\n"
    share = markdown(["field", "training", "unseen frames", "flow", "prior"], shares)
    return "\n".join([note, table, share_note, share, lowest_note, lowest])


def draw_minima(records: Sequence[Record]) -> Figure:
    """Energies of minima found by quenching the training set, and of new ones of the flows."""
    groups = grouped(records, "system", "size", "field", "augmented")
    figure = Figure(figsize=(6.0, 1.2 + 0.5 * len(groups)), layout="constrained")
    axes = figure.add_subplot()
    names: list[str] = []
    for (system, size, field, augmented), group in groups.items():
        row, first = len(names), group[0]
        for shift, energies, colour in (
            (-0.15, first["training"]["energies"], "black"),
            (0.15, first["flow"]["new_energies"], COLOURS[field]),
        ):
            axes.plot(energies, [row + shift] * len(energies), "|", color=colour, markersize=8)
        names.append(f"{system}, {size:,}: {label(field, augmented)}")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("energy of minima, kT")
    axes.set_title("black: training set; colour: new in the flow", fontsize=8)
    return figure


def draw_nll(records: Sequence[Record]) -> Figure:
    """Excess over the floor against the number of training frames."""
    systems = grouped(records, "system")
    figure = Figure(figsize=(max(7.0, 4.2 * len(systems)), 3.8), layout="constrained")
    for k, ((system,), of_system) in enumerate(systems.items()):
        axes = figure.add_subplot(1, len(systems), k + 1)
        for (field, augmented), group in grouped(of_system, "field", "augmented").items():
            x, y, error = [], [], []
            for (size,), same in sorted(grouped(group, "size").items()):
                values = [r["excess"] for r in same if r["excess"] is not None]
                if len(values) == len(same):
                    x.append(size)
                    y.append(max(statistics.fmean(values), 1e-3))
                    error.append(statistics.stdev(values) if len(values) > 1 else 0.0)
            axes.errorbar(
                x,
                y,
                [[min(e, 0.99 * v) for e, v in zip(error, y, strict=True)], error],
                color=COLOURS[field],
                linestyle="--" if augmented else "-",
                marker="o",
                markersize=3.5,
                capsize=2,
                label=label(field, augmented),
            )
        axes.set(xscale="log", yscale="log", title=system, xlabel="training frames")
        axes.set_ylabel("test NLL above the floor, kT")
        axes.grid(alpha=0.3)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, fontsize=7)
    return figure


def draw_ess(records: Sequence[Record]) -> Figure:
    """Relative ESS as bars, one for each field; a dot for each seed."""
    systems = grouped(records, "system", "size")
    figure = Figure(figsize=(4.2 * len(systems), 3.0), layout="constrained")
    for k, ((system, size), of_system) in enumerate(systems.items()):
        axes = figure.add_subplot(1, len(systems), k + 1)
        names: list[str] = []
        for (field, augmented), group in grouped(of_system, "field", "augmented").items():
            values = [r["relative_ess"] for r in group]
            row = len(names)
            colour, hatch = COLOURS[field], "//" if augmented else None
            axes.barh(row, statistics.fmean(values), color=colour, alpha=0.5, hatch=hatch)
            axes.plot(values, [row] * len(values), ".", color="black", markersize=4)
            names.append(label(field, augmented))
        prior = statistics.fmean(r["prior_relative_ess"] for r in of_system)
        axes.axvline(prior, color="grey", linestyle=":", label="prior alone")
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.invert_yaxis()
        axes.set(xlabel="raw relative ESS", title=f"{system}, {size:,} frames")
        axes.legend(fontsize=7)
    return figure


def write_result(out: Path, name: str, text: str, figure: Figure) -> None:
    """Write OUT/NAME.md and OUT/NAME.png and print the table."""
    write_text(out / f"{name}.md", text)
    with atomic_path(out / f"{name}.png") as temporary:
        figure.savefig(temporary, dpi=150)
    print(text)
