(() => {
  "use strict";
  const read = id => JSON.parse(document.getElementById(id).textContent);
  const save = (name, type, text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  // Tables as CSV, by RFC 4180: what a cell shows, its small print in brackets.
  const text = cell => {
    const small = cell.querySelector("small");
    if (!small) return cell.textContent.trim();
    return `${cell.textContent.replace(small.textContent, "").trim()} (${small.textContent.trim()})`;
  };
  const csv = table => [...table.rows].map(row => [...row.cells].map(cell =>
    `"${text(cell).replace(/\s+/g, " ").replaceAll('"', '""')}"`).join(",")).join("\r\n") + "\r\n";
  document.querySelectorAll("button[data-csv]").forEach(button => {
    button.addEventListener("click", () => save(`${button.dataset.csv}.csv`, "text/csv",
      "\ufeff" + csv(document.getElementById(`table-${button.dataset.csv}`))));
  });

  if (!document.getElementById("structures")) return;
  const { name, atoms, basins, maps, bonded, pdb } = read("structures");
  document.getElementById("save-pdb").addEventListener("click", () =>
    save(`${name}-basins.pdb`, "chemical/x-pdb", pdb));
  const box = document.getElementById("view"), buttons = [...document.querySelectorAll("[data-basin]")];
  const superpose = document.getElementById("superpose"), said = document.getElementById("view-said");
  const tones = ["#0072b2", "#d55e00", "#009e73", "#e69f00", "#b8528f", "#56b4e9"];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let viewer = null, shown = 0;
  const webgl = () => {
    const canvas = document.createElement("canvas");
    return Boolean(canvas.getContext("webgl2") || canvas.getContext("webgl"));
  };
  const model = (k, style) => {
    const m = viewer.addModel();
    m.addAtoms(atoms.map((atom, i) => ({ ...atom, serial: i + 1, index: i, hetflag: true,
      x: basins[k].x[i][0], y: basins[k].x[i][1], z: basins[k].x[i][2],
      bonds: [...atom.bonds], bondOrder: [...atom.bondOrder] })));
    m.setStyle({}, style);
    return m;
  };
  const draw = () => {
    if (!viewer) return;
    viewer.removeAllModels();
    viewer.setBackgroundColor(getComputedStyle(document.documentElement).getPropertyValue("--card").trim());
    const ghosts = superpose && superpose.checked;
    model(shown, bonded ? { stick: { radius: 0.12 }, sphere: { scale: 0.24 } } : { sphere: { scale: 0.5 } });
    if (ghosts) basins.forEach((_, k) => {
      if (k !== shown) model(k, bonded ? { stick: { radius: 0.06, color: tones[k % tones.length] } }
        : { sphere: { scale: 0.2, color: tones[k % tones.length] } });
    });
    viewer.render();
  };
  const show = k => {
    shown = k;
    buttons.forEach(b => b.setAttribute("aria-pressed", String(Number(b.dataset.basin) === k)));
    said.textContent = `${k + 1}: ${basins[k].name}, ${basins[k].share}`;
    document.querySelectorAll("svg .chosen").forEach(mark => mark.classList.remove("chosen"));
    document.querySelectorAll(`svg g[id$="-basin-${k}"]`).forEach(mark => mark.classList.add("chosen"));
    draw();
  };
  buttons.forEach(b => b.addEventListener("click", () => show(Number(b.dataset.basin))));
  if (superpose) superpose.addEventListener("change", draw);
  dark.addEventListener("change", draw);
  // A click in a torsion map shows the basin that most frames of that bin belong to.
  maps.forEach(({ key, grid }) => {
    document.querySelectorAll(`#figure-${key} svg, figure[id^="figure-${key}-"] svg`).forEach(svg => {
      const frame = svg.querySelector('g[id$="-torus"]');
      if (!frame) return;
      svg.classList.add("clickable");
      svg.addEventListener("click", event => {
        const r = frame.getBoundingClientRect(), n = grid.length;
        const i = Math.floor((event.clientX - r.left) / r.width * n);
        const j = Math.floor((r.bottom - event.clientY) / r.height * n);
        const column = grid[i] ?? -1, k = Array.isArray(column) ? column[j] ?? -1 : column;
        if (j < 0 || j >= n) return;
        if (k >= 0) show(k);
      });
    });
  });
  // The wheel scrolls the page; with Ctrl, or a pinch on a touchpad, it zooms.
  box.addEventListener("wheel", event => { if (!event.ctrlKey) event.stopPropagation(); }, true);
  if (webgl()) {
    viewer = $3Dmol.createViewer(box, { antialias: true, disableFog: true });
    show(0);
    viewer.zoomTo();
    viewer.render();
    // Printers see the page's picture, not the live canvas.
    const picture = document.getElementById("view-print");
    addEventListener("beforeprint", () => { picture.src = viewer.pngURI(); });
  } else {
    show(0);
    box.textContent = "This browser draws no 3D (WebGL is off); the PDB file holds the structures.";
  }
})();
