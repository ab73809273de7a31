"""Many molecules: each through the main job in a process of its own, scheduled by Dask.

A table names the molecules. Every row is a job (:mod:`openmm_eqflow.runs.campaign_job`) that fails
alone; ``results.csv`` and ``results.parquet`` hold a row for each from the start and are renewed
whenever one ends. The same call again does what is left, however it was stopped. Dask comes with
``pip install "openmm-eqflow[campaign]"``; the cluster is a local one or that of a scheduler that
runs already, whose workers see the same files and have this package. A Dask scheduler runs what
it is sent: take one that only you can reach.
"""

from __future__ import annotations

import csv
import difflib
import importlib
import io
import json
import logging
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import openmm_eqflow
from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.files import atomic_path, write_json
from openmm_eqflow.parallel import available_threads
from openmm_eqflow.runs.campaign_job import FIGURES, stored
from openmm_eqflow.targets.library import check_temperature
from openmm_eqflow.training.recipes import BUDGETS

__all__ = [
    "COLUMNS",
    "METHODS",
    "attempt",
    "read_molecules",
    "run_campaign",
]

#: Of the table of molecules: ``name``, one source, and what is left out has a default.
_SOURCES = ("smiles", "sdf", "pdb", "folder")
COLUMNS = (
    *("name", *_SOURCES, "topology", "system", "forcefield", "charges"),
    *("temperature", "budget", "seed"),
)
#: Budgets of ``run``, and ``anneal``: samples without reference data.
METHODS = (*BUDGETS, "anneal")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PATIENCE = 10.0  # s, until a scheduler has to answer
_INSTALL = 'pip install "openmm-eqflow[campaign]"'
Rows = list[dict[str, Any]]


def _extra(name: str) -> Any:
    """Import a module of the extra.

    Raises
    ------
    ConfigurationError
        It is not installed; the message says how to.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigurationError(
            f"campaigns need Dask and pyarrow ({error.name} is not installed): {_INSTALL}"
        ) from error


def read_molecules(table: Path, budget: str = "standard") -> list[dict[str, str]]:
    r"""Rows of a table of molecules: what is not empty, checked, with a budget each.

    Parameters
    ----------
    table
        CSV with a head. ``name`` (letters, digits, ``.``, ``_``, ``-``) and one of ``smiles``,
        ``sdf``, ``pdb`` (any structure that ``init`` reads) or ``folder`` (a folder with a
        system.yaml, or a system that ships); with ``pdb`` one of ``forcefield`` (several with
        spaces between), ``system`` or ``topology``. Then ``charges``, ``temperature`` (K),
        ``budget`` and ``seed``. Files are looked for beside the table.
    budget
        Of rows without one; ``anneal`` means samples without reference data.

    Raises
    ------
    ConfigurationError
        The table cannot be read, a column is unknown, a row lacks something, or two names are
        alike; the message names the line.

    Examples
    --------
    >>> import tempfile
    >>> table = Path(tempfile.mkdtemp()) / "molecules.csv"
    >>> _ = table.write_text("name,smiles,temperature\nbutane,CCCC,350\n")
    >>> read_molecules(table, "anneal")
    [{'name': 'butane', 'smiles': 'CCCC', 'temperature': '350', 'budget': 'anneal'}]
    """
    try:
        text = table.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{table} is not UTF-8 text: save it as CSV in UTF-8") from error
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    head = list(reader.fieldnames or ())
    for column in head:
        if head.count(column) > 1:
            raise ConfigurationError(f"{table}: column {column!r} stands twice; leave one")
        if column not in COLUMNS:
            near = difflib.get_close_matches(column, COLUMNS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected some of {', '.join(COLUMNS)}"
            mark = next((m for m in ";\t|" if m in column), None)
            hint = hint if mark is None else f"cells are separated by commas, not by {mark!r}"
            raise ConfigurationError(f"{table}: unknown column {column!r}; {hint}")
    rows: list[dict[str, str]] = []
    lines: dict[str, int] = {}
    for found in reader:
        where = f"{table}, line {reader.line_num}"
        cells = [*found.values()]
        n_cells = len(head) - cells.count(None) + len(found.get(None, ()))
        if n_cells != len(head):
            raise ConfigurationError(f"{where}: expected {len(head)} cells, got {n_cells}")
        row = {key: value.strip() for key, value in found.items() if value.strip()}
        if not row:
            continue
        rows.append(_checked({**row, "budget": row.get("budget", budget)}, where))
        # Names of files, which not every system tells apart by their case.
        first = lines.setdefault(row["name"].lower(), reader.line_num)
        if first != reader.line_num:
            raise ConfigurationError(
                f"{where}: {row['name']} is named twice (line {first}); names must differ, and "
                "not in capitals alone"
            )
    if not rows:
        raise ConfigurationError(f"{table} names no molecule: expected a head and a row for each")
    return rows


def _checked(row: dict[str, str], where: str) -> dict[str, str]:
    if not _NAME.fullmatch(row.get("name", "")):
        raise ConfigurationError(
            f"{where}: name is {row.get('name', '')!r}, expected letters, digits, '.', '_' and "
            "'-', 64 at most"
        )
    sources = [key for key in _SOURCES if key in row]
    if len(sources) != 1:
        raise ConfigurationError(
            f"{where}: expected one of {', '.join(_SOURCES)}, got {', '.join(sources) or 'none'}"
        )
    fit = {"pdb": {"topology", "system", "forcefield"}, "smiles": {"charges"}, "sdf": {"charges"}}
    given = set(row) - {"name", "budget", "seed", *sources}
    allowed = fit.get(sources[0], set()) | ({"temperature"} if "folder" not in row else set())
    if extra := sorted(given - allowed):
        raise ConfigurationError(
            f"{where}: {', '.join(extra)} does not go with {sources[0]}: leave it empty"
        )
    if row["budget"] not in METHODS:
        raise ConfigurationError(
            f"{where}: budget is {row['budget']!r}, expected one of {', '.join(METHODS)}"
        )
    try:
        check_temperature(float(row.get("temperature", "300")), f"{where}: temperature")
        seed = int(row.get("seed", "0"))
    except ValueError as error:
        raise ConfigurationError(f"{where}: temperature or seed is no number ({error})") from error
    if not 0 <= seed < 2**32:
        raise ConfigurationError(f"{where}: seed is {seed}, expected 0 to 2^32 - 1")
    return row


def attempt(job: Mapping[str, Any]) -> dict[str, Any]:
    """Do one job in a process of its own, which ends with the one that calls this.

    Parameters
    ----------
    job
        As of :func:`~openmm_eqflow.runs.campaign_job.perform`; with ``parts``, how many jobs share
        the cores of this machine, it gets its part of them.

    Returns
    -------
    dict
        Its answer. A process that died without one has ``failed``: with an exit code of its own
        for good, by a signal (memory, a machine that went down) only for now.
    """
    out, name = Path(job["out"]), job["row"]["name"]
    source = str(Path(openmm_eqflow.__file__).resolve().parent.parent)
    known = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **job["environment"], "PYTHONPATH": os.pathsep.join(known)}
    log = out / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as told:
        process = subprocess.Popen(
            [sys.executable, "-m", "openmm_eqflow.runs.campaign_job"],
            stdin=subprocess.PIPE,
            stdout=told,
            stderr=told,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the campaign, which ends this one
        )
        try:
            # Whatever it dies of, it may do so before it has read its job.
            with suppress(BrokenPipeError, ProcessLookupError):
                _keep_to_part(process.pid, job.get("parts", 1))
                if process.stdin is not None:
                    process.stdin.write(json.dumps(job) + "\n")
                    process.stdin.flush()
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            if process.stdin is not None:
                with suppress(BrokenPipeError):
                    process.stdin.close()
    result: dict[str, Any] | None = stored(out, name).get("result")
    if result is not None:
        return result
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no message")
    if code < 0:
        return {
            "status": "failed",
            "message": f"ended by signal {-code} (memory?); the same command tries it again",
        }
    result = {"status": "failed", "message": f"ended with code {code} ({last}); see {log}"}
    write_json(out / "jobs" / f"{name}.json", {"asked": job["row"], "result": result})
    return result


def _keep_to_part(process: int, parts: int) -> None:
    """Give a process every ``parts``-th core, counted by the Dask worker it runs in."""
    if parts < 2 or not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    mine = cores[int(_extra("distributed").get_worker().name) % parts :: parts]
    if mine:
        os.sched_setaffinity(process, mine)


@contextmanager
def _cluster(scheduler: str | None, n_workers: int) -> Iterator[Any]:
    """Client of a running scheduler, or of workers in this process (jobs have their own)."""
    distributed = _extra("distributed")
    if scheduler is None:
        with (
            distributed.LocalCluster(
                n_workers=n_workers,
                threads_per_worker=1,
                processes=False,
                # Of Dask's own pages, which have no password: nobody else on the network.
                dashboard_address="127.0.0.1:0",
                worker_dashboard_address="127.0.0.1:0",
                memory_limit=None,
                silence_logs=logging.ERROR,
            ) as cluster,
            distributed.Client(cluster) as client,
        ):
            yield client
        return
    try:
        client = distributed.Client(scheduler, timeout=_PATIENCE)
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"no Dask scheduler answers at {scheduler}: start one with 'dask scheduler' and "
            "workers with 'dask worker ADDRESS --nthreads 1'"
        ) from error
    with client:
        yield client


def run_campaign(
    table: str | Path,
    out: str | Path,
    *,
    budget: str = "standard",
    n_samples: int = 10_000,
    n_workers: int | None = None,
    scheduler: str | None = None,
    retry: bool = False,
    ended: Callable[[Rows], None] | None = None,
) -> Rows:
    """Do every molecule of a table that has no answer yet.

    Parameters
    ----------
    table, budget
        As of :func:`read_molecules`.
    out
        Folder of the campaign: ``results.csv``, ``results.parquet``, ``populations.csv`` and
        ``populations.parquet``; ``systems/NAME``, ``runs/NAME``, ``logs/NAME.log`` and
        ``jobs/NAME.json`` of every molecule.
    n_samples
        Independent samples of rows whose budget is ``anneal``.
    n_workers
        Molecules at once in a local cluster; by default one for every two cores.
    scheduler
        Address of a Dask scheduler that runs; its workers decide how many molecules at once.
    retry
        Also do again what failed.
    ended
        Called with all rows before the first and whenever one ends.

    Returns
    -------
    list of dict
        Rows of ``results.csv`` in the order of the table, and ``populations`` of each. ``status``
        is ``done`` or ``failed`` (``waiting`` before the end).

    Raises
    ------
    ConfigurationError
        Of :func:`read_molecules`; Dask is not installed, the scheduler does not answer, or a
        molecule of that name was made from another row.

    Examples
    --------
    >>> rows = run_campaign("molecules.csv", "many", budget="anneal")  # doctest: +SKIP
    >>> [row["name"] for row in rows if row["status"] == "failed"]  # doctest: +SKIP
    """
    table, out = Path(table), Path(out).resolve()
    molecules = read_molecules(table, budget)
    known = {row["name"]: stored(out, row["name"]) for row in molecules}
    for row in molecules:
        if (asked := known[row["name"]].get("asked", row)) != row:
            key = next(k for k in COLUMNS if asked.get(k) != row.get(k))
            raise ConfigurationError(
                f"{out} holds {row['name']} made with {key} {asked.get(key, '')!r}, now "
                f"{row.get(key, '')!r}: choose another --out or another name"
            )
        drawn = (known[row["name"]].get("result") or {}).get("n_samples")
        if row["budget"] == "anneal" and drawn not in (None, n_samples):
            raise ConfigurationError(
                f"{out} holds {row['name']} with {drawn} samples, now {n_samples}: choose another "
                "--out"
            )
    for name, content in known.items():
        if retry and (content.get("result") or {}).get("status") == "failed":
            (out / "jobs" / f"{name}.json").unlink()
            known[name] = {}
    results = {name: content.get("result") for name, content in known.items()}
    parts = n_workers or max(1, available_threads() // 2)
    todo = [row for row in molecules if results[row["name"]] is None]
    _extra("pyarrow")
    (out / "jobs").mkdir(parents=True, exist_ok=True)

    def tell() -> Rows:
        rows = [_line(row, results[row["name"]]) for row in molecules]
        _write_tables(out, rows)
        if ended is not None:
            ended(rows)
        return rows

    tell()
    if todo:
        allow = os.environ.get("OPENMM_EQFLOW_ALLOW_CODE")
        with _cluster(scheduler, parts) as client:
            futures = {}
            for row in todo:
                job = {
                    "row": row,
                    "out": str(out),
                    "base": str(table.resolve().parent),
                    "n_samples": n_samples,
                    "environment": {"OPENMM_EQFLOW_ALLOW_CODE": allow} if allow else {},
                    "parts": parts if scheduler is None else 1,
                }
                key = f"{row['name']}-{uuid.uuid4().hex}"  # others use the scheduler as well
                futures[client.submit(attempt, job, key=key)] = row["name"]
            for future in _extra("distributed").as_completed(futures):
                error = future.exception()
                results[futures[future]] = (
                    future.result()
                    if error is None
                    else {"status": "failed", "message": " ".join(f"Dask: {error}".split())}
                )
                tell()
    return tell()


def _line(row: Mapping[str, str], result: Mapping[str, Any] | None) -> dict[str, Any]:
    """Row of the results, with ``populations``."""
    found = result or {"status": "waiting", "message": ""}
    asked = None if "folder" in row else float(row.get("temperature", "300"))
    line: dict[str, Any] = {
        "name": row["name"],
        "status": found["status"],
        "budget": row["budget"],
        "temperature": found.get("temperature", asked),
        "seed": int(row.get("seed", "0")),
        "n_atoms": found.get("n_atoms"),
        "seconds": found.get("seconds"),
        **{key: found.get(key) for key in FIGURES},
        "verdict": found.get("verdict", ""),
        "message": found["message"] or "; ".join(found.get("warnings", [])),
    }
    return {**line, "populations": found.get("populations", [])}


def _write_tables(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    arrow = _extra("pyarrow")
    words, whole = ("name", "status", "budget", "verdict", "message"), ("n_atoms", "n_samples")
    kinds = {**dict.fromkeys(words, arrow.string()), **dict.fromkeys(whole, arrow.int64())}
    columns = [key for key in _line({"name": "", "budget": ""}, None) if key != "populations"]
    results = arrow.schema([(key, kinds.get(key, arrow.float64())) for key in columns])
    states = arrow.schema(
        [(key, arrow.string()) for key in ("name", "torsion", "state")]
        + [(key, arrow.float64()) for key in ("population", "population_error")]
    )
    populations = [{"name": row["name"], **p} for row in rows for p in row["populations"]]
    for stem, content, schema in (
        ("results", list(rows), results),
        ("populations", populations, states),
    ):
        made = arrow.Table.from_pylist(content, schema=schema)
        with atomic_path(out / f"{stem}.parquet") as temporary:
            _extra("pyarrow.parquet").write_table(made, temporary)
        with atomic_path(out / f"{stem}.csv") as temporary:
            _extra("pyarrow.csv").write_csv(made, temporary)
