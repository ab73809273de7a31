"""Trajectories as files: units, planar frames, names that are not ASCII."""

from __future__ import annotations

from pathlib import Path

import mdtraj
import numpy as np
import pytest

from openmm_eqflow.files import read_dcd, write_dcd


@pytest.mark.parametrize("n_dims", [2, 3])
def test_frames_come_back_in_nm(tmp_path: Path, n_dims: int) -> None:
    x = np.random.default_rng(0).normal(size=(5, 4, n_dims))
    write_dcd(tmp_path / "a.dcd", x)
    found = read_dcd(tmp_path / "a.dcd")
    np.testing.assert_allclose(found[..., :n_dims], x, atol=1e-6)
    assert not found[..., n_dims:].any()
    with mdtraj.formats.DCDTrajectoryFile(str(tmp_path / "a.dcd")) as dcd:
        np.testing.assert_allclose(dcd.read()[0], 10.0 * found, atol=1e-5)


def test_folders_and_files_may_have_any_name(tmp_path: Path) -> None:
    x = np.ones((2, 3, 3))
    write_dcd(tmp_path / "Köln" / "früh.dcd", x)
    write_dcd(tmp_path / "Köln" / "früh.dcd", 2.0 * x)  # and again
    np.testing.assert_allclose(read_dcd(tmp_path / "Köln" / "früh.dcd"), 2.0 * x)
    assert [p.name for p in (tmp_path / "Köln").iterdir()] == ["früh.dcd"]
