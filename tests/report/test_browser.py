"""The report in a real browser: the view draws, basins can be clicked, downloads hold the data."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from pathlib import Path

import mdtraj
import numpy as np
import pytest
from matplotlib import image
from stand_ins.campaigns import row
from stand_ins.runs import turned_frames, write_run
from stand_ins.small_molecules import written

from openmm_eqflow.report import write_report
from openmm_eqflow.report.campaign import write_overview
from openmm_eqflow.targets.own_system import init_system

pytestmark = [
    # Drawing without a GPU takes most of the time.
    pytest.mark.slow,
    pytest.mark.timeout(600),
]
DATA = Path(__file__).parent.parent / "data"
WIDTHS = (400, 1400)
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")

@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no playwright: pip install playwright"
    )
    program = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if program is None:
        pytest.skip("no browser: install chromium (apt-get install chromium)")
    # Chromium has no sandbox for root; containers of CI run as root.
    flags = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]
    if os.geteuid() == 0:
        flags.append("--no-sandbox")
    with playwright.sync_playwright() as p:
        program = p.chromium.launch(executable_path=program, args=flags)
        yield program
        program.close()


def pytest_generate_tests(metafunc):
    """Frames made up for four systems, and the finished runs of ``--run-directory``."""
    if "report" in metafunc.fixturenames:
        made = ["alanine-dipeptide", "proline", "ibuprofen", "lj13"]
        real = [Path(run).resolve() for run in metafunc.config.getoption("run_directory")]
        metafunc.parametrize("report", made + real, indirect=True, scope="module", ids=str)


@pytest.fixture(scope="module")
def report(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    system, draw = request.param, None
    if isinstance(system, Path):
        shutil.copytree(system, folder / "run")
        return system.name, folder / "run", write_report(folder / "run")
    if system == "proline":
        system, draw = folder / "proline", turned_frames
        init_system(system, pdb=DATA / "pro-dipeptide.pdb", forcefield=["amber14-all.xml"])
    elif system == "ibuprofen":
        written(folder / "ibuprofen", "ibuprofen")
        system, draw = folder / "ibuprofen" / "system", turned_frames
    path = write_run(folder / "run", str(system), draw=draw)
    return request.param, path, write_report(path)


def opened(browser, file, width, *, wait_for="#view canvas", **options):
    """A page, and everything that went wrong or went out on it."""
    context = browser.new_context(viewport={"width": width, "height": 900}, **options)
    page, trouble = context.new_page(), []
    page.on("console", lambda m: m.type in ("error", "warning") and trouble.append(m.text))
    page.on("pageerror", lambda e: trouble.append(str(e)))
    page.on(
        "request",
        lambda r: r.url.startswith(("file:", "data:", "blob:")) or trouble.append(r.url),
    )
    page.goto(file.as_uri())
    page.wait_for_selector(wait_for)
    return page, trouble


def drawn(page):
    """Picture of the 3D view ``(h, w, 3)``, and the share of it that is not background."""
    picture = image.imread(io.BytesIO(page.locator("#view").screenshot()))
    picture = picture[2:-2, 2:-2, :3]  # the frame may begin between two pixels
    return picture, float((np.abs(picture - picture[0, 0]).sum(axis=-1) > 0.1).mean())


def saved(page, selector):
    with page.expect_download() as download:
        page.click(selector)
    with open(download.value.path(), encoding="utf-8-sig", newline="") as handle:
        return download.value.suggested_filename, handle.read()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_view_is_drawn_without_request_or_console_error(browser, report, width, scheme):
    name, _, file = report
    page, trouble = opened(browser, file, width, color_scheme=scheme)
    picture, share = drawn(page)
    assert 0.01 < share < 0.9
    # The view follows the theme.
    assert (picture[0, 0].mean() < 0.5) == (scheme == "dark")
    # Nothing is wider than the screen, and the drawing belongs to molecules alone.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#figure-drawing svg").count() == ("lj13" not in name)
    # Power: the same measure of an empty view is zero.
    page.evaluate("document.querySelector('#view canvas').style.display = 'none'")
    assert drawn(page)[1] == 0.0
    assert trouble == []
    page.context.close()


@pytest.mark.parametrize("width", WIDTHS)
def test_clicking_a_basin_shows_it(browser, report, width):
    name, _, file = report
    if "lj13" in name:
        pytest.skip("a cluster has no torsion map")
    page, trouble = opened(browser, file, width)
    page.uncheck("#superpose")
    data = json.loads(page.locator("#structures").text_content())
    first, _ = drawn(page)
    key, grid = data["maps"][0]["key"], np.array(data["maps"][0]["grid"])
    key += "-1" if grid.ndim == 2 else ""
    # Of one torsion: any height in the figure does.
    grid = grid if grid.ndim == 2 else np.repeat(grid[:, None], len(grid), axis=1)
    assert len(data["basins"]) > 1
    svg = page.locator(f"#figure-{key} svg")
    svg.scroll_into_view_if_needed()
    frame = page.locator(f"#{key}-torus").bounding_box()
    i, j = np.argwhere(grid == 1)[len(np.argwhere(grid == 1)) // 2]
    n = len(grid)
    x = frame["x"] + (i + 0.5) / n * frame["width"]
    y = frame["y"] + (1.0 - (j + 0.5) / n) * frame["height"]
    page.mouse.click(x, y)
    assert page.locator('[data-basin="1"]').get_attribute("aria-pressed") == "true"
    assert data["basins"][1]["share"] in page.locator("#view-said").text_content()
    second, share = drawn(page)
    assert share > 0.01
    assert np.abs(second - first).mean() > 1e-3
    # A click where no frame lies changes nothing; the button leads back to the first picture.
    i, j = np.argwhere(grid == -1)[0]
    svg.scroll_into_view_if_needed()
    frame = page.locator(f"#{key}-torus").bounding_box()
    page.mouse.click(
        frame["x"] + (i + 0.5) / n * frame["width"],
        frame["y"] + (1.0 - (j + 0.5) / n) * frame["height"],
    )
    assert page.locator('[data-basin="1"]').get_attribute("aria-pressed") == "true"
    page.click('[data-basin="0"]')
    again, _ = drawn(page)
    np.testing.assert_allclose(again, first, atol=0.02)
    assert trouble == []
    page.context.close()


def test_the_wheel_scrolls_the_page_and_zooms_with_ctrl(browser, report):
    _, _, file = report
    page, trouble = opened(browser, file, 1400)
    view = page.locator("#view")
    view.scroll_into_view_if_needed()
    before, top = drawn(page)[0], page.evaluate("scrollY")
    box = view.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.wheel(0, 120)
    page.wait_for_function(f"scrollY > {top}")
    np.testing.assert_allclose(drawn(page)[0], before, atol=0.02)
    page.keyboard.down("Control")
    page.mouse.wheel(0, -240)
    page.keyboard.up("Control")
    page.wait_for_timeout(200)
    assert np.abs(drawn(page)[0] - before).mean() > 1e-3
    assert trouble == []
    page.context.close()


def test_downloads_hold_what_the_page_shows(browser, report, tmp_path):
    _, run, file = report
    page, trouble = opened(browser, file, 400)
    name, text = saved(page, '[data-csv="populations"]')
    assert name == "populations.csv"
    rows = list(csv.reader(io.StringIO(text)))
    assert len({len(row) for row in rows}) == 1
    names = [q["name"] for q in json.loads((run / "metrics.json").read_text())["populations"]]
    assert len(rows) == len(names) + 1
    assert all(row[0].startswith(q) for row, q in zip(rows[1:], names, strict=True))
    for key in ("checks", "audit", "run"):
        assert len(list(csv.reader(io.StringIO(saved(page, f'[data-csv="{key}"]')[1])))) > 1
    name, text = saved(page, "#save-pdb")
    assert name.endswith("-basins.pdb")
    (tmp_path / "basins.pdb").write_text(text)
    trajectory = mdtraj.load(tmp_path / "basins.pdb")
    data = json.loads(page.locator("#structures").text_content())
    assert len(trajectory) == len(data["basins"])
    shown = np.array([basin["x"] for basin in data["basins"]]) / 10.0
    np.testing.assert_allclose(trajectory.xyz, shown, atol=2e-4)
    assert trouble == []
    page.context.close()


@pytest.mark.parametrize("width", WIDTHS)
def test_overview_of_a_campaign_fits_the_screen(browser, tmp_path, width):
    (tmp_path / "runs/aspirin").mkdir(parents=True)
    (tmp_path / "runs/aspirin/report.html").write_text("<title>report of aspirin</title>")
    state = {"torsion": "C1-C2", "state": "anti", "population": 0.25, "population_error": 0.01}
    done = {"n_atoms": 21, "seconds": 143.2, "n_samples": 10000, "relative_ess": 0.5}
    rows = [
        row("aspirin", "done", **done, verdict="Confined", log_z=-9.5, log_z_error=0.02)
        | {"populations": [state] * 6},
        row("a-molecule-with-a-long-name", "failed", message="no parameters for atom " * 12),
    ]
    file = write_overview(tmp_path, rows)
    page, trouble = opened(browser, file, width, wait_for="table")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.click('a[href="runs/aspirin/report.html"]')
    assert page.title() == "report of aspirin"
    assert trouble == []
    page.context.close()
