"""Every option explains itself; --version works where nothing is installed."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

import click
import pytest

from openmm_eqflow.cli import _version, cli, measure


def commands(group: click.Group, name: str = "") -> Iterator[tuple[str, click.Command]]:
    for key, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{name}{key} ")
        else:
            yield name + key, command


measure.register(cli)


@pytest.mark.parametrize("name", [name for name, _ in commands(cli)])
def test_every_command_and_option_has_help(name):
    command = dict(commands(cli))[name]
    assert command.help
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, f"{name} {option.opts[0]} has no help"


@pytest.mark.parametrize("name", [name for name, _ in commands(cli)])
def test_every_command_writes_json_if_asked(name):
    command = dict(commands(cli))[name]
    assert any("--json" in option.opts for option in command.params)
def test_options_of_init_are_grouped(shell):
    text = shell("init", "--help").out
    sections: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.endswith(":") and not line.startswith((" ", "Usage")):
            sections[line[:-1]] = options = []
        elif line.startswith("  -"):
            options.append(line.split()[0].rstrip(","))
    expected = {
        "Structure": {"--pdb", "--cif", "--gro", "--chain"},
        "Parameters": {"--forcefield", "--system", "--params"},
        "Small molecules": {"--smiles", "--sdf", "--charges"},
        "Preparation": {"--add-hydrogens", "--strip-solvent", "--constraints", "--hydrogen-mass"},
        "Output": {"--temperature", "--json"},
        "Other": {"-h"},
    }
    assert list(sections) == list(expected)
    for heading, some in expected.items():
        assert some <= set(sections[heading])
    listed = [option for options in sections.values() for option in options]
    given = {p.opts[0] for p in cli.commands["init"].params if isinstance(p, click.Option)}
    assert set(listed) == given | {"-h"}
    assert len(listed) == len(set(listed))


def test_minutes_of_a_budget_name_their_molecule():
    (budget,) = (p for p in cli.commands["run"].params if p.name == "budget")
    assert "alanine dipeptide on 2 cores" in budget.help


def test_version_of_a_source_tree_is_one_line(monkeypatch, shell):
    outcome = shell("--version")
    assert outcome.code == 0
    assert outcome.out.splitlines() == [f"openmm-eqflow, version {_version()}"]

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert _version() == "unknown (not installed)"
