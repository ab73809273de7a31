"""Every flow that ships: whole, small, made for its system, and as good as its card says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from openmm_eqflow.analysis.weights import log_z, relative_ess
from openmm_eqflow.flows.audit import audit
from openmm_eqflow.flows.flow import EquivariantFlow
from openmm_eqflow.flows.storage import load_flow
from openmm_eqflow.runs.evaluation import draw_weighted, prior_log_weights
from openmm_eqflow.runs.stages import build_target
from openmm_eqflow.targets.library import load_system, systems_directory
from openmm_eqflow.targets.target import system_sha256

FOLDERS = sorted(path.parent for path in systems_directory().glob("*/flow.safetensors"))
LARGEST = 5_000_000

# One molecule is quick: the default command measures it, the slow one the others.
MEASURED = [
    pytest.param(
        folder,
        id=folder.name,
        marks=() if folder.name == "toluene" else (pytest.mark.slow, pytest.mark.timeout(900)),
    )
    for folder in FOLDERS
]


def figure(card: str, label: str) -> list[float]:
    """Numbers of a row of a card."""
    (row,) = (line for line in card.splitlines() if line.startswith(f"| {label}"))
    text = row.removeprefix(f"| {label}").replace(",", "")
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?(?:e-\d+)?", text)]


def n_samples(flow: EquivariantFlow, *, cluster: int, molecule: int, large: int) -> int:
    """As many as half a minute or so is enough for."""
    if len(flow.prior.event_shape) == 2:
        return cluster
    return molecule if flow.n_particles < 30 else large


def test_some_flows_ship() -> None:
    assert {"alanine-dipeptide", "dw4", "lj13", "lj55"} <= {folder.name for folder in FOLDERS}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_flow_belongs_to_its_system_and_is_small(folder: Path) -> None:
    flow = load_flow(folder / "flow")
    assert flow.metadata["system_hash"] == system_sha256(load_system(folder.name).system)
    assert flow.audit_report is not None
    assert flow.audit_report["passed"]
    assert sum(path.stat().st_size for path in folder.glob("flow.*")) < LARGEST
    assert f"# Flow of {folder.name}" in (folder / "card.md").read_text(encoding="utf-8")


@pytest.mark.statistical
@pytest.mark.parametrize("folder", MEASURED)
def test_flow_is_as_good_as_its_card(folder: Path) -> None:
    flow = load_flow(folder / "flow")
    n = n_samples(flow, cluster=480, molecule=4000, large=2000)
    card = (folder / "card.md").read_text(encoding="utf-8")
    stated, stated_error = figure(card, "relative ESS (raw)")[:2]
    stated_log_z, log_z_error = figure(card, "log Z (mean-free, nm)")
    with build_target(load_system(folder.name)) as target:
        samples = draw_weighted(flow, target, n, seed=5)
        log_w, log_q = samples.log_weight.numpy(), samples.log_q.numpy()
        stream = torch.Generator().manual_seed(6)
        prior = prior_log_weights(flow, target, 4000, generator=stream).numpy()
    parts = [relative_ess(part) for part in np.array_split(log_w, 4)]
    spread = float(np.std(np.log(parts), ddof=1))

    # A few heavy weights make or break the ESS of a small sample: a wide gate, but one that a
    # flow with other weights, grid or prior than the card's does not pass. The card has an error
    # of its own, of the same kind.
    gate = max(3 * float(np.hypot(spread, stated_error / stated)), 0.1)

    def is_that_of_the_card(ess: float) -> bool:
        return abs(np.log(ess / stated)) < gate

    assert is_that_of_the_card(relative_ess(log_w))
    assert relative_ess(log_w) > relative_ess(prior)
    ours = log_z(log_w)
    assert abs(ours.value - stated_log_z) < 4 * np.hypot(ours.error, log_z_error)
    for lie in (log_w + log_q, log_w + 2 * log_q):  # power: log q dropped, its sign turned
        wrong = log_z(lie)
        assert abs(wrong.value - stated_log_z) > 4 * np.hypot(wrong.error, log_z_error)
        assert not is_that_of_the_card(relative_ess(lie))


@pytest.mark.parametrize("folder", MEASURED)
def test_log_q_on_the_shipped_grid(folder: Path) -> None:
    flow = load_flow(folder / "flow")
    n = n_samples(flow, cluster=16, molecule=512, large=128)
    report = audit(flow, n=n, generator=torch.Generator().manual_seed(7))
    assert report["passed"]
    assert report["sampling_against_log_prob"]["p99"] < 1e-3
    assert report["round_trip_nm"]["p99"] < 1e-6
