"""The main job in four stages, each resumable: reference, train, sample, report."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from typing import Any

import torch

from openmm_eqflow.atomic import write_json, write_npz
from openmm_eqflow.checkpoint import save_flow
from openmm_eqflow.distributed import is_main, share
from openmm_eqflow.ensemble import Proposals
from openmm_eqflow.errors import ConfigurationError, TrainingError
from openmm_eqflow.evaluation import evaluate_flow
from openmm_eqflow.fitting import split_frames, train_flow
from openmm_eqflow.flow_choice import flow_of, own_flow
from openmm_eqflow.library import MolecularSystem
from openmm_eqflow.outputs import chain_metrics, write_trajectory
from openmm_eqflow.reference import load_reference, run_reference
from openmm_eqflow.rundir import STAGES, RunDirectory
from openmm_eqflow.sampling import run_chains
from openmm_eqflow.target import BoltzmannTarget

__all__ = ["build_target", "flow_of", "run_stage"]

Progress = Callable[[float, str], None]
logger = logging.getLogger(__name__)
_EXTENSIONS = (1, 2, 4)  # of the reference stage, while it has too few frames


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
    handler = run.log_to_file()
    started = time.monotonic()
    try:
        logger.info("stage %s starts", stage)
        work = _RUNNERS[stage] if is_main() or stage in _TOGETHER else (lambda *_: {})
        facts = work(run, progress or (lambda fraction, text: None))
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
    recipe = run.config.recipe
    system = run.load_system()
    enough = min(recipe.min_frames, recipe.max_frames)
    for extension in _EXTENSIONS:
        data = run_reference(
            system,
            run.path,
            seconds=extension * recipe.reference_seconds,
            max_frames=recipe.max_frames,
            seed=run.config.seed,
            progress=progress,
        )
        if data.n_frames >= enough:
            break
        if extension < _EXTENSIONS[-1]:
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
        flow, result = train_flow(
            run.config.recipe,
            target,
            data,
            seed=run.config.seed,
            folder=run.path / "training",
            device=run.config.device,
            log=run.path / "history.csv",
            progress=progress,
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
        }
    if is_main():
        save_flow(flow, run.path / "flow", metadata)
    return {
        "n_steps": result.n_steps,
        "training_seconds": result.seconds,
        "history": result.history,
        "audit": flow.audit_report,
    }


def _sample(run: RunDirectory, progress: Progress) -> dict[str, Any]:
    run.require("train")
    recipe, seed = run.config.recipe, run.config.seed
    system = run.load_system()
    with build_target(system) as target:
        flow = own_flow(run.path / "flow", target.system_hash)
        test, reference_u = None, None
        if run.is_complete("reference"):
            data = load_reference(run.path)
            test = split_frames(data)[1][:2000]
            reference_u = data.reduced_energies
        metrics, samples, prior_weights = evaluate_flow(
            flow,
            target,
            n_samples=recipe.n_evaluate,
            seed=seed + 11,
            name=system.name,
            test_frames=test,
            folder=run.path / "evaluation",
            progress=lambda f, text: progress(0.5 * f, f"independent flow samples: {text}"),
        )
        if not is_main():
            return {}
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
        generator = torch.Generator().manual_seed(seed + 12)
        # The first samples choose where the chains start, the others are their first proposals.
        k = len(samples.u) // 10
        # Diagnostics need four steps of every chain, however few samples are asked for.
        n_chains = max(1, min(recipe.n_chains, recipe.n_samples // 4))
        start = _starting_points(n_chains, samples.x[:k], samples.log_weight[:k], generator)
        rest = Proposals(samples.x[k:], samples.log_q[k:], samples.u[k:] * target.kT)
        chains = run_chains(
            flow,
            target,
            start,
            run.path / "samples",
            n_steps=-(-recipe.n_samples // n_chains),
            n_proposals=recipe.n_proposals,
            n_local_steps=recipe.n_local_steps,
            seed=seed + 13,
            stored=rest,
            progress=lambda f, text: progress(0.5 + 0.5 * f, f"Markov chains: {text}"),
        )
    write_trajectory(run.path, system, chains)
    metrics["chain"] = chain_metrics(chains)
    if reference_u is not None:
        metrics["reference_mean_reduced_potential"] = float(reference_u.mean())
    write_json(run.path / "metrics.json", metrics)
    shutil.rmtree(run.path / "evaluation", ignore_errors=True)
    return {key: metrics[key] for key in ("relative_ess", "prior_relative_ess", "pareto_k")}


def _starting_points(
    n: int, x: torch.Tensor, log_weight: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Sampling-importance-resampling: chains start where the reweighted flow says."""
    if not bool(torch.isfinite(log_weight).any()):
        raise TrainingError(
            f"none of {len(log_weight)} flow samples has a finite weight; train longer or give "
            "the reference stage more time"
        )
    weights = torch.softmax(log_weight, 0)
    return x[torch.multinomial(weights, n, replacement=True, generator=generator)]


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
