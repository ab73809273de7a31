"""The shipped systems travel with a wheel, not only with a checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from stand_ins import ROOT

SCRIPT = """
import openmm_eqflow.targets.library as library
assert str(library.systems_directory()).endswith("openmm_eqflow/systems")
print(len(library.list_systems()), library.load_system("toluene").n_particles, library.__file__)
"""


def test_installed_wheel_finds_every_system(tmp_path):
    # A copy, so that no build folder appears in the checkout.
    source = tmp_path / "source"
    source.mkdir()
    for name in ("openmm_eqflow", "systems"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, source)
    build = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=source, check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    assert (installed / "openmm_eqflow" / "py.typed").is_file()
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        check=True,
        capture_output=True,
        text=True,
    )
    n_systems, n_atoms, path = result.stdout.split()
    assert int(n_systems) == len(list((ROOT / "systems").glob("*/system.yaml")))
    assert int(n_atoms) == 15
    assert Path(path).is_relative_to(installed)
