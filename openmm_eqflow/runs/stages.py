"""The main job: its four stages, the flow it means, what it leaves, and one call for all.

What a run leaves for other programs: trajectory, topology, weights, chain statistics.

Which flow is meant: the one of a run directory, or the one that ships with a system.

The main job in four stages, each resumable: reference, train, sample, report.

The main job in one call: what ``openmm-eqflow run`` does, for scripts and notebooks.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch

from openmm_eqflow import units as thermo
from openmm_eqflow.analysis.chains import autocorrelation_ess, longest_stuck
from openmm_eqflow.analysis.isomers import isomer_populations
from openmm_eqflow.errors import ConfigurationError, TrainingError
from openmm_eqflow.files import atomic_path, write_dcd, write_json, write_npz
from openmm_eqflow.flows.audit import audit
from openmm_eqflow.flows.path import Path as FlowPath
from openmm_eqflow.flows.relaxed import relax
from openmm_eqflow.flows.storage import load_flow, save_flow
from openmm_eqflow.geometry import superposed
from openmm_eqflow.moves.chains import ChainSamples, run_chains
from openmm_eqflow.moves.steps import Proposals
from openmm_eqflow.parallel import is_main, main_first, share, world_size
from openmm_eqflow.runs.annealed_frames import run_annealed
from openmm_eqflow.runs.annealing import describe_path
from openmm_eqflow.runs.directory import STAGES, RunDirectory
from openmm_eqflow.runs.evaluation import FlowSamples, evaluate_flow
from openmm_eqflow.runs.fit import split_frames, train_flow
from openmm_eqflow.runs.reference.data import load_reference, run_reference
from openmm_eqflow.runs.ways import PRIOR, cheapest, measure_ways
from openmm_eqflow.seeds import child, child_seed
from openmm_eqflow.targets.forcefield import write_pdb
from openmm_eqflow.targets.isomers import find_isomers
from openmm_eqflow.targets.library import MolecularSystem, load_system
from openmm_eqflow.targets.target import BoltzmannTarget, system_sha256
from openmm_eqflow.training.precision import resolve_device

__all__ = [
    "adopt_shipped_flow",
    "build_target",
    "card_of",
    "chain_metrics",
    "flow_of",
    "open_run",
    "own_flow",
    "run",
    "run_stage",
    "shipped_flow",
    "write_trajectory",
]


def write_trajectory(path: Path, system: MolecularSystem, chains: ChainSamples) -> None:
    """Write samples.dcd + topology.pdb (chain after chain, superposed) and samples.npz."""
    x = chains.positions.swapaxes(0, 1)
    n_chains, n_steps = x.shape[:2]
    frames = x.reshape(-1, *x.shape[2:])
    if system.kind == "molecule":
        frames = superposed(torch.from_numpy(frames).double()).float().numpy()
    write_dcd(path / "samples.dcd", frames)
    with atomic_path(path / "topology.pdb") as temporary:
        write_pdb(temporary, system.topology, thermo.positions_quantity(frames[0]))

    def flat(values: np.ndarray) -> np.ndarray:
        return values.swapaxes(0, 1).reshape(-1)

    write_npz(
        path / "samples.npz",
        {
            "u": flat(chains.reduced_potential),
            "log_q": flat(chains.log_q),
            "log_weight": flat(chains.log_weight),
            "accepted": flat(chains.accepted),
            "chain": np.repeat(np.arange(n_chains), n_steps),
            "local_acceptance": chains.local_acceptance,
        },
    )


def chain_metrics(chains: ChainSamples) -> dict[str, Any]:
    """Summarise acceptance, stuck stretches and effective samples of the Markov chains."""
    u = chains.reduced_potential.T
    return {
        "n_samples": chains.n_samples,
        "n_chains": int(u.shape[0]),
        "n_steps": int(u.shape[1]),
        "acceptance": float(chains.accepted.mean()),
        "local_acceptance": float(chains.local_acceptance.mean())
        if np.isfinite(chains.local_acceptance).all()
        else None,
        "longest_stuck": longest_stuck(chains.accepted.T),
        "energy_ess": autocorrelation_ess(u),
        "mean_reduced_potential": float(u.mean()),
        "max_log_weight_gap": float(
            chains.log_weight.max()
            - chains.proposal_log_weight[np.isfinite(chains.proposal_log_weight)].max()
        ),
    }


def shipped_flow(system: MolecularSystem) -> Path | None:
    """Flow that ships with a system, if there is one."""
    path = system.directory / "flow.safetensors"
    return path if path.is_file() else None


def _shipped(system: MolecularSystem, asked: str) -> Path:
    if (source := shipped_flow(system)) is None:
        raise ConfigurationError(
            f"no flow ships with {system.name!r}; train one (openmm-eqflow run {quote(asked)}) "
            "and give the directory of the run, or keep its flow here (openmm-eqflow publish)"
        )
    return source


def adopt_shipped_flow(run: RunDirectory) -> None:
    """Copy the flow that ships with the run's system into the run directory.

    Raises
    ------
    ConfigurationError
        No flow ships with it.
    """
    system = run.load_system()
    flow = load_flow(_shipped(system, run.config.system))
    with run.locked():
        save_flow(flow, run.path / "flow", flow.metadata)
        run.finish("train", {"adopted": system.name})


def flow_of(
    name_or_run: str, device: str = "auto"
) -> tuple[MolecularSystem, FlowPath, torch.Tensor | None]:
    """System, flow and test frames (if any) of a run directory or a shipped system."""
    path = Path(name_or_run)
    where = resolve_device(device)
    if (path / "config.yaml").is_file():
        run = RunDirectory.open(path)
        run.require("train")
        test = split_frames(load_reference(path))[1] if run.is_complete("reference") else None
        system = run.load_system()
        return system, own_flow(path / "flow", system_sha256(system.system), where), test
    if (path / "flow.json").is_file() and not (path / "system.yaml").is_file():
        raise ConfigurationError(
            f"{path} holds what anneal made, which tells its figures by: openmm-eqflow isomers "
            f"{quote(str(path))}; for other temperatures and chains make a run of the system"
        )
    system = load_system(name_or_run)
    source = _shipped(system, name_or_run)
    return system, own_flow(source, system_sha256(system.system), where), None


def card_of(name: str) -> Path:
    """Card beside the flow of a system.

    Raises
    ------
    ConfigurationError
        ``name`` is a run directory, whose figures are its own, or there is no card.
    """
    if (Path(name) / "config.yaml").is_file():
        raise ConfigurationError(
            f"{name} is a run and has no card; write one: openmm-eqflow publish "
            f"{quote(name)} --out DIR"
        )
    card = load_system(name).directory / "card.md"
    if not card.is_file():
        raise ConfigurationError(
            f"{card} does not exist; write one: openmm-eqflow publish RUN --out "
            f"{quote(str(card.parent))}"
        )
    return card


def own_flow(path: Path, system_hash: str, device: str = "cpu") -> FlowPath:
    """Load a flow and make sure that it was trained for this System."""
    flow = load_flow(path, device=device)
    if (made_for := flow.metadata.get("system_hash")) != system_hash:
        raise ConfigurationError(
            f"the flow {path} was trained for another System "
            f"({str(made_for)[:12]}..., now {system_hash[:12]}...); train it anew"
        )
    return flow

Progress = Callable[[float, str], None]
logger = logging.getLogger(__name__)
#: Of the reference stage, while it has too few frames; quick has a ceiling.
EXTENSIONS = {"quick": (1, 2), "standard": (1, 2, 4), "thorough": (1, 2, 4)}


def build_target(system: MolecularSystem) -> BoltzmannTarget:
    """Boltzmann target of a loaded system, with the fastest evaluator here."""
    return BoltzmannTarget(
        system.system,
        system.topology,
        system.temperature,
        positions=system.positions,
        n_dims=system.n_dims,
    )


def run_stage(
    run: RunDirectory, stage: str, *, progress: Progress | None = None
) -> dict[str, Any] | None:
    """Run one stage unless its output is complete; return its facts, None if skipped."""
    if stage not in STAGES:
        raise ConfigurationError(f"no stage {stage!r}; expected one of {', '.join(STAGES)}")
    if share(run.is_complete(stage)):
        logger.info("stage %s is complete, skipped", stage)
        return None
    with run.locked():
        return _run_stage(run, stage, progress or (lambda fraction, text: None))


def _run_stage(run: RunDirectory, stage: str, progress: Progress) -> dict[str, Any]:
    if run.config.recipe.method == "annealing" and world_size() > 1:
        raise ConfigurationError(
            "an annealed run works in one process: start it without torchrun, or take --method "
            "tempering"
        )
    handler = run.log_to_file()
    started = time.monotonic()
    try:
        logger.info("stage %s starts", stage)
        work = _RUNNERS[stage] if is_main() or stage in _TOGETHER else (lambda *_: {})
        facts = work(run, progress)
        facts["seconds"] = time.monotonic() - started
        if is_main():
            run.finish(stage, facts)
        share(None)  # the others go on when the files are there
        logger.info("stage %s took %.1f s", stage, facts["seconds"])
        return facts
    finally:
        logging.getLogger("openmm_eqflow").removeHandler(handler)
        handler.close()


def _reference(run: RunDirectory, progress: Progress) -> dict[str, Any]:
    if run.config.recipe.method == "annealing":
        return _annealed(run, progress)
    return _tempered(run, run.path, progress)


def _annealed(run: RunDirectory, progress: Progress) -> dict[str, Any]:
    """Frames of a path; where asked, dynamics beside it in a folder of their own."""
    recipe, config = run.config.recipe, run.config
    share = 0.5 if recipe.check_with_md else 1.0
    with build_target(run.load_system()) as target:
        path, data = run_annealed(
            target,
            run.path,
            kelvin=config.temperature_kelvin,
            ess=recipe.ess,
            n_points=recipe.n_points,
            n_frames=min(recipe.max_frames, recipe.n_samples),
            seed=config.seed,
            device=config.device,
            progress=lambda fraction, text: progress(share * fraction, text),
        )
    facts = {
        "method": "annealing",
        "n_frames": data.n_frames,
        "n_levels": len(path.layers),
        "adaptation": path.metadata["adaptation"],
        "wall_seconds": data.wall_seconds,
    }
    if recipe.check_with_md:
        facts["check"] = _tempered(
            run,
            run.path / "check",
            lambda fraction, text: progress(0.5 + 0.5 * fraction, f"check by dynamics: {text}"),
        )
    return facts


def _tempered(run: RunDirectory, folder: Path, progress: Progress) -> dict[str, Any]:
    recipe = run.config.recipe
    system = run.load_system()
    enough = min(recipe.min_frames, recipe.max_frames)
    extensions = EXTENSIONS[run.config.budget]
    for extension in extensions:
        data = run_reference(
            system,
            folder,
            seconds=extension * recipe.reference_seconds,
            max_frames=recipe.max_frames,
            seed=run.config.seed,
            progress=progress,
        )
        if data.n_frames >= enough:
            break
        if extension < extensions[-1]:
            logger.info("only %d frames so far: the reference stage goes on", data.n_frames)
    else:
        logger.warning(
            "%d reference frames after %.0f s, fewer than the %d wanted: prior and flow are "
            "fitted to little data and rare states may be missing; take a larger --budget or set "
            "recipe: reference_seconds in the settings of system.yaml",
            data.n_frames,
            data.wall_seconds,
            enough,
        )
    return {
        "n_frames": data.n_frames,
        "temperatures_kelvin": data.temperatures.tolist(),
        "frame_interval_ps": data.frame_interval_ps,
        "platform": data.platform,
        "wall_seconds": data.wall_seconds,
        "convergence": data.convergence,
    }


def _train(run: RunDirectory, progress: Progress) -> dict[str, Any]:
    run.require("reference")
    system = run.load_system()
    data = load_reference(run.path)
    with build_target(system) as target:
        levels = None
        if data.method == "annealing":
            levels = load_flow(run.path / "reference" / "path", device=run.config.device)
        flow, result = train_flow(
            run.config.recipe,
            target,
            data,
            seed=run.config.root,
            folder=run.path / "training",
            device=run.config.device,
            log=run.path / "history.csv",
            progress=progress,
            prior=None if levels is None else levels.prior_on_cpu,
        )
        metadata = {
            "system": system.name,
            "system_hash": target.system_hash,
            "temperature_kelvin": run.config.temperature_kelvin,
            "seed": run.config.seed,
            "budget": run.config.budget,
            "recipe": run.config.recipe.to_dict(),
            "n_steps": result.n_steps,
            "training_seconds": result.seconds,
            "n_frames": data.n_frames,
            "prior_kept": result.prior_kept,
        }
        facts = {
            "n_steps": result.n_steps,
            "training_seconds": result.seconds,
            "history": result.history,
            "prior_kept": result.prior_kept,
        }
        if levels is not None:
            flow, facts["ways"] = _way(run, flow, levels, target, result.prior_kept, progress)
            metadata |= {"adaptation": levels.metadata["adaptation"]}
        if is_main():
            save_flow(flow, run.path / "flow", metadata)
    return facts | {"audit": flow.audit_report}


def _way(
    run: RunDirectory,
    field: FlowPath,
    levels: FlowPath,
    target: BoltzmannTarget,
    prior_kept: dict[str, float] | None,
    progress: Progress,
) -> tuple[FlowPath, list[dict[str, Any]]]:
    """Measure prior, levels, field and both, and take the cheapest; the field if it has to be."""
    recipe, seed = run.config.recipe, run.config.root
    ways: dict[str, FlowPath] = {"levels alone": levels}
    if prior_kept is None:
        ways["field alone"] = field
        if field.maps.n_ode_steps > 1:
            both = relax(field.maps, target, seed=child_seed(seed, "relaxation"))
            ways["field and levels"] = both
    rows = measure_ways(
        ways,
        target,
        seed=seed,
        progress=lambda name: progress(1.0, f"what an effective sample costs: {name}"),
    )
    chosen = "field alone" if recipe.density == "pointwise" else cheapest(rows, recipe.ess)
    for row in rows:
        row["chosen"] = row["name"] == chosen
        logger.info(
            "%s: relative ESS %.3f, %.3g effective samples a second%s",
            row["name"],
            row["relative_ess"],
            row["effective_per_second"],
            ", taken" if row["chosen"] else "",
        )
    if chosen != PRIOR:
        return ways.get(chosen, field), rows
    alone = levels.maps
    audit(alone, n=32, generator=child(seed, "audit of the prior"))
    return alone, rows


def _sample(run: RunDirectory, progress: Progress) -> dict[str, Any]:
    run.require("train")
    recipe, seed = run.config.recipe, run.config.root
    system = run.load_system()
    with build_target(system) as target:
        flow = own_flow(run.path / "flow", target.system_hash, run.config.device)
        test, reference_u = None, None
        if run.is_complete("reference"):
            data = load_reference(run.path)
            test = split_frames(data)[1][:2000]
            reference_u = data.reduced_energies
        metrics, samples, prior_weights = evaluate_flow(
            flow,
            target,
            n_samples=recipe.n_evaluate,
            seed=type(seed)(seed + 11),
            name=system.name,
            test_frames=test,
            folder=run.path / "evaluation",
            progress=lambda f, text: progress(0.5 * f, f"independent flow samples: {text}"),
        )
        if not is_main():
            return {}
        if system.kind == "molecule":
            metrics |= _isomers(run, flow, system, target, samples)
        write_npz(
            run.path / "flow_samples.npz",
            {
                "u": samples.u.numpy(),
                "log_q": samples.log_q.numpy(),
                "log_weight": samples.log_weight.numpy(),
                "prior_log_weight": prior_weights.numpy(),
                "positions": samples.x[:5000].float().numpy(),
            },
        )
        generator = child(seed, "starts")
        # The first samples choose where the chains start, the others are their first proposals.
        k = len(samples.u) // 10
        # Diagnostics need four steps of every chain, however few samples are asked for.
        n_chains = max(1, min(recipe.n_chains, recipe.n_samples // 4))
        first = _starting_points(n_chains, samples.log_weight[:k], generator)
        rest = Proposals(samples.x[k:], samples.log_q[k:], samples.u[k:] * target.kT)
        # Chains take their steps on the CPU.
        chains = run_chains(
            flow if flow.device.type == "cpu" else own_flow(run.path / "flow", target.system_hash),
            target,
            samples.x[first],
            run.path / "samples",
            n_steps=-(-recipe.n_samples // n_chains),
            n_proposals=recipe.n_proposals,
            n_local_steps=recipe.n_local_steps,
            seed=seed,
            stored=rest,
            start_log_q=samples.log_q[first],
            progress=lambda f, text: progress(0.5 + 0.5 * f, f"Markov chains: {text}"),
        )
    write_trajectory(run.path, system, chains)
    metrics["chain"] = chain_metrics(chains)
    if reference_u is not None:
        metrics["reference_mean_reduced_potential"] = float(reference_u.mean())
    write_json(run.path / "metrics.json", metrics)
    shutil.rmtree(run.path / "evaluation", ignore_errors=True)
    return {key: metrics[key] for key in ("relative_ess", "prior_relative_ess", "pareto_k")}


def _isomers(
    run: RunDirectory,
    flow: FlowPath,
    system: MolecularSystem,
    target: BoltzmannTarget,
    samples: FlowSamples,
) -> dict[str, Any]:
    """Give populations of isomers by weighted samples; of an annealed run what it may lack."""
    if "adaptation" in flow.metadata:
        check = run.path / "check"
        dynamics = (f"{run.path.name}/check", load_reference(check)) if check.is_dir() else None
        found = describe_path(
            flow, system, target, samples, dynamics=dynamics, seed=run.config.root
        )
        return found | {"ess_asked": run.config.recipe.ess}
    torsions = find_isomers(system.system, system.topology, target.positions).tabled
    x, log_w = samples.x.numpy(), samples.log_weight.numpy()
    if not np.isfinite(log_w).any():
        return {}
    return {"isomers": isomer_populations(torsions, x, log_w, target.kT)}


def _starting_points(
    n: int, log_weight: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Draw indices by weight (sampling-importance-resampling): there chains start."""
    if not bool(torch.isfinite(log_weight).any()):
        raise TrainingError(
            f"none of {len(log_weight)} flow samples has a finite weight; train longer or give "
            "the reference stage more time"
        )
    weights = torch.softmax(log_weight, 0)
    return torch.multinomial(weights, n, replacement=True, generator=generator)


def _report(run: RunDirectory, progress: Progress) -> dict[str, Any]:
    run.require("sample")
    from openmm_eqflow.report import write_report

    progress(0.0, "drawing figures")
    write_report(run.path)
    return {}


_TOGETHER = ("train", "sample")  # of all processes under torchrun; the others are rank 0's
_RUNNERS: dict[str, Callable[[RunDirectory, Progress], dict[str, Any]]] = {
    "reference": _reference,
    "train": _train,
    "sample": _sample,
    "report": _report,
}


def open_run(
    system: str | Path, out: str | Path | None = None, *, with_flow: bool = False, **asked: Any
) -> RunDirectory:
    """Open a run directory, or make one for a system; no stage is run.

    ``asked`` holds arguments of :func:`run` from ``budget`` on; ``with_flow`` makes a directory
    only for a system with which a flow ships.

    Raises
    ------
    ConfigurationError
        The folder belongs to another system, budget, seed or method.
    UnknownSystemError
        No such system.
    """
    asked = dict.fromkeys(("budget", "seed")) | asked
    if out is None and (Path(system) / "config.yaml").is_file():
        opened = RunDirectory.open(Path(system))
        device = asked.pop("device", None)
        for key, value in asked.items():
            owner = opened.config if key in ("budget", "seed") else opened.config.recipe
            if value is not None and value != (found := getattr(owner, key)):
                raise ConfigurationError(
                    f"{system} was made with {key} {found}, now {value}; choose a new --out"
                )
        opened.use_device(device)
        return opened
    loaded = load_system(system)
    with main_first(), build_target(loaded) as target:
        path = Path("runs") / loaded.name if out is None else Path(out)
        if with_flow and not (path / "config.yaml").is_file():
            # Chains of a flow with a density gain by local moves, after which log q is known.
            if load_flow(_shipped(loaded, str(system))).has_density:
                asked["method"] = "tempering"
        return RunDirectory.create(path, loaded, target, **asked)


def run(
    system: str | Path,
    out: str | Path | None = None,
    *,
    budget: str | None = None,
    seed: int | None = None,
    device: str | None = None,
    progress: Callable[[float, str], None] | None = None,
    method: str | None = None,
    ess: float | None = None,
    check_with_md: int | None = None,
) -> RunDirectory:
    """Do everything: reference, train, sample, report. Call it again to continue.

    Parameters
    ----------
    system
        Name of a shipped system, folder with a ``system.yaml``, or run directory.
    out
        Run directory (default ``runs/NAME``).
    budget
        ``quick``, ``standard`` (default) or ``thorough``.
    seed
        Random seed (default 0).
    device
        ``auto`` (default: a CUDA GPU if there is one), ``cpu`` or ``cuda``.
    progress
        Called with the fraction of the present stage that is done and a short text.
    method, ess
        ``tempering`` or, for molecules, ``annealing``: without reference dynamics, to a relative
        ESS of ``ess`` (default what :func:`~openmm_eqflow.training.recipes.make_recipe` gives).
    check_with_md
        1 for parallel tempering beside an annealed path, which the report compares.

    Returns
    -------
    RunDirectory
        Its ``path`` is the folder, ``metrics()`` the figures of the report.

    Raises
    ------
    EqFlowError
        Whatever stops a stage, in one line.

    Examples
    --------
    >>> made = run("alanine-dipeptide", "my-run", budget="quick")  # doctest: +SKIP
    >>> made.metrics()["relative_ess"]  # doctest: +SKIP
    """
    directory = open_run(
        system,
        out,
        budget=budget,
        seed=seed,
        device=device,
        method=method,
        ess=ess,
        check_with_md=check_with_md,
    )
    with directory.locked():
        for stage in STAGES:
            run_stage(directory, stage, progress=_named(stage, progress))
    return directory


def _named(
    stage: str, progress: Callable[[float, str], None] | None
) -> Callable[[float, str], None] | None:
    if progress is None:
        return None
    return lambda fraction, text: progress(fraction, f"{stage}: {text}")
