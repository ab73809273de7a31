"""Every code block of README and docs does what it says.

The blocks of a page run in order, in one folder and one Python namespace. Comments of the pages,
which readers never see, say what a test needs: ``test: given NAME`` provides a finished run or a
molecule, ``test: replace "A" by "B"`` shrinks a number of the next block, ``test: listing NAME``
compares a list of files with a folder. README has no comments; its replacements are below.

What is shrunk: the recipes of molecules (seconds instead of minutes, tiny networks), the settings
of the reference stage, and the own molecule, which is N-methylacetamide in vacuum. A ``run`` of
alanine dipeptide or of that molecule finds the output of one that was made before, by the same
command, and adds what is missing.

Not run: commands that install (``.ci/run`` executes README's); scripts of ``examples``, which
``test_examples.py`` and ``test_paper_2020.py`` run, and what ``torchrun`` starts. The options of
the latter two are checked.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import click
import pytest
import yaml
from filelock import FileLock
from stand_ins import ROOT
from stand_ins.command_line import Shell
from stand_ins.peroxide import write_system

from openmm_eqflow.cli import cli, measure
from openmm_eqflow.runs.reference.plan import ReferenceSettings
from openmm_eqflow.targets.library import load_system
from openmm_eqflow.targets.own_system import init_system
from openmm_eqflow.training import recipes
from openmm_eqflow.training.recipes import BUDGETS, Recipe, make_recipe

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MOLECULE = ROOT / "examples" / "n-methylacetamide.pdb"
NOT_RUN = ("python3 -m venv", ".venv/bin/pip", ".venv/bin/python -m pytest", "pip ", "mkdocs ")
README_GIVEN = ("mol.pdb",)
README_REPLACE = {"sampler.run(20)": "sampler.run(2)", " implicit/obc2.xml": ""}

TINY = Recipe(
    reference_seconds=30,
    train_seconds=2.0,
    min_frames=100,
    max_frames=600,
    batch_size=64,
    field={"width": 16, "conditioner_width": 16, "torsion_width": 16},
    prior_rounds=1,
    prior_samples=1000,
    n_pool=2000,
    chunk=500,
    n_chunks=2,
    n_evaluate=600,
    n_samples=120,
    n_chains=6,
    n_local_steps=3,
)
REFERENCE = {
    "max_temperature_ratio": 1.2,
    "steps_per_swap": 20,
    "swaps_per_frame": 1,
    "equilibration_frames": 10,
}


@contextmanager
def tiny_budgets() -> Iterator[None]:
    """Replace the defaults that system.yaml would override."""
    settings = {f.name: f.default for f in dataclasses.fields(ReferenceSettings)} | REFERENCE
    with pytest.MonkeyPatch.context() as patch:
        for budget in BUDGETS:
            patch.setitem(recipes._MOLECULE, budget, TINY)
        patch.setattr(ReferenceSettings.__init__, "__defaults__", tuple(settings.values()))
        yield


class Block(NamedTuple):
    language: str
    code: str
    line: int
    replace: tuple[tuple[str, str], ...]
    listing: str | None


def parts(page: Path) -> Iterator[Block | str]:
    """Blocks of a page in order; a plain string is something the page wants to be given."""
    text = page.read_text(encoding="utf-8")
    replace: list[tuple[str, str]] = []
    listing = None
    pattern = re.compile(r"^<!-- test: (.*?) -->$|^```(\w*)\n(.*?)^```$", re.M | re.S)
    for match in pattern.finditer(text):
        directive, language, code = match.groups()
        if directive is None:
            line = text[: match.start()].count("\n") + 1
            yield Block(language, code, line, tuple(replace), listing)
            replace, listing = [], None
        elif directive.startswith("given "):
            yield directive.removeprefix("given ")
        elif directive.startswith("listing "):
            listing = directive.removeprefix("listing ")
        else:
            change = re.fullmatch(r'replace "(.*)" by "(.*)"', directive)
            assert change is not None, f"{page.name}: cannot understand {directive!r}"
            replace.append((change[1], change[2]))
    assert not replace, f"{page.name}: a replacement without a block after it"


# -- a finished run of each molecule, made once for all pages and processes -----------------------


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the systems and runs the pages start from, made where first used."""
    root = tmp_path_factory.getbasetemp()
    if root.name.startswith("popen-"):  # a worker of pytest-xdist: its siblings use the same
        root = root.parent
    return root / "docs"


def prepare(folder: Path, name: str, shell: Shell) -> Path:
    """Run ``name`` to its end, unless a test (or another process) did so before."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{name}.lock"):
        source, out = folder / "system" / name, folder / "run" / name
        if name == "my-molecule" and not source.exists():
            (folder / "mol.pdb").write_bytes(MOLECULE.read_bytes())
            init_system(source, pdb=folder / "mol.pdb", forcefield=["amber14-all.xml"])
        if not (out / "report.html").is_file():
            system = name if name == "alanine-dipeptide" else source
            outcome = shell("run", system, "--budget", "quick", "--out", out, "--device", "cpu")
            assert outcome.code == 0, outcome
    return out


def copy_run(prepared: Path, name: str, out: Path, shell: Shell, **config: object) -> None:
    """Copy the prepared run of a system; ``config`` replaces entries of config.yaml."""
    shutil.copytree(prepare(prepared, name, shell), out)
    content = yaml.safe_load((out / "config.yaml").read_text())
    (out / "config.yaml").write_text(yaml.safe_dump(content | config))


def give(name: str, prepared: Path, shell: Shell) -> None:
    if name == "my-run":
        copy_run(prepared, "alanine-dipeptide", Path(name), shell)
    elif name == "molecules.csv":
        write_system(Path("peroxide"))
        Path(name).write_text("name,folder,seed\none,peroxide,1\ntwo,peroxide,2\n")
    elif name == "mol.pdb":
        shutil.copyfile(MOLECULE, name)
    elif name == "my-molecule":
        prepare(prepared, name, shell)
        shutil.copytree(prepared / "system" / name, name)
    else:
        pytest.fail(f"cannot provide {name!r}")


# -- the languages --------------------------------------------------------------------------------


def commands(code: str) -> Iterator[str]:
    for line in code.replace("\\\n", " ").splitlines():
        yield from (part.strip() for part in line.split("&&") if part.strip())


def run_bash(code: str, prepared: Path, shell: Shell) -> None:
    for command in commands(code):
        if command.startswith(NOT_RUN):
            continue
        words = shlex.split(command)
        while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        program = Path(words[0]).name
        if program == "python":
            look_up_script(words[1:])
            continue
        if program == "torchrun":
            module = words.index("-m")
            assert words[module + 1] == "openmm_eqflow.cli"
            parse(words[module + 2 :])
            continue
        assert program == "openmm-eqflow", f"do not know how to run {command!r}"
        if words[1] == "run":
            provide_run(words[2:], prepared, shell)
        outcome = shell(*words[1:])
        assert outcome.code == 0, (command, outcome)


def look_up_script(words: list[str]) -> None:
    assert words[0].startswith("examples/")
    script = ROOT / words[0]
    source = script.read_text(encoding="utf-8")
    # Options may be those of a module beside it that it imports.
    for name in re.findall(r"^from (\w+) import", source, flags=re.M):
        beside = script.with_name(f"{name}.py")
        source += beside.read_text(encoding="utf-8") if beside.is_file() else ""
    for word in words[1:]:
        assert not word.startswith("--") or f'"{word}"' in source, f"{words[0]} has no {word}"


def provide_run(words: list[str], prepared: Path, shell: Shell) -> None:
    context = cli.commands["run"].make_context("run", list(words))
    name, seed = Path(context.params["system"]).name, context.params["seed"]
    out = context.params["out"] or Path("runs") / name
    if name not in ("alanine-dipeptide", "my-molecule") or out.exists():
        return
    changes: dict[str, object] = {"budget": context.params["budget"] or "standard"}
    changes["seed"] = seed or 0
    if name == "my-molecule":
        changes["system"] = str(Path(name).resolve())
    copy_run(prepared, name, out, shell, **changes)
    (out / "report.html").unlink()  # so that the command has something to do


def check_yaml(code: str) -> None:
    content = yaml.safe_load(code)
    settings = content.get("settings", {})
    for budget in BUDGETS:
        make_recipe("molecule", budget, settings)
    ReferenceSettings.from_mapping(settings.get("reference", {}), Path("system.yaml"))
    if "name" in content:
        folder = Path(content["name"])
        (folder / "system.yaml").write_text(code)
        assert load_system(folder).name == content["name"]


def check_listing(code: str, folder: Path) -> None:
    named = {line.split()[0].rstrip("/") for line in code.splitlines()}
    assert named == {p.name for p in folder.iterdir()}


@pytest.fixture
def shell(shell, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    # mpiplus puts back every signal handler, and cannot put back pytest's (faulthandler's).
    monkeypatch.setattr("mpiplus.mpiplus.delay_termination", nullcontext)
    return shell


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run(page: Path, prepared: Path, shell: Shell) -> None:
    readme = page.name == "README.md"
    namespace: dict[str, object] = {"__name__": "__main__"}
    with tiny_budgets():
        for name in README_GIVEN if readme else ():
            give(name, prepared, shell)
        for part in parts(page):
            if isinstance(part, str):
                give(part, prepared, shell)
                continue
            code = part.code
            for old, new in README_REPLACE.items() if readme else part.replace:
                assert readme or old in code, f"{page.name}:{part.line} has no {old!r}"
                code = code.replace(old, new)
            if part.listing is not None:
                check_listing(code, Path(part.listing))
            elif part.language == "python":
                # Blank lines in front, so that a traceback points into the page.
                exec(compile("\n" * part.line + code, str(page), "exec"), namespace)
            elif part.language == "bash":
                run_bash(code, prepared, shell)
            elif part.language == "yaml":
                check_yaml(code)
            else:
                assert part.language == "text", f"{page.name}:{part.line}: what is this?"


def inline_commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        found += [
            (page.name, " ".join(code.split()))
            for code in re.findall(r"`([^`]+)`", text)
            if code.startswith("openmm-eqflow ")
        ]
    return found


@pytest.mark.parametrize(("page", "code"), inline_commands())
def test_commands_in_the_text_exist(page: str, code: str) -> None:
    first, *rest = code.split()[1:]
    for name in first.split("|"):
        parse([name, *rest])


def test_what_other_programs_start_exists() -> None:
    """Lines of the Slurm script, the Snakefile and the shell that no test runs."""
    page = (ROOT / "docs" / "campaigns.md").read_text(encoding="utf-8")
    texts = re.findall(r"^```text\n(.*?)^```$", page, flags=re.M | re.S)
    joined = [re.sub(r'"\n +"', "", text) for text in texts]
    found = [line for text in joined for line in re.findall(r"openmm-eqflow ([^>\n]+)", text)]
    assert [line.split()[0] for line in found] == ["campaign", "run", "init", "run"]
    for line in found:
        parse(shlex.split(line if line.count('"') % 2 == 0 else line.replace('"', "")))
    (script,) = (text for text in texts if "#SBATCH" in text)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def parse(words: list[str]) -> None:
    """Fail if there is no such command or option; paths and arguments may be the reader's."""
    measure.register(cli)
    command: click.Command = cli
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    try:
        command.make_context("openmm-eqflow", list(words))
    except (click.MissingParameter, click.exceptions.Exit):
        pass  # mentioned without its arguments
    except click.BadParameter as error:
        if "does not exist" not in error.message:
            raise
