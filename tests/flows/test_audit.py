"""The audit fails what would spoil an acceptance ratio, and passes what would not."""

from __future__ import annotations

import json

import pytest
import torch
from stand_ins.flows import EstimatedField, molecule_flow, planar_flow, stream, uniform_grid

from openmm_eqflow.errors import AuditError
from openmm_eqflow.flows.audit import audit, require_passed_audit
from openmm_eqflow.flows.flow import EquivariantFlow


@pytest.mark.parametrize("make", [molecule_flow, planar_flow])
def test_good_flow_passes_and_report_is_stored(make):
    flow = make()
    flow.calibrate(32, generator=stream(0))
    frames = flow.sample(30, generator=stream(1)) + 1.0
    report = audit(flow, n=32, x=frames, generator=stream(2))
    assert report["passed"]
    assert flow.audit_report is report
    assert report["n"] == 62  # latents and frames
    assert report["log_q_error_p99"] < 0.01
    assert report["round_trip"]["p99"] < 1e-3  # torsions compared on the circle
    assert report["round_trip_nm"]["p99"] < 1e-4
    assert report["against_jacobian"]["p99"] < 0.01
    json.dumps(report, allow_nan=False)
    require_passed_audit(flow)
    assert flow.dtype == torch.float32


@pytest.mark.parametrize("make", [molecule_flow, planar_flow])
def test_coarse_grid_fails_in_every_measure(make):
    flow = make(size=0.2)
    flow.grid = uniform_grid(1)
    grid = flow.grid
    report = audit(flow, n=64, generator=stream(3))
    assert not report["passed"]
    for key in ("grid_and_precision", "sampling_against_log_prob", "against_jacobian"):
        assert report[key]["p99"] > 0.01, key
    assert flow.grid == grid
    with pytest.raises(AuditError, match=r"log q is off by .* kT .*0\.01 kT.*calibrate"):
        require_passed_audit(flow)


def test_wrong_divergence_fails_against_the_jacobian(monkeypatch):
    flow = planar_flow()
    flow.grid = uniform_grid(16)
    field = flow.module
    right = field.with_divergence
    monkeypatch.setattr(
        field, "with_divergence", lambda t, y: (right(t, y)[0], 1.1 * right(t, y)[1])
    )
    report = audit(flow, n=32, generator=stream(5))
    # Consistent forwards and backwards: only the determinant can tell.
    assert report["sampling_against_log_prob"]["p99"] < 0.01
    assert report["against_jacobian"]["p99"] > 0.01
    assert not report["passed"]


def test_log_q_that_is_no_number_is_not_left_out(monkeypatch):
    flow = molecule_flow()
    flow.calibrate(32, generator=stream(6))
    x = flow.sample(20, generator=stream(7))
    x[:3] = torch.nan
    report = audit(flow, n=64, x=x, generator=stream(8))
    assert not report["passed"]
    with pytest.raises(AuditError, match="log q is"):
        require_passed_audit(flow)


def test_estimated_divergence_is_refused():
    exact = planar_flow(n_steps=2)
    flow = EquivariantFlow(exact.prior, EstimatedField(exact.module), grid=exact.grid)
    with pytest.raises(AuditError, match="EstimatedField estimates"):
        audit(flow, n=8)
    flow.audit_report = {"passed": True}  # a forged report does not help
    with pytest.raises(AuditError, match="EstimatedField estimates"):
        require_passed_audit(flow)


def test_missing_audit_says_what_to_do():
    with pytest.raises(AuditError, match=r"never audited; call openmm_eqflow\.flows\.audit"):
        require_passed_audit(molecule_flow())


def test_a_flow_without_one_valid_sample_is_refused():
    flow = molecule_flow(n_steps=2)
    with torch.no_grad():
        flow.module.w1.fill_(float("nan"))
    with pytest.raises(AuditError, match="none of 8 samples"):
        audit(flow, n=8, generator=stream(0))
