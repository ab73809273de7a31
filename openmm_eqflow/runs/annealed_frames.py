r"""Reference data without dynamics: independent points of an annealed path, with their weights.

The run directory receives::

    reference.npz       all points: positions (nm), u, log weights
    reference.dcd       frames drawn from them by weight, as many as they are worth
    reference/path.*    the path (``load_flow`` reads it)

:func:`~openmm_eqflow.runs.reference.data.load_reference` gives the frames of equal weight.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from openmm_eqflow.errors import ConfigurationError
from openmm_eqflow.files import write_dcd, write_npz
from openmm_eqflow.flows.adapt import path_from_chemistry
from openmm_eqflow.flows.relaxed import AnnealedPath
from openmm_eqflow.flows.storage import load_flow, save_flow
from openmm_eqflow.runs.evaluation import FlowSamples, draw_weighted
from openmm_eqflow.runs.reference.data import ReferenceData, load_reference
from openmm_eqflow.seeds import child_seed
from openmm_eqflow.targets.target import BoltzmannTarget

__all__ = [
    "path_and_samples",
    "run_annealed",
]

Progress = Callable[[float, str], None]


def path_and_samples(
    target: BoltzmannTarget,
    file: Path,
    n: int,
    *,
    ess: float,
    n_points: int,
    seed: int,
    draw_seed: int,
    device: str = "cpu",
    progress: Progress | None = None,
) -> tuple[AnnealedPath, FlowSamples]:
    """Path from chemistry and weighted samples of it, or what an earlier call has left of both.

    Parameters
    ----------
    target
        The molecule.
    file
        Flow that holds the path, or will; draws are kept in ``drawn`` beside it.
    n
        Samples.
    ess, n_points, seed
        Of :func:`~openmm_eqflow.flows.adapt.path_from_chemistry`.
    draw_seed
        Of the samples.
    device
        Where points are carried.
    progress
        Called with the share done and a line.

    Raises
    ------
    ConfigurationError
        ``file`` is a flow made with other settings or for another System.
    UnsupportedSystemError
        No prior can be made of the molecule.
    """
    tell = progress or (lambda share, text: None)
    path = _annealed_path(
        target,
        file,
        ess,
        n_points,
        seed,
        device,
        lambda share, text: tell(0.4 * share, text),
    )
    samples = draw_weighted(
        path,
        target,
        n,
        seed=draw_seed,
        folder=file.parent / "drawn",
        progress=lambda share, text: tell(0.4 + 0.6 * share, text),
    )
    return path, samples


def _annealed_path(
    target: BoltzmannTarget,
    file: Path,
    ess: float,
    n_points: int,
    seed: int,
    device: str,
    progress: Progress,
) -> AnnealedPath:
    """Path that ``file`` holds, or a new one, which it then holds."""
    asked = {
        "system_hash": target.system_hash,
        "temperature_K": target.kT,
        "ess": ess,
        "n_points": n_points,
        "seed": int(seed),
    }
    if file.with_name(f"{file.name}.json").is_file():
        path = load_flow(file, device=device)
        if not isinstance(path, AnnealedPath) or path.metadata.get("asked") != asked:
            raise ConfigurationError(
                f"{file.parent} holds a flow made with other settings or for another System: "
                "choose another --out, or remove it"
            )
        return path
    path = path_from_chemistry(
        target, ess=ess, seed=seed, n_points=n_points, device=device, progress=progress
    ).path
    file.parent.mkdir(parents=True, exist_ok=True)
    path.metadata |= {"asked": asked, "system_hash": target.system_hash}
    save_flow(path, file, path.metadata)
    return path


def run_annealed(
    target: BoltzmannTarget,
    directory: Path,
    *,
    kelvin: float,
    ess: float,
    n_points: int,
    n_frames: int,
    seed: int,
    device: str = "cpu",
    progress: Progress | None = None,
) -> tuple[AnnealedPath, ReferenceData]:
    """Make a path and frames, or continue where an earlier call stopped.

    Parameters
    ----------
    target, kelvin
        The molecule and its temperature.
    directory
        The run directory.
    ess, n_points
        Of :func:`~openmm_eqflow.flows.adapt.path_from_chemistry`.
    n_frames
        Weighted points to draw.
    seed
        Of all random streams, which are children of it by name.
    device
        Where points are carried.
    progress
        Called with the fraction done and a short text.
    """
    report = progress or (lambda fraction, text: None)
    started, folder = time.monotonic(), Path(directory) / "reference"
    path, samples = path_and_samples(
        target,
        folder / "path",
        n_frames,
        ess=ess,
        n_points=n_points,
        seed=seed,
        draw_seed=child_seed(seed, "annealed frames"),
        device=device,
        progress=report,
    )
    write_npz(
        Path(directory) / "reference.npz",
        {
            "positions": samples.x.numpy().astype(np.float32),
            "u": samples.u.numpy(),
            "log_weight": samples.log_weight.numpy(),
            "temperatures": np.array([kelvin]),
            "seed": np.array(int(seed)),
            "system_hash": np.array(target.system_hash),
            "seconds": np.array(time.monotonic() - started),
        },
    )
    data = load_reference(Path(directory))
    write_dcd(Path(directory) / "reference.dcd", data.positions)
    shutil.rmtree(folder / "drawn", ignore_errors=True)
    report(1.0, f"{data.n_frames} frames")
    return path, data
