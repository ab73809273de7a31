"""One molecule of a campaign, a process: ``python -m openmm_eqflow.runs.campaign_job``.

The job comes as one JSON line on standard input; its end of file means that whoever asked is gone,
even by kill -9, and the process ends. What the job says is kept in ``jobs/NAME.json`` together
with the row it was asked by: a molecule that has an answer is not done again. A lock lets a job
wait for another process at the same molecule (one that a scheduler still runs for a campaign that
was killed) and take over its answer.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openmm_eqflow.errors import ConfigurationError, EqFlowError
from openmm_eqflow.files import write_json
from openmm_eqflow.runs.annealing import anneal_system
from openmm_eqflow.runs.stages import build_target, run
from openmm_eqflow.targets.library import load_system
from openmm_eqflow.targets.own_system import init_ligand, init_system
from openmm_eqflow.units import kelvin, temperature_quantity

__all__ = [
    "main",
    "perform",
    "stored",
]

#: What results of a run and of annealed samples share.
FIGURES = ("n_samples", "relative_ess", "relative_ess_error", "pareto_k", "log_z", "log_z_error")


def stored(out: Path, name: str) -> dict[str, Any]:
    """``asked`` and ``result`` (None before the end) of a molecule; empty if it was never begun.

    Raises
    ------
    ConfigurationError
        The file is torn or something else.

    Examples
    --------
    >>> stored(Path("no-such-campaign"), "methane")
    {}
    """
    file = out / "jobs" / f"{name}.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigurationError(f"{file} is not JSON: remove it to do that job again") from error
    if not isinstance(content, dict) or set(content) != {"asked", "result"}:
        raise ConfigurationError(f"{file} is of something else: choose another --out")
    return content


@contextmanager
def _alone(out: Path, name: str) -> Iterator[None]:
    """Hold a molecule; wait for whoever does."""
    import fcntl

    (out / "jobs").mkdir(parents=True, exist_ok=True)
    with (out / "jobs" / f".{name}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _folder(out: Path, row: Mapping[str, str], base: Path) -> Path | str:
    """Folder with the molecule's system.yaml, made now unless it exists."""
    if "folder" in row:
        beside = base / row["folder"]
        return beside if beside.is_dir() else row["folder"]
    folder = out / "systems" / row["name"]
    if folder.is_dir():
        return folder

    def file(column: str) -> Path | None:
        return base / row[column] if column in row else None

    temperature = temperature_quantity(float(row.get("temperature", "300")))
    if "smiles" in row or "sdf" in row:
        init_ligand(
            folder,
            smiles=row.get("smiles"),
            sdf=file("sdf"),
            charges=row.get("charges", "bcc"),
            temperature=temperature,
        )
    else:
        names = row.get("forcefield", "").split()
        init_system(
            folder,
            pdb=file("pdb"),
            topology=file("topology"),
            system_xml=file("system"),
            forcefield=[str(base / n) if (base / n).is_file() else n for n in names] or None,
            temperature=temperature,
        )
    return folder


def perform(job: Mapping[str, Any]) -> dict[str, Any]:
    """Do one molecule, from its row to the figures of the table.

    Parameters
    ----------
    job
        ``out`` and ``base`` (folders of the campaign and of its table), ``row`` (its columns that
        are not empty) and ``n_samples`` (of annealed samples).

    Returns
    -------
    dict
        ``status`` is ``done``, with figures, ``warnings`` and ``populations``, or ``failed`` with
        a ``message`` of one line; ``seconds`` either way.
    """
    started, row, out = time.monotonic(), job["row"], Path(job["out"])
    with _alone(out, row["name"]):
        before = stored(out, row["name"])
        if before.get("result") is not None:
            result: dict[str, Any] = before["result"]
            return result
        file = out / "jobs" / f"{row['name']}.json"
        write_json(file, {"asked": row, "result": None})
        try:
            found = {"status": "done", "message": "", **_sampled(job)}
        except (EqFlowError, OSError) as error:
            found = {"status": "failed", "message": " ".join(str(error).split())}
            sys.stderr.write(f"error: {found['message']}\n")  # the log, to which pages link
        found["seconds"] = time.monotonic() - started
        write_json(file, {"asked": row, "result": found})
        return found


def _sampled(job: Mapping[str, Any]) -> dict[str, Any]:
    row, out = job["row"], Path(job["out"])
    folder = _folder(out, row, Path(job["base"]))
    system, seed = load_system(folder), int(row.get("seed", "0"))
    where = out / "runs" / row["name"]
    if row["budget"] == "anneal":
        with build_target(system) as target:
            metrics = anneal_system(
                system, target, where, n_samples=job["n_samples"], seed=seed, progress=_say
            )
    else:
        metrics = run(folder, where, budget=row["budget"], seed=seed, progress=_say).metrics()
    return {
        "n_atoms": system.n_particles,
        "temperature": kelvin(system.temperature),
        **{key: metrics.get(key) for key in FIGURES},
        "verdict": metrics.get("verdict", {}).get("word", ""),
        "warnings": list(metrics.get("warnings", [])),
        "populations": _populations(metrics),
    }


def _populations(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List populations of states: of isomers, or of the chains of a run."""
    if "isomers" in metrics:
        keys = ("torsion", "state", "population", "population_error")
        return [{key: row[key] for key in keys} for row in metrics["isomers"]]
    rows = []
    for found in metrics.get("populations", []):
        estimate = found["estimates"].get("Markov chain")
        if found["kind"] == "population" and estimate is not None:
            rows.append(
                {
                    "torsion": found["name"],
                    "state": found["definition"],
                    "population": estimate["value"],
                    "population_error": estimate["error"],
                }
            )
    return rows


_told = [0.0]


def _say(fraction: float, text: str) -> None:
    """Write a line to the log, every 15 seconds at most."""
    if time.monotonic() - _told[0] > 15.0:
        _told[0] = time.monotonic()
        sys.stderr.write(f"{fraction:4.0%} {text}\n")
        sys.stderr.flush()


def main() -> int:
    """Entry point of the process: 0 if there is an answer, done or failed."""
    job = json.loads(sys.stdin.readline())

    def end_with_parent() -> None:
        sys.stdin.read()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    perform(job)
    return 0


if __name__ == "__main__":
    sys.exit(main())
