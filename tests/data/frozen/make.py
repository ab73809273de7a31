"""Makes the fixtures of tests/project/test_frozen.py, on commit 9b6c0eb and no other.

Other commits lay the package out differently; this script is kept to say what the fixtures are,
and to be run again on a checkout of that commit (2 minutes on one core)::

    HERE=$PWD                                   # a checkout that has this file
    git worktree add ../old 9b6c0eb && cd ../old
    PYTHONPATH=. OMP_NUM_THREADS=1 python $HERE/tests/data/frozen/make.py [PART ...]

Without a PART all are made, in the order of ``PARTS``. With the versions of constraints.txt on the
same kind of CPU, flows, names, help and moves repeat bit for bit. Reference data (tuned by the
clock), what is trained on them, the storage (random velocities) and seconds do not: make
``runs``, ``moves`` and ``storage`` together. Nothing in a fixture names a folder of the machine
it was made on: checked at the end.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import logging
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from openmm import unit
from openmmtools import multistate
from openmmtools.mcmc import LangevinDynamicsMove, SequenceMove
from openmmtools.states import SamplerState, ThermodynamicState
from openmmtools.utils import serialize

import openmm_eqflow
from openmm_eqflow import AnnealedMove, FlowMove, LatentMove, load_flow, load_system

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "project"))
import test_frozen as frozen  # noqa: E402  (what is looked at is defined once, in the test)

COMMIT = "9b6c0eb"
LJ55_CONFIGURATIONS, LJ55_PATHS = 16, 40
FLOW = "/frozen/flow.safetensors"  # path of the flow in stored moves; exists nowhere
logger = logging.getLogger("frozen")


def old(module: str) -> Any:
    """Return a module of the package as 9b6c0eb had it."""
    return importlib.import_module(f"openmm_eqflow.{module}")


def write(name: str, content: Any) -> None:
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False)
    (HERE / name).write_text(text + "\n", encoding="utf-8")


# -- machine, names, commands ---------------------------------------------------------------------


def public() -> None:
    write("probe.json", frozen.probe())
    write("public.json", frozen.public_names())
    write(
        "help.json", {"click": importlib.metadata.version("click"), "texts": frozen.help_texts()}
    )


# -- flows that ship ------------------------------------------------------------------------------


def _displaced(flow: Any, n: int) -> torch.Tensor:
    """Samples, shaken, turned and shifted: log q must be that of the shape alone."""
    stream = torch.Generator().manual_seed(20)
    x = flow.sample(n, generator=stream)
    # Stiff bonds of a molecule bear 1 pm, clusters ten times as much.
    noise = 0.001 if len(flow.prior.event_shape) == 1 else 0.01
    x = x + noise * torch.randn(x.shape, generator=stream, dtype=torch.float64)
    x = frozen.turned(x, 1, seed=21) if flow.n_dims == 3 else x.flip(-1)
    return x + torch.randn(n, 1, flow.n_dims, generator=stream, dtype=torch.float64)


def flows() -> None:
    (HERE / "flows").mkdir(exist_ok=True)
    records = {}
    for name in (*frozen.POINTWISE, "lj55"):
        flow = load_flow(name)
        found = {"z": flow.prior.sample_latent(4, generator=torch.Generator().manual_seed(22))}
        found["log_prior"] = flow.prior.latent_log_prob(found["z"])
        record = json.loads(Path(flow.source[0]).with_suffix(".json").read_text("utf-8"))
        tensors, _ = frozen.tensors_of(Path(flow.source[0]))
        # toluene's file is older than the entry inverse_corrections, which then means 0.
        record = {"inverse_corrections": 0} | record
        kept = ("format", "grid", "inverse_corrections", "chunk_size")
        records[name] = {key: record[key] for key in kept}
        for part in ("prior", "vector_field"):
            digest = frozen.digest_of(record[part]["config"])
            records[name][part] = {"kind": record[part]["kind"], "config": digest}
        records[name]["system_hash"] = record["metadata"]["system_hash"]
        records[name]["tensors"] = frozen.described(tensors)
        records[name]["bits"] = frozen.bits_of(tensors)
        if name == "lj55":
            stream = torch.Generator().manual_seed(23)
            x = flow.sample(LJ55_CONFIGURATIONS, generator=stream).float().double()
            paths = flow.log_prob(frozen.turned(x, LJ55_PATHS, seed=24))
            found |= {"x": x, "log_q": paths.reshape(LJ55_PATHS, -1)}
            levels = frozen.levels_of(flow, record, x[:2])
            tables = {key: frozen.fingerprint(v) for key, v in flow.levels._asdict().items()}
            write("lj55.json", {"levels": levels, "tables": tables})
        else:
            x = _displaced(flow, 4 if name == "lj13" else 6)
            found |= {"x": x, "log_q": flow.log_prob(x)}
            flow.module.double()
            found["log_q_float64"] = flow.log_prob(x)
            assert torch.isfinite(found["log_q"]).all(), name
        np.savez_compressed(
            HERE / "flows" / f"{name}.npz", **{k: v.numpy() for k, v in found.items()}
        )
    write("flows.json", records)


# -- runs -----------------------------------------------------------------------------------------

SMALL = {
    # Steps end the training: in 1e8 seconds the schedule does not notice the time they took.
    "train_seconds": 1e8,
    "max_steps": 40,
    "n_shards": 1,
    "reference_seconds": 2.0,
    "min_frames": 20,
    "batch_size": 32,
    "learning_rate": 0.01,
    "average": 0.9,
    "n_evaluate": 576,
    "n_samples": 80,
    "n_chains": 4,
    "n_proposals": 4,
    "n_local_steps": 5,
}
CLUSTER = {
    "max_frames": 60,
    "grid_tolerance": 1e-3,
    "field": {
        "width": 4,
        "n_layers": 1,
        "n_vectors": 2,
        "readout_width": 4,
        "n_steps": 1,
        "n_nodes": 4,
        "n_rbf": 6,
    },
}
MOLECULE = {
    "max_frames": 40,
    "prior_rounds": 1,
    "prior_samples": 1000,
    "n_pool": 500,
    "chunk": 300,
    "n_chunks": 3,
    "grow_every": 10,
    "field": {"width": 12, "conditioner_width": 12, "torsion_width": 8},
}


class Cut(Exception):
    """Ends a stage where a kill would."""


def _start(path: Path, name: str, recipe: dict[str, Any]) -> Any:
    system, directory = load_system(name), old("rundir").RunDirectory
    with old("workflow").build_target(system) as target:
        run = directory.create(path, system, target, budget="quick", seed=0, device="cpu")
    small = dataclasses.replace(run.config.recipe, **SMALL, **recipe)
    run.config = dataclasses.replace(run.config, recipe=small)
    run._write_config()
    return run


def _cut_training(run: Any) -> None:
    """Stop in step 20, after a checkpoint of step 19 that has an evaluation of step 10."""

    def often(*arguments: Any, **options: Any) -> Any:
        settings = original(*arguments, **options)
        return dataclasses.replace(settings, checkpoint_seconds=0.0, evaluate_steps=10)

    def stop(_: float, text: str) -> None:
        if "step 20" in text:
            raise Cut

    fitting = old("fitting")
    original, fitting.training_settings = fitting.training_settings, often
    try:
        old("workflow").run_stage(run, "train", progress=stop)
    except Cut:
        return
    finally:
        fitting.training_settings = original
    raise AssertionError("the training was not cut")


def _keep(run: Path, name: str, *parts: str) -> None:
    """Copy ``parts`` of a run to a folder of the fixture, made anew."""
    shutil.rmtree(HERE / name, ignore_errors=True)
    for part in parts:
        source, to = run / part, HERE / name / part
        to.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, to, ignore=shutil.ignore_patterns("lock", "stderr.log"))
        else:
            shutil.copy(source, to)


def _trained(run: Any, kind: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What the uninterrupted rest of a cut training came to."""
    tensors, _ = frozen.tensors_of(run.path / "training" / "checkpoint.safetensors")
    flow = load_flow(run.path / "flow")
    x = flow.sample(4, generator=torch.Generator().manual_seed(25))
    average = [tensors[k].double().flatten() for k in sorted(tensors) if k[:7] == "average"]
    facts = {
        "tensors": frozen.described(tensors),
        "grid": list(flow.grid),
        "history.csv": (run.path / "history.csv").read_text("utf-8").splitlines(),
    }
    end = {"x": x, "log_q": flow.log_prob(x), "average": torch.cat(average).float()}
    return facts, {f"{kind}.{key}": value for key, value in end.items()}


def runs() -> None:
    run_stage = old("workflow").run_stage

    def stop(fraction: float, _: str) -> None:
        if fraction > 0.75:  # the first of two chunks of chains is written
            raise Cut

    facts, end = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        run = _start(Path(folder) / "run", "harmonic", CLUSTER)
        run_stage(run, "reference")
        _cut_training(run)
        _keep(run.path, "cut-training", "history.csv", "training")
        run_stage(run, "train")
        facts["cluster"], found = _trained(run, "cluster")
        end |= found
        try:
            run_stage(run, "sample", progress=stop)
        except Cut:
            chunks = sorted(p.name for p in (run.path / "samples").iterdir())
            assert chunks == ["chunk-00000.npz"], chunks
            before = (run.path / "samples" / chunks[0]).read_bytes()
        _keep(run.path, "cut-sampling", "evaluation")
        run_stage(run, "sample")
        run_stage(run, "report")
        assert before == (run.path / "samples" / chunks[0]).read_bytes()
        shutil.rmtree(run.path / "training")
        for name in ("report.html", "run.log", "stages/report.json"):
            (run.path / name).unlink()
        _keep(run.path, "run", *sorted(p.name for p in run.path.iterdir()))

        run = _start(Path(folder) / "molecule", "alanine-dipeptide-vacuum", MOLECULE)
        run_stage(run, "reference")
        _cut_training(run)
        (run.path / "run.log").unlink()
        _keep(run.path, "molecule", *sorted(p.name for p in run.path.iterdir()))
        run_stage(run, "train")
        facts["molecule"], found = _trained(run, "molecule")
        end |= found
    write("training.json", facts)
    np.savez_compressed(HERE / "trained.npz", **{k: v.numpy() for k, v in end.items()})


# -- openmmtools ----------------------------------------------------------------------------------


def _flow() -> Any:
    """The flow of the run, as if it lay where no machine has one."""
    flow = load_flow(HERE / "run" / "flow")
    assert flow.source is not None
    flow.source = (FLOW, flow.source[1])
    return flow


def _moves(flow: Any) -> dict[str, Any]:
    return {
        "FlowMove": FlowMove(flow, n_proposals=4, n_predraw=64, seed=31),
        "LatentMove": LatentMove(flow, step=0.5, n_repeats=3, seed=32),
        "AnnealedMove": AnnealedMove(flow, n_proposals=2, n_bridge=2, step=0.5, seed=33),
    }


def moves() -> None:
    system = load_system("harmonic")
    state = ThermodynamicState(system.system, frozen.KELVIN[0] * unit.kelvin)
    stored = {}
    for name, move in _moves(_flow()).items():
        sampler_state = SamplerState(system.positions)
        for _ in range(10):
            move.apply(state, sampler_state)
        stored[name] = serialize(move)
        assert stored[name]["flow_path"] == FLOW
    text = yaml.safe_dump(stored, sort_keys=False)
    (HERE / "moves.yaml").write_text(text, encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        found = frozen.restored(yaml.safe_load(text), frozen.copy_of_flow(Path(folder)))
    after = {
        name: {"statistics": found["after"][name], "positions": found["positions"][name]}
        for name in stored
    }
    write("moves-after.json", after)


def storage() -> None:
    system = load_system("harmonic")
    local = LangevinDynamicsMove(timestep=10 * unit.femtosecond, n_steps=10)
    move = SequenceMove([local, *_moves(_flow()).values()])
    for name in ("storage.nc", "storage_checkpoint.nc"):
        (HERE / name).unlink(missing_ok=True)
    states = [ThermodynamicState(system.system, t * unit.kelvin) for t in frozen.KELVIN]
    sampler = multistate.ReplicaExchangeSampler(mcmc_moves=move, number_of_iterations=4)
    reporter = multistate.MultiStateReporter(str(HERE / "storage.nc"), checkpoint_interval=2)
    sampler.create(states, [SamplerState(system.positions)], reporter)
    sampler.run()
    statistics = [
        [m.statistics for m in sequence.move_list if hasattr(m, "statistics")]
        for sequence in sampler.mcmc_moves
    ]
    energies = np.asarray(reporter.read_energies()[0]).tolist()
    reporter.close()
    facts = {"iteration": sampler.iteration, "statistics": statistics, "energies": energies}
    write("storage.json", facts)


PARTS = (public, flows, runs, moves, storage)


def main() -> None:
    package = Path(openmm_eqflow.__file__).parent
    head = subprocess.run(
        ["git", "-C", str(package), "log", "-1", "--format=%H"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    clean = ["git", "-C", str(package), "diff", "--quiet", "HEAD", "--", str(package)]
    if not head.startswith(COMMIT) or subprocess.run(clean, check=False).returncode:
        raise SystemExit(f"{package} is not the package of {COMMIT}; see the docstring")
    for part in PARTS:
        if not sys.argv[1:] or part.__name__ in sys.argv[1:]:
            logger.warning("%s", part.__name__)
            part()
    forbidden = {str(Path.cwd()), str(HERE.parents[2]), str(Path.home()), tempfile.gettempdir()}
    for path in HERE.rglob("*"):
        if path.is_file() and path != Path(__file__).resolve():
            named = [f for f in forbidden if f.encode() in path.read_bytes()]
            assert not named, f"{path} names {named}"


if __name__ == "__main__":
    main()
