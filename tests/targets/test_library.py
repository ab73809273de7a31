from __future__ import annotations

import configparser
from pathlib import Path

import mdtraj
import numpy as np
import openmm
import pytest
from openmm import unit
from stand_ins import ROOT

from openmm_eqflow.errors import ConfigurationError, UnknownSystemError
from openmm_eqflow.targets.library import SYSTEM_FILE, list_systems, load_system, systems_directory
from openmm_eqflow.targets.model_systems import build_model, harmonic_log_z, harmonic_stiffness
from openmm_eqflow.units import positions_in_nm, positions_quantity, reduced_energy

SHIPPED = {
    "ala3": (42, 3, "molecule", 300.0),
    "ala3-obc1": (42, 3, "molecule", 310.0),
    "alanine-dipeptide": (22, 3, "molecule", 300.0),
    "alanine-dipeptide-vacuum": (22, 3, "molecule", 300.0),
    "dw4": (4, 2, "cluster", 300.0),
    "harmonic": (6, 3, "harmonic", 300.0),
    "lj13": (13, 3, "cluster", 300.0),
    "lj55": (55, 3, "cluster", 300.0),
    "toluene": (15, 3, "molecule", 300.0),
}


def reduced(system: openmm.System, temperature: unit.Quantity, x: np.ndarray) -> float:
    context = openmm.Context(
        system, openmm.VerletIntegrator(1e-3), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(positions_quantity(x))
    return reduced_energy(context.getState(energy=True).getPotentialEnergy(), temperature)


def test_every_shipped_system_is_listed():
    assert {info.name for info in list_systems()} == set(SHIPPED)
    assert all(info.description for info in list_systems())


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_system_loads(name, tmp_path):
    n_particles, n_dims, kind, temperature = SHIPPED[name]
    system = load_system(name)
    assert (system.name, system.n_particles, system.n_dims) == (name, n_particles, n_dims)
    assert system.kind == kind
    assert system.temperature.value_in_unit(unit.kelvin) == temperature
    assert system.topology.getNumAtoms() == n_particles
    assert system.system.getNumConstraints() == 0
    assert positions_in_nm(system.positions).shape == (n_particles, 3)
    u = reduced(system.system, system.temperature, positions_in_nm(system.positions))
    assert abs(u) < 1000.0
    # The coordinates file is what a viewer opens as topology.
    trajectory = mdtraj.load(str(next(system.directory.glob("*.pdb"))))
    assert trajectory.n_atoms == n_particles


def test_lennard_jones_is_the_ordered_pair_sum_in_a_trap():
    system = load_system("lj13")
    x = positions_in_nm(system.positions) * 1.1
    d = np.linalg.norm(x[:, None] - x[None], axis=-1)[~np.eye(13, dtype=bool)]
    expected = np.sum(d**-12 - 2.0 * d**-6) + 0.5 * np.square(x - x.mean(axis=0)).sum()
    assert reduced(system.system, system.temperature, x) == pytest.approx(expected, rel=1e-12)
    # The global minimum of LJ13 in units of the well depth (Wales, Doye 1997) is -44.326801: twice
    # that, plus the trap, at our minimum within the trap's small compression.
    minimum = reduced(system.system, system.temperature, positions_in_nm(system.positions))
    assert -2 * 44.3268 < minimum < -83.0


def test_double_well_sees_the_plane_only_and_z_is_separate():
    system = load_system("dw4")
    rng = np.random.default_rng(0)
    x = rng.normal(scale=3.0, size=(4, 2))
    i, j = np.triu_indices(4, k=1)
    d = np.linalg.norm(x[i] - x[j], axis=1) - 4.0
    expected = np.sum(0.9 * d**4 - 4.0 * d**2)
    flat = reduced(system.system, system.temperature, x)
    assert flat == pytest.approx(expected, rel=1e-12)
    z = rng.normal(size=(4, 1))
    lifted = reduced(system.system, system.temperature, np.hstack([x, z]))
    assert lifted - flat == pytest.approx(2.0 * np.square(z - z.mean()).sum(), rel=1e-10)


def test_harmonic_energy_and_log_z_by_direct_gaussian_integral():
    system = load_system("harmonic")
    x = np.random.default_rng(1).normal(scale=0.3, size=(6, 3))
    k = harmonic_stiffness(6)
    expected = 0.25 * np.sum(k * np.square(x[:, None] - x[None]).sum(axis=-1))
    assert reduced(system.system, system.temperature, x) == pytest.approx(expected, rel=1e-12)
    # Independent of the eigenvalues: Kirchhoff's theorem, det' L = N det(minor of L).
    laplacian = np.diag(k.sum(axis=1)) - k
    log_det = np.log(6.0) + np.linalg.slogdet(laplacian[1:, 1:])[1]
    assert harmonic_log_z(6) == pytest.approx(1.5 * (5 * np.log(2 * np.pi) - log_det), rel=1e-12)


def test_harmonic_springs_are_all_different():
    k = harmonic_stiffness(6)[np.triu_indices(6, k=1)]
    assert len(set(k)) == 15
    assert (k > 0).all()


def test_unknown_model_and_too_few_particles():
    with pytest.raises(ValueError, match="unknown"):
        build_model("morse", 4, 1.0)
    with pytest.raises(ValueError, match="at least 3"):
        build_model("harmonic", 2, 1.0)


def test_unknown_system_lists_near_matches():
    with pytest.raises(UnknownSystemError, match="did you mean alanine-dipeptide"):
        load_system("alanine_dipeptide")
    with pytest.raises(UnknownSystemError, match="shipped systems: ala3"):
        load_system("zzz")
    with pytest.raises(UnknownSystemError, match=r"no system\.yaml"):
        load_system(systems_directory())


def write(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / SYSTEM_FILE).write_text(text, encoding="utf-8")
    return folder


GOOD = """\
name: mine
kind: cluster
coordinates: mine.pdb
temperature_kelvin: 300
model: {name: lennard-jones, n_particles: 13}
"""


def test_own_folder_by_path(tmp_path):
    folder = write(tmp_path / "mine", GOOD)
    (folder / "mine.pdb").write_bytes((systems_directory() / "lj13" / "lj13.pdb").read_bytes())
    assert load_system(folder).n_particles == 13
    assert load_system(str(folder / SYSTEM_FILE)).name == "mine"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kind: cluster\n", "", "key 'kind' is missing"),
        ("kind: cluster", "knid: cluster", "unknown key 'knid'; did you mean 'kind'"),
        ("kind: cluster", "kind: protein", "key 'kind' is 'protein'"),
        ("300", "warm", "key 'temperature_kelvin' is 'warm'"),
        ("300", "-3", "key 'temperature_kelvin' is -3"),
        ("300", ".nan", "key 'temperature_kelvin' is nan"),
        ("mine.pdb", "other.pdb", "key 'coordinates' names 'other.pdb'"),
        ("n_particles: 13", "n_particles: 12", "13 atoms but the System has 12"),
        ("n_particles: 13", "n_particles: x", "key 'model'"),
        ("n_particles: 13", "n_particles: 0", "key 'model'"),
        ("model: ", "system_xml: a.xml\nmodel: ", "exactly one of the keys"),
        ("model: {name: lennard-jones, n_particles: 13}", "", "exactly one of the keys"),
        ("name: mine", "name: [", "not valid YAML"),
        ("name: mine", "name: mine\nname: yours", "key 'name' stands twice"),
        ("name: mine", "settings: {train: 3}\nname: mine", r"key 'settings\.train'"),
    ],
)
def test_bad_yaml_names_the_key_and_the_file(tmp_path, old, new, message):
    folder = write(tmp_path / "mine", GOOD.replace(old, new))
    (folder / "mine.pdb").write_bytes((systems_directory() / "lj13" / "lj13.pdb").read_bytes())
    with pytest.raises(ConfigurationError, match=message) as info:
        load_system(folder)
    assert "\n" not in str(info.value)
    assert str(folder) in str(info.value)


def test_yaml_cannot_run_code(tmp_path):
    folder = write(tmp_path / "mine", "name: !!python/object/apply:os.getcwd []\n" + GOOD)
    with pytest.raises(ConfigurationError, match="not valid YAML"):
        load_system(folder)


def test_setup_cfg_lists_every_package():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "openmm_eqflow").rglob("__init__.py")
    }
    assert listed == found | {"openmm_eqflow.systems"}
