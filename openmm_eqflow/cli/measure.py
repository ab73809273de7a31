"""Command line, second part: measure flows and machines, compare runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from openmm_eqflow.cli.campaign import campaign
from openmm_eqflow.cli.progress import stage_progress
from openmm_eqflow.errors import ConfigurationError, EqFlowError
from openmm_eqflow.files import write_json

__all__ = [
    "device_option",
    "json_option",
    "register",
    "seed_option",
]

console = Console()
_FEW = 50  # effective samples below which a temperature is warned about
_HEAVY = 0.7  # Pareto k above which it is


class _Seed(click.ParamType[int]):
    """A whole number that every random stream takes."""

    name = "integer"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Return it, or complain."""
        seed: int = click.INT.convert(value, param, ctx)
        if not 0 <= seed < 2**32:
            self.fail(f"{seed} is not in the range from 0 to 2^32 - 1.", param, ctx)
        return seed


class _Kelvins(click.ParamType[tuple[float, ...]]):
    """Temperatures in kelvin, with commas between."""

    name = "kelvins"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        """Return them, or complain."""
        try:
            kelvins = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is no list of temperatures such as 280,300,350.", param, ctx)
        wrong = [t for t in kelvins if not 1.0 <= t <= 10_000.0]
        if wrong:
            self.fail(f"{wrong[0]:g} K is not between 1 and 10000.", param, ctx)
        return kelvins


seed_option = click.option("--seed", type=_Seed(), help="Random seed (default 0).")
device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    help="Of the network; auto is a CUDA GPU if there is one (default auto, or that of the run).",
)
json_option = click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write the outcome here."
)
_own_device = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Of the network; auto is a CUDA GPU if there is one.",
)


def register(group: click.Group) -> None:
    """Add the commands of this module."""
    for command in (evaluate, audit, bench, compare, publish, campaign, doctor):
        group.add_command(command)


@click.command()
@click.argument("name_or_run")
@click.option(
    "--n-samples",
    type=click.IntRange(10),
    default=10_000,
    show_default=True,
    help="Independent samples of the flow, and as many of the prior.",
)
@seed_option
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write metrics here.")
@click.option("--card", "renew", is_flag=True, help="Renew the card beside the flow.")
@click.option("--relax", "relaxed", is_flag=True, help="With Monte Carlo between its steps.")
@click.option(
    "--temperatures",
    type=_Kelvins(),
    metavar="280,300,350",
    help="Also log Z, mean energy and heat capacity at these, K: levels go on from the samples.",
)
@click.option(
    "--frames",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write frames drawn by weight here, for each temperature.",
)
@_own_device
def evaluate(name_or_run: str, n_samples: int, seed: int | None, **given: Any) -> None:
    """Measure a flow: raw weights of fresh independent samples."""
    from openmm_eqflow.analysis.temperatures import thermodynamics
    from openmm_eqflow.flows.relaxed import relax
    from openmm_eqflow.parallel import is_main
    from openmm_eqflow.runs.annealing import write_weighted
    from openmm_eqflow.runs.evaluation import at_other_temperatures, evaluate_flow
    from openmm_eqflow.runs.publish import renew_card
    from openmm_eqflow.runs.stages import build_target, card_of, flow_of
    from openmm_eqflow.units import kelvin

    json_path, card = given["json_path"], card_of(name_or_run) if given["renew"] else None
    system, flow, test = flow_of(name_or_run, given["device"])
    if given["relaxed"] and card is not None:
        raise ConfigurationError("a card is about the flow itself: take --card or --relax")
    with build_target(system) as target, stage_progress("evaluate", console) as progress:
        flow = relax(flow.maps, target) if given["relaxed"] else flow
        metrics, samples, _ = evaluate_flow(
            flow,
            target,
            n_samples=n_samples,
            seed=0 if seed is None else seed,
            name=system.name,
            test_frames=test,
            progress=progress,
        )
        own = kelvin(system.temperature)
        kelvins = given["temperatures"] or ((own,) if given["frames"] else ())
        stations = at_other_temperatures(flow, target, samples, kelvins, seed=seed or 0)
    if given["relaxed"]:
        metrics["weights_of"] = "paths"
    rows = [
        thermodynamics(s.log_weight.numpy(), s.u.numpy(), own, s.kelvin) for s in stations
    ]
    if rows:
        metrics["temperatures"] = rows
    if json_path is not None and is_main():
        write_json(json_path, metrics)
    if card is not None and is_main():
        renew_card(card, flow, metrics)
    for key, value in metrics.items():
        if key != "temperatures":
            shown = f"{value:.6g}" if isinstance(value, float) else value
            console.print(f"{key:<32} {shown}", highlight=False)
    if rows:
        _print_temperatures(rows)
    if given["frames"] is not None and is_main():
        for station in stations:
            file = write_weighted(given["frames"], system, station, seed=seed or 0)
            console.print(f"wrote {file}", highlight=False, soft_wrap=True, markup=False)


def _print_temperatures(rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("K", "effective", "log Z", "potential, kJ/mol", "its C, J/(mol K)"):
        table.add_column(heading)
    for row in rows:
        table.add_row(
            f"{row['kelvin']:g}",
            f"{row['effective_samples']:,.0f}",
            f"{row['log_z']:.3f} +- {row['log_z_error']:.3f}",
            f"{row['mean_potential']:.2f} +- {row['mean_potential_error']:.2f}",
            f"{1e3 * row['heat_capacity']:.1f} +- {1e3 * row['heat_capacity_error']:.1f}",
        )
    console.print(table)
    few = [
        f"{row['kelvin']:g} K"
        for row in rows
        if row["effective_samples"] < _FEW or row["pareto_k"] is None or row["pareto_k"] > _HEAVY
    ]
    if few:
        Console(stderr=True).print(
            f"warning: a few weights carry {', '.join(few)} (below {_FEW} effective samples, or "
            f"Pareto k above {_HEAVY}): errors are too small there; raise --n-samples, or make a "
            "run at that temperature (init --temperature)",
            highlight=False,
            soft_wrap=True,
        )


@click.command()
@click.argument("name_or_run")
@click.option(
    "--n-samples",
    type=click.IntRange(16),
    default=256,
    show_default=True,
    help="Flow samples and test frames on which log q is compared.",
)
@seed_option
@json_option
@_own_device
def audit(
    name_or_run: str, n_samples: int, seed: int | None, json_path: Path | None, device: str
) -> None:
    """Check the accuracy of log q."""
    from openmm_eqflow.flows.audit import audit as run_audit
    from openmm_eqflow.runs.stages import flow_of
    from openmm_eqflow.seeds import child

    _, flow, test = flow_of(name_or_run, device)
    generator = child(0 if seed is None else seed, "audit command")
    report = run_audit(
        flow, n=n_samples, x=None if test is None else test[:n_samples], generator=generator
    )
    console.print_json(json.dumps(report))
    if json_path is not None:
        write_json(json_path, report)
    if not report["passed"]:
        raise EqFlowError(
            f"log q is off by {report['log_q_error_p99']:.2g} kT (99th percentile), more than "
            f"{report['tolerance']:g}: the flow can't be used for acceptance"
        )


@click.group()
def bench() -> None:
    """Measure speed on this machine."""


def _bench_command(name: str, summary: str, *parameters: Any) -> None:
    def body(json_path: Path, **arguments: Any) -> None:
        from importlib import import_module

        module = import_module(f"openmm_eqflow.bench.{name}")
        given = {key: value for key, value in arguments.items() if value not in (None, ())}
        result = module.run_bench(**given, json_path=json_path)
        console.print_json(json.dumps(result))

    body = click.option(
        "--json",
        "json_path",
        type=click.Path(path_type=Path),
        required=True,
        help="Write the result here.",
    )(body)
    for parameter in reversed(parameters):
        body = parameter(body)
    bench.command(name, help=summary)(body)


_existing = click.Path(exists=True, path_type=Path)
_bench_command("energies", "Energy evaluations per second of every evaluator.")
_bench_command(
    "chart",
    "Value and score of both ends of a path in the chart: compiled and by autograd.",
    click.argument("systems", metavar="[SYSTEM]...", nargs=-1),
    click.option("--batch", type=click.IntRange(1), help="Configurations at once (default 512)."),
)
_bench_command("divergence", "Field, exact divergence and the tangents of an EGNN.")
_bench_command(
    "mixing",
    "Effective samples per second: MD, tempering, flow.",
    click.argument("name_or_run", metavar="SYSTEM_OR_RUN"),
    click.option("--seconds", type=click.FloatRange(1), help="Per method (default 100)."),
    click.option("--seed", type=int, help="Random seed (default 0)."),
)
_bench_command(
    "prior",
    "ESS of the internal-coordinate prior alone, by number of frames and seed.",
    click.argument("system_name", metavar="SYSTEM"),
    click.argument("trajectory", type=_existing),
    click.option(
        "--n-frames",
        "sizes",
        type=click.IntRange(10),
        multiple=True,
        help="Repeat for several (default 2000 and 20000).",
    ),
    click.option(
        "--seed", "seeds", type=int, multiple=True, help="Repeat for several (default 0, 1, 2)."
    ),
    click.option("--n-samples", type=click.IntRange(10), help="Per case (default 20000)."),
)
_bench_command(
    "layers",
    "ESS of a stochastic flow with and without its field, by number of levels.",
    click.argument("system_name", metavar="SYSTEM"),
    click.option(
        "--n-levels",
        type=click.IntRange(2),
        multiple=True,
        help="Repeat for several (default 250, 500 and 1000).",
    ),
    click.option("--n-samples", type=click.IntRange(100), help="Per case (default 4096)."),
    click.option("--seed", type=int, help="Random seed (default 0)."),
)
_bench_command(
    "gpu",
    "Samples, energies, fields and training steps per second on a GPU and on two CPU cores.",
    click.option(
        "--device",
        type=click.Choice(["cuda", "cpu"]),
        default="cuda",
        show_default=True,
        help="What is compared with two CPU cores.",
    ),
    click.option("--system", "systems", multiple=True, help="Repeat for several (default all)."),
    click.option("--seconds", type=float, help="Begin nothing later than this (default 400)."),
    click.option("--run", help="Also time the stages of a quick run of this system."),
    click.option("--n", type=click.IntRange(2), help="Samples per repeat (default: what fits)."),
)
_bench_command(
    "matching",
    "Flow-matching loss of the leave-one-out field and of an EGNN after the same steps.",
    click.argument("run_path", metavar="RUN", type=_existing),
    click.option("--n-steps", type=click.IntRange(1), help="Of each field (default 2000)."),
    click.option("--seed", type=int, help="Random seed (default 0)."),
)


@bench.command()
@click.argument("run", type=_existing)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder of the results; the same command continues what it holds.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=300.0,
    show_default=True,
    help="Training time of each objective.",
)
@click.option("--objectives", help="Comma-separated names (default all that suit the system).")
@click.option(
    "--schedule",
    "schedules",
    multiple=True,
    metavar="NAME=JSON",
    help='Also this schedule, {"nll": [[0, 1], [1, 0.5]], ...}; repeat for several.',
)
@click.option(
    "--n-samples",
    type=click.IntRange(10),
    default=2000,
    show_default=True,
    help="Independent samples per measurement.",
)
@click.option(
    "--points",
    type=click.IntRange(1, 20),
    default=6,
    show_default=True,
    help="Measurements, each at twice the time of the one before.",
)
@click.option(
    "--warmup-steps",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    help="First steps of each, over which the learning rate rises.",
)
@seed_option
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Copy the result here.")
def objectives(
    run: Path, out: Path, seed: int | None, objectives: str | None, **given: Any
) -> None:
    """ESS against training time: every objective alone, and schedules."""
    from openmm_eqflow.bench.objectives import parse_schedules, run_bench, table

    names = [name.strip() for name in (objectives or "").split(",") if name.strip()]
    with stage_progress("objectives", console) as progress:
        result = run_bench(
            run,
            out=out,
            seconds=given["seconds"],
            objectives=names or None,
            schedules=parse_schedules(given["schedules"]),
            n_samples=given["n_samples"],
            n_points=given["points"],
            warmup_steps=given["warmup_steps"],
            seed=0 if seed is None else seed,
            json_path=given["json_path"],
            progress=progress,
        )
    console.print(table(result), highlight=False, soft_wrap=True, markup=False)
    wrote = f"wrote {out / 'objectives.json'}, .md and .png"
    console.print(wrote, highlight=False, soft_wrap=True, markup=False)


@click.command()
@click.argument(
    "runs", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, file_okay=False)
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("comparison.html"),
    show_default=True,
    help="HTML file to write.",
)
@json_option
def compare(runs: tuple[Path, ...], out: Path, json_path: Path | None) -> None:
    """Table and overlays of several runs."""
    from openmm_eqflow.report.compare import compare as compare_runs
    from openmm_eqflow.runs.directory import RunDirectory

    console.print(f"wrote {compare_runs(list(runs), out)}", highlight=False, soft_wrap=True)
    if json_path is not None:
        figures = {str(run): RunDirectory.open(run).metrics() for run in runs}
        write_json(json_path, {"page": str(out), "runs": figures})


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Folder, such as a system's."
)
@json_option
def publish(run: Path, out: Path, json_path: Path | None) -> None:
    """Copy the flow of a complete run, with a card of how it was made and how good it is."""
    from openmm_eqflow.runs.publish import publish as publish_flow

    written = publish_flow(run, out)
    console.print(f"wrote {written}", highlight=False, soft_wrap=True)
    if json_path is not None:
        write_json(json_path, {"run": str(run), "wrote": str(written)})


@click.command()
@json_option
def doctor(json_path: Path | None) -> None:
    """Say what this machine has: versions, platforms, devices, threads, what is missing."""
    from openmm_eqflow.bench.doctor import examine, lines

    found = examine()
    for line in lines(found):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    if json_path is not None:
        write_json(json_path, found)
    if found["problems"]:
        raise EqFlowError("; ".join(found["problems"]))
