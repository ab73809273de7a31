"""What commit 9b6c0eb did: densities, commands, names, stored moves and stored runs.

``tests/data/frozen/make.py`` made the fixtures with that commit. Whoever changes one of these on
purpose makes the fixture anew and says so in CHANGELOG.md; anything else that fails here breaks
what users have on disk or in their scripts.

Only public names are used, so that this file does not know where a module lives.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
import yaml

import openmm_eqflow
from openmm_eqflow import load_flow, load_system, save_flow

FROZEN = Path(__file__).resolve().parents[1] / "data" / "frozen"
POINTWISE = ("ala3", "alanine-dipeptide", "alanine-dipeptide-vacuum", "dw4", "lj13", "toluene")
KELVIN = (300.0, 330.0)


def words(name: str) -> Any:
    return json.loads((FROZEN / name).read_text(encoding="utf-8"))


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def tensors_of(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors of a safetensors file and the JSON the package keeps beside them."""
    with safetensors.safe_open(path, framework="pt") as handle:
        metadata = json.loads((handle.metadata() or {}).get("json", "{}"))
        return {key: handle.get_tensor(key) for key in handle.keys()}, metadata


def python(*arguments: str, **environment: str) -> str:
    """Standard output of a fresh interpreter, which must succeed and keep quiet on stderr."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# -- does this machine round like the one the fixtures were made on? ------------------------------


def probe() -> dict[str, str]:
    """Bits of small products, exponentials and the like, and what they depend on."""
    digest = hashlib.sha256()
    stream = torch.Generator().manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for dtype in (torch.float32, torch.float64):
            for m, k, n in ((6, 64, 96), (36, 17, 130), (1, 256, 64), (169, 9, 33)):
                a, b = (torch.rand(s, generator=stream, dtype=dtype) for s in ((m, k), (k, n)))
                y = (a - 0.5) @ (b - 0.5)
                for made in (y, y.exp(), y.sigmoid(), y.tanh(), y.sin(), y.sum(0), a.log()):
                    digest.update(made.contiguous().numpy().tobytes())
    finally:
        torch.set_num_threads(before)
    return {"bits": digest.hexdigest(), "torch": torch.__version__, "numpy": np.__version__}


@pytest.fixture(scope="module")
def exact() -> bool:
    """Whether results must have the very bits of 9b6c0eb."""
    return probe() == words("probe.json")


# -- log q of the flows that ship -----------------------------------------------------------------


def misfit(found: torch.Tensor, frozen: np.ndarray) -> float:
    return float(np.abs(found.numpy() - frozen).max())


@pytest.mark.parametrize("name", POINTWISE)
def test_log_prob(name: str, exact: bool) -> None:
    """2e-3 kT in the precision that ships, 1e-8 of log q in float64, bits where bits agree."""
    frozen = arrays(FROZEN / "flows" / f"{name}.npz")
    flow = load_flow(name)
    x = torch.from_numpy(frozen["x"])
    shipped = flow.log_prob(x)
    flow.module.double()
    double = flow.log_prob(x)
    assert shipped.dtype == double.dtype == torch.float64
    scale = float(np.abs(frozen["log_q_float64"]).max())
    assert misfit(shipped, frozen["log_q"]) < 2e-3
    assert misfit(double, frozen["log_q_float64"]) < 1e-8 * scale
    if exact:
        np.testing.assert_array_equal(shipped.numpy(), frozen["log_q"])
        np.testing.assert_array_equal(double.numpy(), frozen["log_q_float64"])
    moved = x[:1].clone()
    moved[:, 0, 0] += 5e-3  # power: five picometres of one atom are found out by both
    other = flow.log_prob(moved)
    assert not misfit(other, frozen["log_q"][:1]) < 2e-3
    assert not misfit(other, frozen["log_q_float64"][:1]) < 1e-8 * scale


@pytest.mark.parametrize("name", [*POINTWISE, "lj55"])
def test_prior_grid_and_files(name: str, tmp_path: Path) -> None:
    """Of given latents log p0; of the files every entry, also when they are written again."""
    frozen, expected = arrays(FROZEN / "flows" / f"{name}.npz"), words("flows.json")[name]
    flow = load_flow(name)
    log_p = flow.prior.latent_log_prob(torch.from_numpy(frozen["z"]))
    np.testing.assert_allclose(log_p.numpy(), frozen["log_prior"], rtol=1e-10)
    assert list(flow.grid) == expected["grid"]
    stem = save_flow(flow, tmp_path / "again", flow.metadata).with_suffix("")
    record = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
    for part in ("prior", "vector_field"):
        assert record[part]["kind"] == expected[part]["kind"]
        assert digest_of(record[part]["config"]) == expected[part]["config"]
    for key in ("format", "inverse_corrections", "chunk_size", "grid"):
        assert record[key] == expected[key], key
    assert record["audit"]["passed"] is True
    assert record["metadata"]["system_hash"] == expected["system_hash"]
    tensors, _ = tensors_of(stem.with_suffix(".safetensors"))
    assert described(tensors) == expected["tensors"]
    assert bits_of(tensors) == expected["bits"]


def digest_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def described(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {k: f"{v.dtype} {list(v.shape)}" for k, v in sorted(tensors.items())}


def bits_of(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        digest.update(key.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()


# -- the stochastic flow --------------------------------------------------------------------------


def fingerprint(values: Any) -> list[float]:
    """A hash with a tolerance: size, mean, mean square and a projection."""
    a = np.asarray(values, dtype=np.float64).ravel()
    scale = float(np.sqrt(np.square(a).mean()))
    return [float(a.size), float(a.mean()), scale, float(a @ np.cos(np.arange(a.size)))]


def agree(found: list[float], frozen: list[float], tolerance: float) -> bool:
    size, scale = frozen[0], frozen[2]
    gaps = [abs(a - b) / scale for a, b in zip(found[1:], frozen[1:], strict=True)]
    gaps[-1] /= np.sqrt(size)
    return found[0] == size and max(gaps) < tolerance


def levels_of(flow: Any, record: dict[str, Any], x: torch.Tensor) -> dict[str, list[float]]:
    """Fingerprints of what is deterministic: levels, time steps, field."""
    layers = record["layers"]
    found = {
        "grid": fingerprint(flow.grid),
        "timesteps": fingerprint(layers["timesteps"]),
        "path": fingerprint([layers["path"][k] for k in sorted(layers["path"])]),
        "n_leapfrog": fingerprint([layers["n_leapfrog"]]),
    }
    with torch.no_grad():
        for t in (0.1, 0.5, 0.9):
            found[f"field at {t}"] = fingerprint(flow.module(torch.tensor(t), x.float()))
    return found


def test_levels_of_the_stochastic_flow(tmp_path: Path) -> None:
    flow, frozen = load_flow("lj55"), words("lj55.json")
    path = save_flow(flow, tmp_path / "again").with_suffix(".json")
    record = json.loads(path.read_text(encoding="utf-8"))
    x = torch.from_numpy(arrays(FROZEN / "flows" / "lj55.npz")["x"])
    found = levels_of(flow, record, x[:2])
    assert found.keys() == frozen["levels"].keys()
    for key, values in found.items():
        assert agree(values, frozen["levels"][key], 1e-5), key
    other = levels_of(flow, record, 1.001 * x[:2])  # power
    assert not agree(other["field at 0.5"], frozen["levels"]["field at 0.5"], 1e-5)


def test_tables_of_the_stochastic_flow() -> None:
    """Energies, maps and time steps as the flow made them of its files."""
    flow = load_flow("lj55")
    kernels, maps = flow.layers[::2], flow.layers[1::2]
    levels = {
        "parameters": torch.stack([kernel.level for kernel in kernels]).numpy(),
        "tables": torch.stack([layer.table for layer in maps]).numpy(),
        "timesteps": np.array([kernel.timestep for kernel in kernels]),
        "spacing": maps[0].spacing,
        "n_leapfrog": kernels[0].n_leapfrog,
    }
    for key, frozen in words("lj55.json")["tables"].items():
        found = fingerprint(levels[key])
        assert agree(found, frozen, 1e-5), key
        assert not agree([found[0], *(1.001 * v for v in found[1:])], frozen, 1e-5)  # power


def turned(x: torch.Tensor, n: int, seed: int) -> torch.Tensor:
    """(n * len(x), N, 3): the same configurations in n orientations, so with other paths each."""
    random = np.random.default_rng(seed).normal(size=(n * len(x), 3, 3))
    return torch.einsum(
        "kij,knj->kni", torch.from_numpy(np.linalg.qr(random)[0]), x.repeat(n, 1, 1)
    )


@pytest.mark.slow
@pytest.mark.statistical
def test_log_prob_of_the_stochastic_flow() -> None:
    """Mean of log q-hat over paths of 16 configurations; a lie of 1.2 kT or 3 % is found out."""
    frozen = arrays(FROZEN / "flows" / "lj55.npz")
    x = torch.from_numpy(frozen["x"])
    n = 4
    log_q = load_flow("lj55").log_prob(turned(x, n, seed=1)).numpy().reshape(n, len(x))
    assert np.isfinite(log_q).all()
    spread = frozen["log_q"].std(axis=0, ddof=1)
    error = spread * np.sqrt(1 / n + 1 / len(frozen["log_q"]))

    def is_frozen(values: np.ndarray) -> bool:
        gap = values.mean(axis=0) - frozen["log_q"].mean(axis=0)
        whole = abs(gap.mean()) < 4 * np.sqrt(np.square(error).sum()) / len(gap)
        return bool(whole and (np.abs(gap) < 4.5 * error).all())

    assert is_frozen(log_q)
    for lie in (log_q + 1.2, log_q - 1.2, 1.03 * log_q, -log_q, 0.0 * log_q):
        assert not is_frozen(lie)
    ratio = log_q.std(axis=0, ddof=1).mean() / spread.mean()
    assert 0.5 < ratio < 1.6  # paths are as different as they were


# -- command line and names -----------------------------------------------------------------------


#: Commands that came after what is frozen.
NEW_COMMANDS = {"anneal", "bench chart", "bench gpu", "campaign", "doctor", "isomers"}
#: Options that came after, by command.
NEW_OPTIONS = {
    "": ("--allow-code",),
    "init": (
        *("--cif", "--prmtop", "--inpcrd", "--top", "--gro", "--psf", "--crd", "--params"),
        *("--chain", "--residue", "--strip-solvent", "--smiles", "--sdf", "--charges"),
        *("--constraints", "--hydrogen-mass", "--json"),
    ),
    "evaluate": ("--temperatures", "--frames"),
    **dict.fromkeys(("train", "sample", "report", "systems"), ("--json",)),
    **dict.fromkeys(("run", "reference"), ("--json", "--method", "--ess", "--check-with-md")),
    **dict.fromkeys(("audit", "compare", "publish"), ("--json",)),
}
GROUPED = {"init"}  # options under headings, in another order
#: Words of the frozen help that are no longer true, and what stands there now.
NO_LONGER = {
    "init": ("[required]", ""),  # --pdb: --cif, --gro and others stand for it
    "": ("data by parallel tempering", "data: by paths or dynamics"),
    "reference": ("data by parallel tempering", "data: by paths or dynamics"),
}


def help_texts(*command: str) -> dict[str, str]:
    """``--help`` of a command and of all below it."""
    text = python("-m", "openmm_eqflow.cli", *command, "--help", COLUMNS="80", TERM="dumb")
    found = {" ".join(command): text}
    _, _, listed = text.partition("\nCommands:\n")
    for line in listed.splitlines():
        if line.startswith("  ") and not line.startswith("   "):
            found |= help_texts(*command, line.split()[0])
    return found


def test_help_of_every_command() -> None:
    frozen, found = words("help.json"), help_texts()
    assert len(found) > 15
    assert found.keys() - frozen["texts"].keys() == NEW_COMMANDS
    same_click = frozen["click"] == importlib.metadata.version("click")
    for command, text in found.items():
        if command in NEW_COMMANDS:
            continue
        for new in NEW_COMMANDS:  # listed by the group they are in
            group, _, name = new.rpartition(" ")
            if command == group:
                text = re.sub(rf"\n  {name} .*(\n   .*)*", "", text)
        expected = frozen["texts"][command]
        for option in NEW_OPTIONS.get(command, ()):
            text, n_found = re.subn(rf"\n  {option} .*(\n   .*)*", "", text)
            assert n_found == 1, option
        if command in NO_LONGER:
            assert NO_LONGER[command][0] in expected
            expected = expected.replace(*NO_LONGER[command])
        # Options change the width of columns.
        if same_click and command not in NEW_OPTIONS.keys() | NO_LONGER.keys():
            assert text == expected, command
        if command in GROUPED:
            body, was = re.sub(r"\n[A-Z][a-z ]+:\n", "\n", text), expected.replace("Options:", "")
            assert sorted(body.split()) == sorted(was.split()), command
            continue
        assert text.split() == expected.split(), command  # whatever the line breaks of click


#: Public names that take more than they did.
MORE_ARGUMENTS = {"InternalCoordinatePrior", "init_system", "run"}


def public_names() -> dict[str, dict[str, Any]]:
    """Signature of every public name, and what the package's own classes offer."""
    found: dict[str, dict[str, Any]] = {}
    for name in sorted(openmm_eqflow.__all__):
        value = getattr(openmm_eqflow, name)
        found[name] = {"signature": str(inspect.signature(value)), "attributes": []}
        if inspect.isclass(value):
            own = [c for c in value.__mro__ if c.__module__.startswith("openmm_eqflow")]
            listed = {key for c in own for key in vars(c) if not key.startswith("_")}
            found[name]["attributes"] = sorted(listed)
    return found


def test_public_names() -> None:
    frozen, found = words("public.json"), public_names()
    assert len(frozen) == 15
    assert found.keys() == frozen.keys()
    for name, entry in frozen.items():
        # Moves take any path of layers now, of which an EquivariantFlow is one.
        signature = found[name]["signature"].replace("FlowPath", "EquivariantFlow")
        signature = signature.replace("-> 'Any'", "-> 'EquivariantFlow'")
        if name in MORE_ARGUMENTS:
            # Every argument there was is there, in its place; the others have defaults.
            value = inspect.signature(getattr(openmm_eqflow, name))
            names = re.findall(r"(\w+): '", entry["signature"])
            assert len(names) > 4
            assert list(value.parameters)[: len(names)] == names
            assert all(
                p.default is not inspect.Parameter.empty
                for p in list(value.parameters.values())[len(names) :]
            )
            continue
        assert signature == entry["signature"], name
        assert set(entry["attributes"]) <= set(found[name]["attributes"]), name


# -- moves of openmmtools, stored by 9b6c0eb ------------------------------------------------------

RESTORE = """
import json, sys
import numpy as np
from openmm import unit
from openmmtools.states import SamplerState, ThermodynamicState
from openmmtools.utils import deserialize, serialize
import openmm_eqflow

stored, flow_path, kelvin = json.loads(sys.argv[1]), sys.argv[2], float(sys.argv[3])
missing = {}
for name, state in stored.items():
    try:
        deserialize(dict(state))
    except Exception as error:
        missing[name] = type(error).__name__
system = openmm_eqflow.load_system("harmonic")
state = ThermodynamicState(system.system, kelvin * unit.kelvin)
openmm_eqflow.FlowMove(flow_path, seed=1)  # a copy of the flow with the same hash
result = {"missing": missing, "again": {}, "public": {}, "after": {}, "positions": {}}
for name, state_of_move in stored.items():
    move = deserialize(dict(state_of_move))
    result["public"][name] = type(move) is getattr(openmm_eqflow, name)
    result["again"][name] = serialize(move)
    sampler_state = SamplerState(system.positions)
    for _ in range(4):
        move.apply(state, sampler_state)
    result["after"][name] = move.statistics
    result["positions"][name] = np.asarray(
        sampler_state.positions.value_in_unit(unit.nanometer)).tolist()
    deserialize(serialize(move))
print(json.dumps(result))
"""


def copy_of_flow(tmp_path: Path) -> Path:
    for suffix in (".json", ".safetensors"):
        shutil.copy(FROZEN / "run" / f"flow{suffix}", tmp_path / f"copy{suffix}")
    return tmp_path / "copy.safetensors"


def restored(stored: dict[str, Any], flow: Path) -> dict[str, Any]:
    output = python("-c", RESTORE, json.dumps(stored), str(flow), str(KELVIN[1]))
    return json.loads(output.splitlines()[-1])


def test_stored_moves_come_back(tmp_path: Path, exact: bool) -> None:
    stored = yaml.safe_load((FROZEN / "moves.yaml").read_text(encoding="utf-8"))
    assert set(stored) == {"FlowMove", "LatentMove", "AnnealedMove"}
    found = restored(stored, copy_of_flow(tmp_path))
    # The flow of the stored path is nowhere: only the copy with its hash can have served.
    assert set(found["missing"].values()) == {"CheckpointError"}
    assert len(found["missing"]) == 3
    assert all(found["public"].values())
    after = words("moves-after.json")
    for name, state in stored.items():
        place = "_serialized__module_name"
        kept = {k: v for k, v in found["again"][name].items() if k != place}
        assert kept == {k: v for k, v in state.items() if k != place}
        statistics = found["after"][name]
        before = state["statistics"]["n_proposed"]
        assert statistics.keys() == state["statistics"].keys()
        assert (
            statistics["n_proposed"] - before == after[name]["statistics"]["n_proposed"] - before
        )
        assert statistics["n_accepted"] > state["statistics"]["n_accepted"] > 0
        if exact:  # same stream, same moves
            assert statistics == pytest.approx(after[name]["statistics"], rel=1e-6)
            np.testing.assert_allclose(
                found["positions"][name], after[name]["positions"], atol=1e-6
            )


RESUME = """
import json, sys
import numpy as np
from openmmtools import multistate
import openmm_eqflow

storage, flow_path = sys.argv[1:]
openmm_eqflow.FlowMove(flow_path, seed=1)
reporter = multistate.MultiStateReporter(storage, open_mode="r+", checkpoint_interval=2)
sampler = multistate.ReplicaExchangeSampler.from_storage(reporter)

def statistics():
    return [[m.statistics for m in move.move_list if hasattr(m, "statistics")]
            for move in sampler.mcmc_moves]

result = {"iteration": sampler.iteration, "before": statistics(),
          "energies": np.asarray(reporter.read_energies()[0]).tolist()}
sampler.extend(3)
result |= {"iteration after": sampler.iteration, "after": statistics(),
           "energies after": np.asarray(reporter.read_energies()[0]).tolist()}
reporter.close()
print(json.dumps(result))
"""


def test_stored_replica_exchange_goes_on(tmp_path: Path) -> None:
    for name in ("storage.nc", "storage_checkpoint.nc"):
        shutil.copy(FROZEN / name, tmp_path / name)
    flow = copy_of_flow(tmp_path)
    output = python("-c", RESUME, str(tmp_path / "storage.nc"), str(flow))
    found, frozen = json.loads(output.splitlines()[-1]), words("storage.json")
    assert found["iteration"] == frozen["iteration"]
    assert found["before"] == frozen["statistics"]
    assert found["energies"] == frozen["energies"]
    assert found["iteration after"] == frozen["iteration"] + 3
    for before, after in zip(found["before"], found["after"], strict=True):
        assert len(before) == 3
        for old, new in zip(before, after, strict=True):
            assert new["n_proposed"] > old["n_proposed"] > 0
    assert found["energies after"][: frozen["iteration"] + 1] == frozen["energies"]
    new = np.array(found["energies after"])
    assert new.shape == (frozen["iteration"] + 4, 2, 2)
    assert np.isfinite(new).all()
    # u at the two temperatures is one energy over two kT: nothing was put into the wrong state.
    ratio = new[..., 0] / new[..., 1]
    np.testing.assert_allclose(ratio, KELVIN[1] / KELVIN[0], rtol=1e-4)


# -- runs, made or cut by 9b6c0eb -----------------------------------------------------------------

WRITTEN_BY_REPORT = {"report.html", "run.log", "stages/report.json", "metrics.json"}


def files_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of every file."""
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns)
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def copied(tmp_path: Path, *layers: str, without: tuple[str, ...] = ()) -> Path:
    """A run made of folders of the fixture, the later ones on top, less some files."""
    run = tmp_path / "run"
    for layer in layers:
        shutil.copytree(FROZEN / layer, run, dirs_exist_ok=True)
    for name in without:
        path = run / name
        assert path.exists(), f"{name} is not in the fixture"
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return run


def command(*arguments: object) -> str:
    return python("-m", "openmm_eqflow.cli", *map(str, arguments), COLUMNS="200")


def numbers(content: Any, path: str = "") -> dict[str, float]:
    """All numbers of nested containers by their place."""
    if isinstance(content, dict):
        parts = [numbers(v, f"{path}/{k}") for k, v in content.items()]
    elif isinstance(content, list):
        parts = [numbers(v, f"{path}/{k}") for k, v in enumerate(content)]
    else:
        plain = isinstance(content, (int, float)) and not isinstance(content, bool)
        return {path: float(content)} if plain else {}
    return {k: v for part in parts for k, v in part.items()}


def test_finished_run_is_complete_and_gets_its_report(tmp_path: Path) -> None:
    run = copied(tmp_path, "run")
    before, frozen = files_of(run), json.loads((run / "metrics.json").read_text())
    output = command("run", run)
    for stage in ("reference", "train", "sample"):
        assert f"{stage:<10} complete" in output
    assert output.count(" complete") == 3
    assert f"relative ESS {frozen['relative_ess']:.3f}" in output
    after = files_of(run)
    assert set(after) - set(before) == {"report.html", "run.log", "stages/report.json"}
    for name, content in before.items():
        if name not in WRITTEN_BY_REPORT:
            assert after[name] == content, f"{name} was touched"
    assert b"harmonic" in after["report.html"][0]
    # The report's own analysis of the same samples, in float64: the same numbers.
    found = json.loads((run / "metrics.json").read_text())
    assert found.keys() >= frozen.keys()
    for part in ("chain", "populations", "relative_ess", "log_z", "pareto_k"):
        assert numbers({part: found[part]}) == pytest.approx(numbers({part: frozen[part]}), 1e-6)
    assert found["verdict"]["word"] == frozen["verdict"]["word"]
    again = files_of(run)
    assert openmm_eqflow.run(run).metrics() == found
    assert files_of(run) == again


CHAINS = ("samples", "samples.npz", "samples.dcd", "topology.pdb", "metrics.json")
LATER = ("stages/sample.json",)
SAMPLING_CUTS = {
    # What is lost: layers on top of the finished run, files that were not there yet.
    "a file": (("run",), ("samples.dcd",)),
    "all samples": (("run",), (*CHAINS, *LATER, "flow_samples.npz")),
    "cut in the chains": (
        ("run", "cut-sampling"),
        (*CHAINS[1:], *LATER, "samples/chunk-00001.npz"),
    ),
    "cut in the independent samples": (
        ("run", "cut-sampling"),
        (*CHAINS, *LATER, "flow_samples.npz", "evaluation/11-576-00001.safetensors"),
    ),
}


@pytest.mark.parametrize("cut", SAMPLING_CUTS)
def test_sampling_goes_on(tmp_path: Path, cut: str, exact: bool) -> None:
    layers, without = SAMPLING_CUTS[cut]
    run = copied(tmp_path, *layers, without=without)
    kept = {
        name: content
        for name, content in files_of(run).items()
        if name.startswith(("flow.", "reference", "samples/", "stages/train", "stages/reference"))
    }
    made = openmm_eqflow.run(run)
    assert made.path == run
    after = files_of(run)
    for name, content in kept.items():
        assert after[name] == content, f"{name} was touched"
    assert {"report.html", "stages/sample.json", "stages/report.json"} <= set(after)
    assert not (run / "evaluation").exists()
    found, frozen = (arrays(p / "samples.npz") for p in (run, FROZEN / "run"))
    draws, frozen_draws = (arrays(p / "flow_samples.npz") for p in (run, FROZEN / "run"))
    assert {k: (v.shape, v.dtype) for k, v in found.items()} == {
        k: (v.shape, v.dtype) for k, v in frozen.items()
    }
    np.testing.assert_allclose(found["log_weight"], -found["u"] - found["log_q"])
    assert made.metrics()["chain"]["n_samples"] == 80
    n_kept = {"a file": 20, "cut in the chains": 10}.get(cut, 0)  # of 20 steps of 4 chains
    by_chain = {k: v.reshape(4, 20) for k, v in found.items() if v.size == 80}
    for key, values in by_chain.items():
        expected = frozen[key].reshape(4, 20)
        np.testing.assert_array_equal(values[:, :n_kept], expected[:, :n_kept])
        if exact:
            np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-6)
    stored = {"cut in the chains": 576, "cut in the independent samples": 512}.get(cut, 0)
    for key in ("u", "log_q", "log_weight", "positions", "prior_log_weight"):
        if key != "prior_log_weight":
            np.testing.assert_array_equal(draws[key][:stored], frozen_draws[key][:stored])
        np.testing.assert_allclose(draws[key], frozen_draws[key], rtol=1e-3, atol=2e-3)
    if stored == 576:  # read, not drawn again: the time is that of the first drawing
        seconds = json.loads((FROZEN / "run" / "metrics.json").read_text())["seconds_per_sample"]
        assert made.metrics()["seconds_per_sample"] == pytest.approx(seconds, rel=1e-12)
    # Power: another seed's samples would have passed none of these.
    assert np.abs(np.diff(frozen_draws["log_weight"])).max() > 0.1


def test_reference_of_a_lost_file_comes_from_its_chunks(tmp_path: Path) -> None:
    """No new simulation; what was made of the data is made again."""
    run = copied(tmp_path, "run", without=("reference.npz", "reference.dcd"))
    command("reference", run)
    after, before = files_of(run), files_of(FROZEN / "run")
    found, frozen = (arrays(p / "reference.npz") for p in (run, FROZEN / "run"))
    assert found.keys() == frozen.keys()
    for key, values in frozen.items():
        np.testing.assert_array_equal(found[key], values)
    chunks = [name for name in before if name.startswith("reference/")]
    assert len(chunks) >= 5
    assert all(after[name][0] == before[name][0] for name in chunks)
    assert len([name for name in after if "/chunk-" in name and name.startswith("ref")]) == 2
    facts, old = (json.loads(f["stages/reference.json"][0]) for f in (after, before))
    assert facts["n_frames"] == old["n_frames"]
    assert numbers(facts["convergence"]) == pytest.approx(numbers(old["convergence"]), rel=1e-6)
    assert not {"stages/train.json", "stages/sample.json"} & set(after)


@pytest.mark.parametrize("kind", [pytest.param("cluster", marks=pytest.mark.slow), "molecule"])
def test_training_goes_on(tmp_path: Path, kind: str, exact: bool) -> None:
    """From the step, weights, moments and random stream of the checkpoint."""
    layers, without = ("molecule",), ()
    if kind == "cluster":
        layers = ("run", "cut-training")
        without = (*CHAINS, *LATER, "flow_samples.npz", "stages/train.json")
        without += ("flow.json", "flow.safetensors")
    run = copied(tmp_path, *layers, without=without)
    frozen = words("training.json")[kind]
    file = run / "training" / "checkpoint.safetensors"
    first, state = tensors_of(file)
    assert described(first) == frozen["tensors"]
    assert (state["step"], sorted(state)) == (19, ["history", "seconds", "step"])
    output = command("train", run)
    assert "complete" not in output
    last, after = tensors_of(file)
    assert described(last) == frozen["tensors"]
    assert after["step"] == 40
    assert after["seconds"] > state["seconds"]
    # A training that started anew would not have the row of step 10, with its seconds.
    assert [row["step"] for row in after["history"]] == [10.0, 40.0]
    assert after["history"][0] == state["history"][0]
    assert after["history"][1].keys() == state["history"][0].keys()
    lines = (run / "history.csv").read_text(encoding="utf-8").splitlines()
    assert lines[:2] == frozen["history.csv"][:2]
    assert [line.split(",")[0] for line in lines] == ["step", "10", "40"]
    facts = json.loads((run / "stages" / "train.json").read_text(encoding="utf-8"))
    assert facts["n_steps"] == 40
    assert facts["audit"]["passed"] is True
    flow = load_flow(run / "flow")
    assert flow.metadata["n_steps"] == 40
    assert list(flow.grid) == frozen["grid"]
    end = arrays(FROZEN / "trained.npz")
    log_q = flow.log_prob(torch.from_numpy(end[f"{kind}.x"]))
    assert misfit(log_q, end[f"{kind}.log_q"]) < (1e-4 if exact else 0.05)
    weights = torch.cat([last[k].double().flatten() for k in sorted(last) if k[:7] == "average"])
    start = torch.cat([first[k].double().flatten() for k in sorted(first) if k[:7] == "average"])
    assert misfit(weights, end[f"{kind}.average"]) < (1e-6 if exact else 1e-3)
    assert misfit(start, end[f"{kind}.average"]) > 5e-3  # power: the steps since do matter
    assert load_system(flow.metadata["system"]).n_particles == flow.n_particles
