"""The main job in one call: what ``openmm-eqflow run`` does, for scripts and notebooks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from openmm_eqflow.distributed import main_first
from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.library import load_system
from openmm_eqflow.rundir import STAGES, RunDirectory
from openmm_eqflow.workflow import build_target, run_stage

__all__ = ["open_run", "run"]


def open_run(
    system: str | Path,
    out: str | Path | None = None,
    *,
    budget: str | None = None,
    seed: int | None = None,
    device: str | None = None,
) -> RunDirectory:
    """Open a run directory, or make one for a system; no stage is run. Arguments as of ``run``.

    Raises
    ------
    ConfigurationError
        The folder belongs to another system, budget or seed.
    UnknownSystemError
        No such system.
    """
    if out is None and (Path(system) / "config.yaml").is_file():
        opened = RunDirectory.open(Path(system))
        for key, value in (("budget", budget), ("seed", seed)):
            if value is not None and value != getattr(opened.config, key):
                raise ConfigurationError(
                    f"{system} was made with {key} {getattr(opened.config, key)}, now {value}; "
                    "choose a new --out"
                )
        opened.use_device(device)
        return opened
    loaded = load_system(system)
    with main_first(), build_target(loaded) as target:
        path = Path("runs") / loaded.name if out is None else Path(out)
        return RunDirectory.create(
            path, loaded, target, budget=budget, seed=seed, device=device
        )


def run(
    system: str | Path,
    out: str | Path | None = None,
    *,
    budget: str | None = None,
    seed: int | None = None,
    device: str | None = None,
    progress: Callable[[float, str], None] | None = None,
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
    directory = open_run(system, out, budget=budget, seed=seed, device=device)
    for stage in STAGES:
        run_stage(directory, stage, progress=_named(stage, progress))
    return directory


def _named(
    stage: str, progress: Callable[[float, str], None] | None
) -> Callable[[float, str], None] | None:
    if progress is None:
        return None
    return lambda fraction, text: progress(fraction, f"{stage}: {text}")
