"""Command line: openmm-eqflow run alanine-dipeptide."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from shlex import quote
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from openmm_eqflow.cli import measure
from openmm_eqflow.cli.grouped import Grouped
from openmm_eqflow.cli.measure import device_option, json_option, seed_option
from openmm_eqflow.cli.memory import keep_freed_memory
from openmm_eqflow.cli.progress import stage_progress
from openmm_eqflow.errors import ConfigurationError, EqFlowError
from openmm_eqflow.files import write_json
from openmm_eqflow.training.recipes import BUDGETS

if TYPE_CHECKING:
    from openmm_eqflow.runs.directory import RunDirectory

__all__ = [
    "main",
]

console = Console()
errors = Console(stderr=True)


def _version() -> str:
    try:
        return importlib.metadata.version("openmm_eqflow")
    except importlib.metadata.PackageNotFoundError:
        return "unknown (not installed)"


_out = click.option("--out", type=click.Path(path_type=Path), help="Run directory.")
_budget = click.option(
    "--budget",
    type=click.Choice(BUDGETS),
    help="About 4, 15 or 60 minutes for alanine dipeptide on 2 cores (default standard).",
)


_method = click.option(
    "--method",
    type=click.Choice(["tempering", "annealing"]),
    help="Where frames come from: dynamics, or a path from chemistry that no barrier of a torsion "
    "stops (default: what the system's settings say, else annealing for molecules of up to 50 "
    "atoms).",
)
_ess = click.option(
    "--ess", type=click.FloatRange(0, 1, True, True), help="Relative ESS asked of annealing."
)
_check = click.option(
    "--check-with-md",
    is_flag=True,
    flag_value=1,
    type=int,
    default=None,
    help="Parallel tempering beside an annealed path, compared in the report.",
)


def _run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command what every stage of a run takes."""
    for option in (json_option, device_option, seed_option, _budget, _out):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_version(), prog_name="openmm-eqflow")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.option(
    "--allow-code",
    is_flag=True,
    help="Load files that hold Python code; only those that you trust.",
)
def cli(debug: bool, allow_code: bool) -> None:
    """Boltzmann samples of an OpenMM System from an equivariant normalizing flow.

    Start with: openmm-eqflow run alanine-dipeptide --budget quick
    """


def _run_stages(run: RunDirectory, stages: tuple[str, ...]) -> None:
    from openmm_eqflow.runs.stages import run_stage

    started = time.monotonic()
    with run.locked():
        for stage in stages:
            if run.is_complete(stage):
                console.print(f"{stage:<10} complete", highlight=False)
                continue
            with stage_progress(stage, console) as progress:
                run_stage(run, stage, progress=progress)
    console.print(f"{', '.join(stages)}: {time.monotonic() - started:.0f} s", highlight=False)


def _print_outcome(run: RunDirectory) -> None:
    metrics = run.metrics()
    chain, error = metrics["chain"], metrics.get("relative_ess_error")
    error = "" if error is None else f" +- {error:.3f}"
    console.print(
        f"relative ESS {metrics['relative_ess']:.3f}{error} (prior alone "
        f"{metrics['prior_relative_ess']:.3f}; n = {metrics['n_samples']}), acceptance "
        f"{chain['acceptance']:.2f}, {chain['n_samples']} samples",
        highlight=False,
        soft_wrap=True,
    )
    if verdict := metrics.get("verdict"):
        console.print(verdict["sentence"], highlight=False, soft_wrap=True, markup=False)
    console.print(f"report: {run.path / 'report.html'}", highlight=False, soft_wrap=True)


def _write_outcome(run: RunDirectory, json_path: Path | None) -> None:
    """Where the run is, the facts of its complete stages, and its figures (null before)."""
    from openmm_eqflow.parallel import is_main
    from openmm_eqflow.runs.directory import STAGES

    if json_path is None or not is_main():
        return
    complete = [stage for stage in STAGES if run.is_complete(stage)]
    files = {stage: run.path / "stages" / f"{stage}.json" for stage in complete}
    content = {
        "run": str(run.path),
        "stages": {stage: json.loads(file.read_text("utf-8")) for stage, file in files.items()},
        "metrics": run.metrics() if "sample" in complete else None,
    }
    write_json(json_path, content)


@cli.command()
@click.argument("system")
@_run_options
@_method
@_ess
@_check
def run(system: str, json_path: Path | None, **options: Any) -> None:
    """Do everything: reference, train, sample, report. SYSTEM is a name, folder or run."""
    from openmm_eqflow.runs.directory import STAGES
    from openmm_eqflow.runs.stages import open_run

    directory = open_run(system, **options)
    console.print(f"run directory: {directory.path}", highlight=False, soft_wrap=True)
    _run_stages(directory, STAGES)
    _print_outcome(directory)
    _write_outcome(directory, json_path)


def _stage_command(stage: str, summary: str, *more: Callable[..., Any]) -> None:
    def command(system: str, json_path: Path | None, **options: Any) -> None:
        from openmm_eqflow.runs.stages import open_run

        directory = open_run(system, **options)
        _run_stages(directory, (stage,))
        _write_outcome(directory, json_path)

    for option in more:
        command = option(command)
    cli.command(stage, help=summary)(click.argument("system")(_run_options(command)))


_stage_command("reference", "Make reference data: by paths or dynamics.", _check, _ess, _method)
_stage_command("train", "Train the flow on the reference data of a run.")
_stage_command("report", "Write report.html of a run.")


@cli.command()
@click.argument("system")
@_run_options
def sample(system: str, json_path: Path | None, **options: Any) -> None:
    """Sample: a run with its own flow, or a shipped system with the flow that ships."""
    from openmm_eqflow.parallel import main_first
    from openmm_eqflow.runs.stages import adopt_shipped_flow, open_run

    directory = open_run(system, **options, with_flow=True)
    with main_first():
        if not directory.is_complete("train"):
            adopt_shipped_flow(directory)
    _run_stages(directory, ("sample", "report"))
    _print_outcome(directory)
    _write_outcome(directory, json_path)


@cli.command()
@click.argument("system")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Default runs/SYSTEM-annealed."
)
@click.option("--ess", type=float, default=0.9, show_default=True, help="Relative ESS asked for.")
@click.option(
    "--n-samples",
    type=click.IntRange(100),
    default=10_000,
    show_default=True,
    help="Independent weighted samples.",
)
@click.option(
    "--n-points",
    type=click.IntRange(100),
    default=1000,
    show_default=True,
    help="Points of an adaptive round; more for molecules with many torsions.",
)
@click.option(
    "--compare-with",
    metavar="RUN",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Run of the same System: compare with its reference dynamics.",
)
@device_option
@seed_option
@json_option
def anneal(
    system: str,
    out: Path | None,
    ess: float,
    n_samples: int,
    n_points: int,
    compare_with: Path | None,
    device: str | None,
    seed: int | None,
    json_path: Path | None,
) -> None:
    """Sample a molecule without reference data: isomers, populations, free energies.

    A path from a prior that bonds alone suggest to the Boltzmann distribution; no barrier is
    crossed outside rings, so the height of none matters there.
    """
    from openmm_eqflow.report.annealed import write_annealed_report
    from openmm_eqflow.runs.annealing import anneal_system
    from openmm_eqflow.runs.stages import build_target
    from openmm_eqflow.targets.library import load_system
    from openmm_eqflow.training.precision import resolve_device

    molecule = load_system(system)
    folder = out or Path("runs") / f"{molecule.name}-annealed"
    with build_target(molecule) as target, stage_progress("anneal", console) as progress:
        metrics = anneal_system(
            molecule,
            target,
            folder,
            ess=ess,
            n_samples=n_samples,
            n_points=n_points,
            seed=0 if seed is None else seed,
            device=resolve_device(device or "auto"),
            compare_with=compare_with,
            progress=progress,
        )
    page = write_annealed_report(folder, molecule)
    console.print(
        f"relative ESS {metrics['relative_ess']:.3f} +- {metrics['relative_ess_error']:.3f} (n = "
        f"{n_samples}, {metrics['n_levels']} levels), log Z {metrics['log_z']:.3f} +- "
        f"{metrics['log_z_error']:.3f}",
        highlight=False,
    )
    if metrics["isomers"]:
        _print_isomers(metrics["isomers"])
    else:
        console.print("no torsion here has states that can be told apart", highlight=False)
    for text in metrics["warnings"]:
        errors.print(f"warning: {text}", highlight=False, soft_wrap=True, markup=False)
    if "dynamics" in metrics:
        _print_comparison(metrics["dynamics"])
    console.print(f"wrote {page}", highlight=False, soft_wrap=True, markup=False)
    if json_path is not None:
        write_json(json_path, {"folder": str(folder), "metrics": metrics})


def _print_comparison(dynamics: dict[str, Any]) -> None:
    largest = dynamics["largest_z"]
    said = (
        "no population to compare"
        if largest is None
        else f"populations within {largest:.1f} standard errors"
    )
    console.print(f"reference dynamics of {dynamics['run']}: {said}", highlight=False)


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False, exists=True))
@json_option
def isomers(folder: Path, json_path: Path | None) -> None:
    """Show populations and free energies of isomers, of a run or of what anneal left in FOLDER."""
    from openmm_eqflow.report.data import read_json
    from openmm_eqflow.report.isomers import coverage

    if not (folder / "metrics.json").is_file():
        raise ConfigurationError(
            f"{folder} holds no samples yet: openmm-eqflow run or anneal makes them"
        )
    metrics = read_json(folder / "metrics.json")
    rows = metrics.get("isomers")
    if rows is None:
        raise ConfigurationError(
            f"{folder} tells no isomers: its system is no molecule, or its samples are of an "
            "earlier version (run the sample stage again)"
        )
    if rows:
        _print_isomers(rows)
    else:
        console.print("no torsion here has states that can be told apart", highlight=False)
    for line in coverage(metrics):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    for text in metrics.get("warnings", []):
        errors.print(f"warning: {text}", highlight=False, soft_wrap=True, markup=False)
    if json_path is not None:
        keys = ("isomers", "dynamics", "warnings", "relative_ess", "n_samples")
        write_json(json_path, {key: metrics[key] for key in keys if key in metrics})


def _print_isomers(rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("torsion", "state", "population", "kJ/mol", "kcal/mol"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        free = [
            # Of a population below its error a free energy says nothing.
            "-"
            if row[key] is None or row["population"] < row["population_error"]
            else f"{row[key]:.2f} +- {row[f'{key}_error']:.2f}"
            for key in ("free_energy_kj_mol", "free_energy_kcal_mol")
        ]
        p = f"{row['population']:.4f} +- {row['population_error']:.4f}"
        table.add_row(row["torsion"], row["state"], p, *free)
    console.print(table)


@cli.command()
@json_option
def systems(json_path: Path | None) -> None:
    """List the systems that ship."""
    from openmm_eqflow.targets.library import list_systems

    table = Table(box=None, pad_edge=False)
    for heading in ("name", "kind", "kelvin", "flow", "description"):
        table.add_column(heading, overflow="fold")
    rows = []
    for info in list_systems():
        flow = (info.directory / "flow.safetensors").is_file()
        kelvins = info.temperature_kelvin
        table.add_row(
            info.name, info.kind, f"{kelvins:g}", "yes" if flow else "-", info.description
        )
        row = {"name": info.name, "kind": info.kind, "temperature_kelvin": kelvins, "flow": flow}
        rows.append({**row, "description": info.description})
    console.print(table)
    if json_path is not None:
        write_json(json_path, {"systems": rows})


@cli.command(
    cls=Grouped,
    headings={
        "Structure": ("pdb", "cif", "inpcrd", "gro", "crd", "chain", "residue"),
        "Parameters": ("forcefield", "system_xml", "prmtop", "top", "psf", "params"),
        "Small molecules": ("smiles", "sdf", "charges"),
        "Preparation": ("add_hydrogens", "strip_solvent", "constraints", "hydrogen_mass"),
        "Output": ("temperature", "json_path"),
    },
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--pdb",
    type=click.Path(path_type=Path),
    help="All atoms of the molecule; CONECT records where OpenMM does not know the residue.",
)
@click.option("--forcefield", multiple=True, help="OpenMM force-field file; repeat or list.")
@click.option(
    "--system",
    "system_xml",
    type=click.Path(path_type=Path),
    help="Serialised OpenMM System, instead of --forcefield.",
)
@click.option("--temperature", type=float, default=300.0, show_default=True, help="Kelvin.")
@click.option("--add-hydrogens", is_flag=True, help="Add missing hydrogens first.")
@click.option("--cif", type=click.Path(path_type=Path), help="mmCIF structure, instead of --pdb.")
@click.option("--prmtop", type=click.Path(path_type=Path), help="Amber topology.")
@click.option("--inpcrd", type=click.Path(path_type=Path), help="Amber coordinates.")
@click.option("--top", type=click.Path(path_type=Path), help="GROMACS topology.")
@click.option("--gro", type=click.Path(path_type=Path), help="GROMACS structure.")
@click.option("--psf", type=click.Path(path_type=Path), help="CHARMM topology.")
@click.option("--crd", type=click.Path(path_type=Path), help="CHARMM coordinates.")
@click.option(
    "--params",
    type=click.Path(path_type=Path),
    multiple=True,
    help="CHARMM parameter file, or folder of GROMACS force fields; repeat.",
)
@click.option("--chain", help="Take this chain alone.")
@click.option("--residue", help="Take residues of this name or number alone.")
@click.option("--strip-solvent", is_flag=True, help="Remove water and ions first.")
@click.option(
    "--constraints",
    type=click.Choice(["none", "hbonds", "allbonds"]),
    default="none",
    help="Constrain the bonds of hydrogen, or all.",
)
@click.option("--hydrogen-mass", type=float, help="Dalton, taken from the heavy atoms.")
@click.option("--smiles", help="Small molecule; needs openmm-eqflow[ligand].")
@click.option("--sdf", type=click.Path(path_type=Path), help="Small molecule from an SD file.")
@click.option(
    "--charges",
    type=click.Choice(["bcc", "gas"]),
    default="bcc",
    show_default=True,
    help="Of --smiles and --sdf: AM1-BCC, or Gasteiger for a quick look.",
)
@json_option
@click.argument("more_forcefields", nargs=-1)
def init(
    folder: Path,
    pdb: Path | None,
    forcefield: tuple[str, ...],
    system_xml: Path | None,
    temperature: float,
    add_hydrogens: bool,
    more_forcefields: tuple[str, ...],
    params: tuple[Path, ...],
    chain: str | None,
    residue: str | None,
    strip_solvent: bool,
    constraints: str,
    hydrogen_mass: float | None,
    smiles: str | None,
    sdf: Path | None,
    charges: str,
    json_path: Path | None,
    **files: Path | None,
) -> None:
    """Describe your own molecule: writes FOLDER/system.yaml."""
    from openmm_eqflow.runs.forecast import describe_system
    from openmm_eqflow.targets.library import check_temperature
    from openmm_eqflow.targets.own_system import init_ligand, init_system
    from openmm_eqflow.units import temperature_quantity

    def one_of(*names: str) -> Path | None:
        given = {name: path for name, path in files.items() if name in names and path is not None}
        if len(given) > 1:
            raise ConfigurationError(f"--{' and --'.join(given)} say the same: give one")
        return next(iter(given.values()), None)

    told: list[str] = []

    def tell(line: str) -> None:
        told.append(line)
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    files["pdb"] = pdb
    check_temperature(temperature, "temperature")
    coordinates = one_of("pdb", "cif", "inpcrd", "gro", "crd")
    if smiles is not None or sdf is not None:
        if coordinates is not None or forcefield or system_xml is not None:
            raise ConfigurationError("--smiles and --sdf stand alone: leave the other files out")
        made = init_ligand(
            folder,
            smiles=smiles,
            sdf=sdf,
            charges=charges,
            temperature=temperature_quantity(temperature),
            tell=tell,
            constraints=constraints,
            hydrogen_mass=hydrogen_mass,
        )
    else:
        made = init_system(
            folder,
            pdb=coordinates,
            topology=one_of("prmtop", "top", "psf"),
            parameters=params,
            chain=chain,
            residue=residue,
            strip_solvent=strip_solvent,
            constraints=constraints,
            hydrogen_mass=hydrogen_mass,
            tell=tell,
            forcefield=[*forcefield, *more_forcefields] or None,
            system_xml=system_xml,
            temperature=temperature_quantity(temperature),
            add_hydrogens=add_hydrogens,
        )
    lines, cautions = describe_system(made)
    for line in lines:
        tell(line)
    for caution in cautions:
        errors.print(f"warning: {caution}", highlight=False, soft_wrap=True, markup=False)
    text = f"wrote {folder / 'system.yaml'}; next: openmm-eqflow run {quote(str(folder))}"
    console.print(text, highlight=False, soft_wrap=True, markup=False)
    if json_path is not None:
        content = {"folder": str(folder), "n_atoms": made.n_particles}
        write_json(json_path, {**content, "lines": told, "warnings": cautions})


def _complain(message: str) -> None:
    line = " ".join(message.split())
    errors.print(f"error: {line}", highlight=False, soft_wrap=True, markup=False)


def _unexpected(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print one line instead of a traceback (``sys.excepthook``); Python then exits with 1."""
    _complain(f"unexpected {kind.__name__}: {error}; --debug shows where, please report it")


class _Heard(logging.Handler):
    """Warnings of the package as lines on stderr; run.log has them too."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        if not console.quiet:
            text = " ".join(record.getMessage().split())
            errors.print(f"warning: {text}", highlight=False, soft_wrap=True, markup=False)


@contextmanager
def _warnings_heard() -> Iterator[None]:
    logger, handler = logging.getLogger("openmm_eqflow"), _Heard(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _processes() -> AbstractContextManager[None]:
    """Join the processes of torchrun, if it started this one; only rank 0 is heard."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return nullcontext()
    from openmm_eqflow.parallel import process_group

    console.quiet = measure.console.quiet = os.environ["RANK"] != "0"
    return process_group()


def main() -> None:
    """Entry point: one line per error, traceback only with --debug.

    Exit codes: 0 done, 1 unexpected, 2 an error that is told, 3 a campaign with failures (also
    done), 130 stopped by Ctrl-C.
    """
    arguments = [a for a in sys.argv[1:] if a not in ("--debug", "--allow-code")]
    debug = "--debug" in sys.argv[1:]
    if "--allow-code" in sys.argv[1:]:
        os.environ["OPENMM_EQFLOW_ALLOW_CODE"] = "1"  # seen by the processes of a run as well
    if not debug:
        sys.excepthook = _unexpected
        logging.raiseExceptions = False  # run.log on a full disk: the stage itself will tell
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    measure.register(cli)
    keep_freed_memory()
    try:
        with _processes(), _warnings_heard():
            sys.exit(cli(arguments, standalone_mode=False) or 0)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "openmm-eqflow"
        _complain(f"{error.format_message()} (see {where} --help)")
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        errors.print("stopped; run the same command again to continue")
        sys.exit(130)
    except (EqFlowError, OSError) as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.filename is not None:
            _complain(
                f"{error.filename}: {(error.strerror or type(error).__name__).lower()}; choose "
                "another file or folder, or change what you may do with this one"
            )
        else:
            _complain(str(error))
        sys.exit(2)
