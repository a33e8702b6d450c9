// The script of the page that `jetson-det data check --html` and `data view --html` write. It runs without a library
// and loads nothing: the data is JSON in the element "data", the JPEGs are base64 in "t0", "t1"... (thumbnails) and
// "l0", "l1"... (larger copies). Text reaches the page as text alone (`append`), never as HTML.
//
// data.images: path, width, height, split, group; for its boxes: boxes (x1, y1, x2, y2 in pixels), labels (numbers of
//   classes), flags (1 crowd, 2 ignore, 4 difficult), sizes (square root of the area at the input), attributes
// data.findings: severity, kind, message, file, advice, action; image, other (numbers of images or -1), box (or -1)
// data.kinds, data.classes, data.splits: rows of the tables

"use strict";

// ---- Elements and words ----

const $ = id => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const NS = "http://www.w3.org/2000/svg";

// Attributes that are false or missing are left out; a name that starts with "on" is an event.
// Children that are strings become text, never HTML.
function fillElement(e, attributes, kids) {
  for (const [k, v] of Object.entries(attributes || {})) {
    if (k.startsWith("on")) e.addEventListener(k.slice(2), v);
    else if (v !== false && v != null) e.setAttribute(k, v === true ? "" : v);
  }
  e.append(...kids.flat(9).filter(k => k !== false && k != null && k !== ""));
  return e;
}

const el = (tag, attributes, ...kids) => fillElement(document.createElement(tag), attributes, kids);
const svgEl = (tag, attributes, ...kids) => fillElement(document.createElementNS(NS, tag), attributes, kids);

// <bdi> keeps a name that is written from right to left from turning the text around it.
const bdi = text => el("bdi", {}, text);
const soft = (tag, ...kids) => el(tag, {class: "soft"}, kids);
const td = (...kids) => el("td", {}, kids);
const num = (...kids) => el("td", {class: "num"}, kids);
const table = (id, head, rows) =>
  el(
    "table",
    {id: id},
    el(
      "thead",
      {},
      el(
        "tr",
        {},
        head.map(([word, c]) => el("th", {class: c || ""}, word)),
      ),
    ),
    el("tbody", {}, rows),
  );
const formatCount = n => n.toLocaleString("en");

// "1 box", "3 boxes", "12 images"
function plural(n, word) {
  const ending = /[xs]$/.test(word) ? "es" : "s";
  return formatCount(n) + " " + word + (n === 1 ? "" : ending);
}

// Three digits or so: 3.25, 12.5, 140
function formatNumber(v) {
  if (Number.isInteger(v)) return String(v);
  if (v >= 100) return v.toFixed(0);
  return v.toFixed(v >= 10 ? 1 : 2);
}

const baseName = p => p.slice(p.lastIndexOf("/") + 1);

// ---- What is known of the images ----

const SEVERITIES = ["error", "warning", "note"];
const SIGNS = {error: "\u2716", warning: "\u25B2", note: "\u25CF"};
const FLAGS = [
  [1, "crowd"],
  [2, "ignore"],
  [4, "difficult"],
];

// Classes by their number of boxes. The first eight have a color each, then the colors begin again.
const classOrder = data.classes.map((c, k) => k).sort((a, b) => data.classes[b].boxes - data.classes[a].boxes || a - b);
const color = [];
classOrder.forEach((k, r) => {
  color[k] = data.palette[r % data.palette.length];
});

const className = k => data.classes[k].name;
const colorSwatch = k => {
  const e = el("span", {class: "swatch"});
  e.style.background = color[k];
  return e;
};

const severitySign = s => el("span", {class: "severity " + s, "aria-hidden": "true"}, SIGNS[s]);
const severityLabel = s => el("span", {class: "severity " + s}, SIGNS[s], el("span", {class: "word"}, " " + s));

// A message without the file name that it starts with: the name stands beside it.
const messageOf = f =>
  f.file && f.message.startsWith(f.file)
    ? f.message.slice(f.file.length).replace(/^[:\s]+/, "") || f.message
    : f.message;

// What each image needs later: its number, its findings, the text that the search box looks at.
data.images.forEach((im, i) => {
  const texts = Object.values(im.attributes).flatMap(a => Object.values(a));
  im.index = i;
  im.findings = [];
  im.searchText = [im.path, ...texts].join("\n").toLowerCase();
});

data.findings.forEach((f, n) => {
  for (const i of new Set([f.image, f.other])) if (i >= 0) data.images[i].findings.push(n);
});

// 0 for an image with an error, 3 for one without a finding
const worstSeverity = im => im.findings.reduce((w, n) => Math.min(w, SEVERITIES.indexOf(data.findings[n].severity)), 3);

// The images are blocks of base64 further down the page; one that is not there (yet) is "".
const jpegUrl = id => {
  const e = $(id);
  return e && e.textContent ? "data:image/jpeg;base64," + e.textContent : "";
};

const thumbUrl = i => jpegUrl("t" + i);
const largeUrl = i => jpegUrl("l" + i);

// ---- Boxes over a thumbnail ----

// A box as a path, in pixels of the image
const outline = b => `M${b[0]} ${b[1]}H${b[2]}V${b[3]}H${b[0]}Z`;

// A ring around a box that is too small to be noticed in a thumbnail
function tinyBoxRingInThumb(im, b) {
  const side = Math.max(im.width, im.height);
  const r = side * 0.05;
  const at = {cx: (b[0] + b[2]) / 2, cy: (b[1] + b[3]) / 2, r: r};
  at.cx = Math.min(Math.max(at.cx, r), im.width - r);
  at.cy = Math.min(Math.max(at.cy, r), im.height - r);
  return Math.max(b[2] - b[0], b[3] - b[1]) > side * 0.06
    ? []
    : ["ring rim", "ring"].map(c => svgEl("circle", {class: c, ...at}));
}

const DRAWING_ORDER = ["faint", "plain", "focus"];

// The boxes of an image as SVG, one path for all boxes that look the same. `focus` has the numbers of the boxes
// to stress; without it, `wanted` says which boxes pass the filters. Sorted, the faint ones are drawn first.
function boxOverlay(im, wanted, focus) {
  const groups = new Map();
  im.boxes.forEach((b, k) => {
    let level = "plain";
    if (focus) level = focus.has(k) ? "focus" : "faint";
    else if (wanted && !wanted(im, k)) level = "faint";
    const key = [DRAWING_ORDER.indexOf(level), im.flags[k] ? 1 : 0, im.labels[k]].join(" ");
    groups.set(key, (groups.get(key) || "") + outline(b));
  });
  const svg = svgEl("svg", {viewBox: `0 0 ${im.width} ${im.height}`, "aria-hidden": "true"});
  for (const key of [...groups.keys()].sort()) {
    const [level, dashed, label] = key.split(" ").map(Number);
    const d = groups.get(key);
    const dash = dashed ? " dashed" : "";
    svg.append(
      svgEl(
        "g",
        {class: DRAWING_ORDER[level]},
        svgEl("path", {class: "rim" + dash, d: d}),
        svgEl("path", {class: "box" + dash, d: d, stroke: color[label], "data-label": label}),
      ),
    );
  }
  if (focus) for (const k of focus) svg.append(...tinyBoxRingInThumb(im, im.boxes[k]));
  return svg;
}

function thumbWithBoxes(im, wanted, focus) {
  const src = thumbUrl(im.index);
  if (!src) return [el("span", {class: "lost"}, "this image could not be decoded")];
  return [el("img", {src: src, alt: "", decoding: "async"}), boxOverlay(im, wanted, focus)];
}

// ---- Filters ----

// An empty set lets everything pass.
const filters = {
  text: "",
  label: new Set(),
  size: new Set(),
  flag: new Set(),
  split: new Set(),
  severity: new Set(),
  kind: new Set(),
  sort: "name",
};

function sizeBucket(z) {
  const bucket = data.edges.findIndex(edge => z < edge);
  return bucket < 0 ? data.edges.length : bucket;
}

const flagsOf = f => (f ? FLAGS.filter(([bit]) => f & bit).map(([bit]) => bit) : [0]);
data.images.forEach(im => {
  im.buckets = im.sizes.map(sizeBucket);
});

const allows = (set, v) => !set.size || set.has(v);
const filtersBoxes = () => filters.label.size || filters.size.size || filters.flag.size;

// Whether a box passes the filters of boxes, all but the filter `but`
const boxPasses = (im, k, but) =>
  (but === "label" || allows(filters.label, im.labels[k])) &&
  (but === "size" || allows(filters.size, im.buckets[k])) &&
  (but === "flag" || !filters.flag.size || flagsOf(im.flags[k]).some(b => filters.flag.has(b)));

// The same for an image without a box
const emptyPasses = but =>
  (but === "label" || !filters.label.size) &&
  (but === "flag" || !filters.flag.size) &&
  (but === "size" || !filters.size.size || filters.size.has("none"));
const findingPasses = (f, but) =>
  (but === "severity" || allows(filters.severity, f.severity)) && (but === "kind" || allows(filters.kind, f.kind));

// Which of the four groups of filters an image passes
function evaluateFilters(im) {
  return {
    text: !filters.text || im.searchText.includes(filters.text),
    split: allows(filters.split, im.split),
    box: !filtersBoxes() || (im.boxes.length ? im.boxes.some((b, k) => boxPasses(im, k)) : emptyPasses()),
    finding: !(filters.severity.size || filters.kind.size) || im.findings.some(n => findingPasses(data.findings[n])),
  };
}

// How many images each option would show: those that pass all filters but the group that the option is in.
function countOptions(all) {
  const counts = {label: {}, size: {}, flag: {}, split: {}, severity: {}, kind: {}};
  const add = (group, values) => {
    for (const v of values) counts[group][v] = (counts[group][v] || 0) + 1;
  };
  for (const [im, p] of all) {
    if (!p.text) continue;
    if (p.split && p.finding)
      for (const [group, value] of [
        ["label", k => [im.labels[k]]],
        ["size", k => [im.buckets[k]]],
        ["flag", k => flagsOf(im.flags[k])],
      ]) {
        const met = new Set();
        im.boxes.forEach((b, k) => {
          if (boxPasses(im, k, group)) value(k).forEach(v => met.add(v));
        });
        if (group === "size" && !im.boxes.length && emptyPasses("size")) met.add("none");
        add(group, met);
      }
    if (p.box && p.finding) add("split", [im.split]);
    if (p.box && p.split)
      for (const group of ["severity", "kind"])
        add(
          group,
          new Set(
            im.findings
              .map(n => data.findings[n])
              .filter(f => findingPasses(f, group))
              .map(f => f[group]),
          ),
        );
  }
  return counts;
}

// ---- The side bar ----

// Group of filters -> its options, as `filterOption` returns them
const optionsOf = {};
function filterOption(group, value, text, mark, hint) {
  const tick = el("input", {
    type: "checkbox",
    onchange: () => {
      if (tick.checked) filters[group].add(value);
      else filters[group].delete(value);
      applyFilters();
    },
  });
  const n = el("span", {class: "count"});
  const row = el(
    "label",
    {class: "option", title: hint || text},
    tick,
    mark,
    el("span", {class: "name"}, bdi(text)),
    n,
  );
  row.dataset.value = value;
  return {value, tick, n, row, text: text.toLowerCase()};
}

// A group is left out when it has fewer than `least` options; a long one gets a search box of its own.
function filterGroup(id, title, hint, options, least = 2) {
  if (options.length < least) return null;
  optionsOf[id] = options.map(o => filterOption(id, ...o));
  const seek = e =>
    optionsOf[id].forEach(o => {
      o.row.hidden = !o.text.includes(e.target.value.trim().toLowerCase());
    });
  return el(
    "fieldset",
    {"data-group": id},
    el("legend", {}, title),
    hint && el("p", {class: "hint"}, hint),
    options.length > 12 &&
      el("input", {
        type: "search",
        placeholder: "find in this list",
        "aria-label": "find in " + title,
        oninput: seek,
      }),
    el(
      "div",
      {class: "options"},
      optionsOf[id].map(o => o.row),
    ),
  );
}

function sizeOptions() {
  const e = data.edges;
  const names = [
    "under " + e[0] + " px",
    ...e.slice(1).map((v, k) => e[k] + " to " + v + " px"),
    e[e.length - 1] + " px and more",
  ];
  return [
    ...names.map((text, k) => [k, text]),
    ...(data.images.some(im => !im.boxes.length) ? [["none", "no box at all"]] : []),
  ];
}

function setUpFilters() {
  const has = bit => data.images.some(im => im.flags.some(f => (bit ? f & bit : !f)));
  const kinds = data.kinds.filter(k => k.shown);
  const text = el("input", {
    type: "search",
    id: "text",
    placeholder: (data.texts ? "name or text of a box" : "name") + "  ( / )",
    "aria-label": "text in the name",
    oninput: () => {
      filters.text = text.value.trim().toLowerCase();
      applyFilters();
    },
  });
  const parts = [
    el("fieldset", {}, text),
    filterGroup(
      "severity",
      "Severity",
      "",
      SEVERITIES.filter(s => kinds.some(k => k.severity === s)).map(s => [s, s, severitySign(s)]),
    ),
    filterGroup(
      "kind",
      "Finding",
      "",
      kinds.map(k => [k.kind, k.kind, severitySign(k.severity), k.advice]),
      1,
    ),
    filterGroup(
      "label",
      "Class",
      "",
      classOrder.filter(k => data.classes[k].shown).map(k => [k, className(k), colorSwatch(k)]),
      1,
    ),
    filterGroup(
      "size",
      "Box size at the input",
      `square root of its area when the image is fitted into ${data.input_size[1]} x ${data.input_size[0]}`,
      sizeOptions(),
    ),
    filterGroup(
      "split",
      "Split",
      "",
      data.splits.map(s => [s.name, s.name || "(none)"]),
    ),
    filterGroup(
      "flag",
      "Mark",
      "crowd, ignore and difficult are dashed",
      [[0, "plain"], ...FLAGS].filter(([bit]) => has(bit)),
    ),
  ];
  $("filters").append(...parts.filter(Boolean), el("button", {id: "clear", onclick: clearFilters}, "Clear filters"));
  $("sort").onchange = e => {
    filters.sort = e.target.value;
    applyFilters();
  };
  $("clear2").onclick = clearFilters;
  if (matchMedia("(max-width: 800px)").matches) $("filters").open = false;
}

function clearFilters() {
  for (const id of Object.keys(optionsOf)) {
    filters[id].clear();
    optionsOf[id].forEach(o => {
      o.tick.checked = false;
    });
  }
  filters.text = "";
  $("text").value = "";
  applyFilters();
}

// Shows the images with a finding of one kind, and nothing else.
function showKind(kind) {
  clearFilters();
  filters.kind.add(kind);
  optionsOf.kind.forEach(o => {
    o.tick.checked = o.value === kind;
  });
  applyFilters();
  openTab("images");
}

// ---- The grid of images ----

// Names in the order of a file browser: 2.jpg before 10.jpg
const collator = new Intl.Collator("en", {numeric: true});
const cards = [];
const visibleCards = new Set();
let listed = [];
let filterVersion = 0;
const byName = (a, b) => collator.compare(a.path, b.path) || (a.path < b.path ? -1 : 1);

// The smallest size at the input; an image without a box comes last
const smallestBox = im => im.sizes.reduce((m, z) => Math.min(m, z), 1e9);
const ORDERS = {
  name: byName,
  boxes: (a, b) => b.boxes.length - a.boxes.length || byName(a, b),
  small: (a, b) => smallestBox(a) - smallestBox(b) || byName(a, b),
  findings: (a, b) => worstSeverity(a) - worstSeverity(b) || b.findings.length - a.findings.length || byName(a, b),
};

const cardCaption = im =>
  `${plural(im.boxes.length, "box")} \u00b7 ${im.width} x ${im.height}${im.split ? " \u00b7 " + im.split : ""}`;
function badges(im) {
  const n = {};
  im.findings.forEach(k => {
    const s = data.findings[k].severity;
    n[s] = (n[s] || 0) + 1;
  });
  const badge = s => el("span", {class: "badge " + s, title: plural(n[s], s)}, SIGNS[s] + " " + n[s]);
  return el("span", {class: "badges"}, SEVERITIES.filter(s => n[s]).map(badge));
}

function card(im) {
  const label = `${im.path}, ${cardCaption(im)}, ${plural(im.findings.length, "finding")}`;
  return el(
    "button",
    {class: "card", "data-i": im.index, "aria-label": label, onclick: () => openViewer(listed, im.index)},
    el("span", {class: "pic"}),
    el(
      "span",
      {class: "caption"},
      el("bdi", {class: "name", title: im.path}, baseName(im.path)),
      soft("span", cardCaption(im)),
    ),
  );
}

// A card gets its image when it comes near the window, and again when the filters have changed since.
function fillCard(c) {
  const im = data.images[+c.dataset.i];
  const ready = $("t" + im.index) || document.readyState !== "loading";
  if (!ready || c.dataset.version === String(filterVersion)) return;
  c.dataset.version = filterVersion;
  c.firstChild.replaceChildren(...thumbWithBoxes(im, filtersBoxes() ? boxPasses : null, null), badges(im));
}

const cardWatcher = new IntersectionObserver(
  entries => {
    for (const e of entries) {
      if (e.isIntersecting) {
        visibleCards.add(e.target);
        fillCard(e.target);
      } else {
        visibleCards.delete(e.target);
      }
    }
  },
  {rootMargin: "500px"},
);

// Runs after each change of a filter: the list, the numbers beside the options, the line above the grid.
function applyFilters() {
  const all = data.images.map(im => [im, evaluateFilters(im)]);
  const counts = countOptions(all);
  listed = all
    .filter(([im, p]) => p.text && p.split && p.box && p.finding)
    .map(([im]) => im)
    .sort(ORDERS[filters.sort])
    .map(im => im.index);
  for (const [name, options] of Object.entries(optionsOf))
    for (const o of options) {
      const n = counts[name][o.value] || 0;
      o.n.textContent = formatCount(n);
      o.row.classList.toggle("zero", !n && !o.tick.checked);
    }
  filterVersion += 1;
  $("grid").replaceChildren(...listed.map(i => cards[i]));
  $("found").textContent =
    (listed.length < data.images.length ? formatCount(listed.length) + " of " : "") +
    plural(data.images.length, "image");
  const active = Object.keys(optionsOf).reduce((n, k) => n + filters[k].size, filters.text ? 1 : 0);
  $("nothing").hidden = listed.length > 0;
  $("clear").disabled = !active;
  $("summary").textContent = active ? `Filters (${active} set)` : "Filters";
  visibleCards.forEach(fillCard);
}

// ---- One image, enlarged ----

// `list` holds the numbers of the images to step through, `at` is the place in it, `box` the selected box or -1.
// `view` is the part that is shown, `whole` the part at the start: x, y, width, height in pixels of the image.
const viewer = {list: [], at: 0, box: -1, view: null, whole: null, boxesShown: true};
const currentImage = () => data.images[viewer.list[viewer.at]];
function openViewer(images, i, box) {
  viewer.list = images;
  viewer.at = images.indexOf(i);
  viewer.box = box == null ? -1 : box;
  if (!$("viewer").open) {
    $("viewer").showModal();
    document.documentElement.style.overflow = "hidden";
  }
  showImage();
}

// The image and, up to half its size around it, the boxes that reach beyond it
function wholeView(im) {
  let [x1, y1, x2, y2] = [0, 0, im.width, im.height];
  for (const b of im.boxes) {
    x1 = Math.min(x1, b[0]);
    y1 = Math.min(y1, b[1]);
    x2 = Math.max(x2, b[2]);
    y2 = Math.max(y2, b[3]);
  }
  x1 = Math.max(x1, -im.width / 2);
  y1 = Math.max(y1, -im.height / 2);
  x2 = Math.min(x2, im.width * 1.5);
  y2 = Math.min(y2, im.height * 1.5);
  const rim = x1 < 0 || y1 < 0 || x2 > im.width || y2 > im.height ? Math.max(im.width, im.height) * 0.02 : 0;
  return [x1 - rim, y1 - rim, x2 - x1 + 2 * rim, y2 - y1 + 2 * rim];
}

function showImage() {
  const im = currentImage();
  const src = largeUrl(im.index) || thumbUrl(im.index);
  viewer.whole = wholeView(im);
  viewer.view = [...viewer.whole];
  const svg = svgEl(
    "svg",
    {id: "drawing", role: "img", "aria-label": im.path},
    src && svgEl("image", {href: src, width: im.width, height: im.height, preserveAspectRatio: "none"}),
    viewer.whole[2] > im.width && svgEl("path", {class: "edge", d: outline([0, 0, im.width, im.height])}),
    svgEl("g", {id: "boxes"}),
    svgEl("g", {id: "names"}),
  );
  $("canvas").replaceChildren(svg);
  im.boxes.forEach((b, k) => {
    const dash = im.flags[k] ? " dashed" : "";
    const d = outline(b);
    $("boxes").append(
      svgEl(
        "g",
        {"data-box": k},
        svgEl("path", {class: "rim" + dash, d}),
        svgEl("path", {class: "box" + dash, d, stroke: color[im.labels[k]]}),
      ),
    );
  });
  $("panel").replaceChildren(...panelContent(im));
  $("panel").scrollTop = 0;
  selectBox(viewer.box);
}

// Screen pixels for a pixel of the image
function screenScale() {
  const r = $("stage").getBoundingClientRect();
  return Math.min(r.width / viewer.view[2], r.height / viewer.view[3]) || 1;
}

// The class name above its box, or inside where there is no room; further up when the box has a ring
function boxTitle(im, k, s) {
  const b = im.boxes[k];
  const gap = k === viewer.box && Math.max(b[2] - b[0], b[3] - b[1]) * s < 24 ? 26 : 5;
  const above = b[1] - (gap + 13) / s > viewer.view[1];
  const x = Math.max(b[0], viewer.view[0] + 2 / s);
  const y = above ? b[1] - gap / s : Math.max(b[1], viewer.view[1]) + (gap + 10) / s;
  return svgEl("text", {x, y, "font-size": 13 / s, "stroke-width": 3 / s}, className(im.labels[k]));
}

// A ring around the selected box where it is under 24 pixels of the screen
function tinyBoxRing(b, s) {
  const at = {cx: (b[0] + b[2]) / 2, cy: (b[1] + b[3]) / 2, r: 22 / s};
  return Math.max(b[2] - b[0], b[3] - b[1]) * s < 24
    ? ["ring rim", "ring"].map(c => svgEl("circle", {class: c, ...at}))
    : [];
}

// Runs after each change of the view: lines, letters and rings keep their size on the screen.
function redraw() {
  const im = currentImage();
  const s = screenScale();
  const svg = $("drawing");
  const named = im.boxes.map((b, k) => k).filter(k => (viewer.box >= 0 ? k === viewer.box : im.boxes.length <= 30));
  svg.setAttribute("viewBox", viewer.view.join(" "));
  svg.style.imageRendering = s > 6 ? "pixelated" : "auto";
  $("fit").disabled = viewer.view.every((v, k) => v === viewer.whole[k]);
  $("boxes").style.display = $("names").style.display = viewer.boxesShown ? "" : "none";
  $("names").replaceChildren(
    ...named.map(k => boxTitle(im, k, s)),
    ...(viewer.box >= 0 ? tinyBoxRing(im.boxes[viewer.box], s) : []),
  );
}

function selectBox(k) {
  viewer.box = k;
  $("boxes")
    .querySelectorAll("g")
    .forEach((g, n) => {
      const state = n === k ? "selected" : "unselected";
      g.setAttribute("class", k < 0 ? "" : state);
    });
  $("panel")
    .querySelectorAll("tr[data-box]")
    .forEach(r => r.classList.toggle("selected", +r.dataset.box === k));
  const row = $("panel").querySelector("tr.selected");
  if (row) row.scrollIntoView({block: "nearest"});
  $("zoom-to-box").disabled = k < 0;
  redraw();
}

// ---- The panel beside it ----

// How much the image is scaled to fit the input of the network
const atInput = im => Math.min(data.input_size[0] / im.height, data.input_size[1] / im.width);
const formatSize = (w, h) => formatNumber(w) + " x " + formatNumber(h);
function boxRow(im, b, k) {
  const w = b[2] - b[0];
  const h = b[3] - b[1];
  const s = atInput(im);
  const tags = [
    ...FLAGS.filter(([bit]) => im.flags[k] & bit).map(([bit, word]) => word),
    ...Object.entries(im.attributes[k] || {}).map(([n, v]) => n + ": " + v),
  ];
  return el(
    "tr",
    {
      "data-box": k,
      tabindex: 0,
      onclick: () => selectBox(viewer.box === k ? -1 : k),
      ondblclick: () => {
        selectBox(k);
        zoomToBox();
      },
    },
    el("td", {class: "num soft"}, k + 1),
    td(
      colorSwatch(im.labels[k]),
      " ",
      bdi(className(im.labels[k])),
      tags.length > 0 &&
        el(
          "div",
          {},
          tags.map(t => el("span", {class: "tag"}, bdi(t))),
        ),
    ),
    num(formatSize(w, h)),
    num(formatSize(w * s, h * s)),
  );
}

// Of two images that are one, the finding leads to the other.
function findingCard(f, im) {
  const other = f.image === im.index ? f.other : f.image;
  const button = (text, onclick) => el("button", {class: "plain", onclick}, text);
  return el(
    "div",
    {class: "finding"},
    severityLabel(f.severity),
    " ",
    el("b", {}, f.kind),
    " ",
    soft("span", f.action),
    el("p", {}, bdi(f.image === im.index ? messageOf(f) : f.message)),
    f.advice && el("p", {}, "\u2192 " + f.advice),
    f.image === im.index &&
      f.box >= 0 &&
      button("show box " + (f.box + 1), () => {
        selectBox(f.box);
        zoomToBox();
      }),
    other >= 0 &&
      other !== im.index &&
      button("show the other: " + baseName(data.images[other].path), () => openViewer([im.index, other], other)),
  );
}

// Why an enlarged image is not sharp, or ""
function resolutionNote(im) {
  if (!thumbUrl(im.index)) return "the image could not be decoded";
  if (largeUrl(im.index) || Math.max(im.width, im.height) <= data.thumb) return "";
  return `drawn from the thumbnail of ${data.thumb} px: this page holds no larger copy of it`;
}

const KEY_HELP =
  "Keys: \u2190 \u2192 images, \u2191 \u2193 boxes, z zoom to the box, 0 whole image, b boxes on and off, Esc close. " +
  "The wheel zooms, dragging moves.";
function panelContent(im) {
  const s = atInput(im);
  const go = (id, n, text, label, end) =>
    el("button", {id, onclick: () => stepImage(n), disabled: viewer.at === end, "aria-label": label}, text);
  const where = [im.split && "split " + im.split, im.group && "group " + im.group].filter(Boolean).join(", ");
  const head = [["#", "num"], ["class"], ["px", "num"], ["at the input", "num"]];
  return [
    el(
      "div",
      {class: "row"},
      el(
        "span",
        {},
        go("back", -1, "\u2190", "previous image", 0),
        " ",
        go("next", 1, "\u2192", "next image", viewer.list.length - 1),
        " ",
        soft("span", `${formatCount(viewer.at + 1)} of ${formatCount(viewer.list.length)}`),
      ),
      el("button", {id: "shut", onclick: () => $("viewer").close()}, "Close"),
    ),
    el("h2", {}, bdi(im.path)),
    soft("p", `${im.width} x ${im.height} px; at the input ${formatSize(im.width * s, im.height * s)}`),
    where && soft("p", bdi(where)),
    soft("p", resolutionNote(im)),
    im.findings.length > 0 && el("h3", {}, plural(im.findings.length, "finding")),
    ...im.findings.map(n => findingCard(data.findings[n], im)),
    el("h3", {}, plural(im.boxes.length, "box")),
    im.boxes.length
      ? table(
          "rows",
          head,
          im.boxes.map((b, k) => boxRow(im, b, k)),
        )
      : soft("p", "No box is labeled in this image."),
    soft("p", KEY_HELP),
  ].filter(Boolean);
}

// ---- Moving and zooming ----

function stepImage(n) {
  const at = viewer.at + n;
  if (at >= 0 && at < viewer.list.length) {
    viewer.at = at;
    viewer.box = -1;
    showImage();
  }
}

function showWhole() {
  viewer.view = [...viewer.whole];
  redraw();
}

// The selected box with its surroundings
function zoomToBox() {
  const b = currentImage().boxes[viewer.box];
  if (!b) return;
  const side = Math.max(
    (b[2] - b[0]) * 2.5,
    (b[3] - b[1]) * 2.5,
    Math.max(currentImage().width, currentImage().height) * 0.08,
    24,
  );
  viewer.view = [(b[0] + b[2] - side) / 2, (b[1] + b[3] - side) / 2, side, side];
  redraw();
}

// The image point (x, y) stays where it is on the screen.
function zoomBy(by, x, y) {
  const v = viewer.view;
  const wide = Math.min(Math.max(v[2] / by, 8), viewer.whole[2] * 2);
  const f = wide / v[2];
  viewer.view = [x - (x - v[0]) * f, y - (y - v[1]) * f, v[2] * f, v[3] * f];
  redraw();
}

const viewCenter = () => [viewer.view[0] + viewer.view[2] / 2, viewer.view[1] + viewer.view[3] / 2];
function imagePoint(e) {
  const p = new DOMPoint(e.clientX, e.clientY).matrixTransform($("drawing").getScreenCTM().inverse());
  return [p.x, p.y];
}

// The number of the smallest box at an image point, with a margin of 5 pixels of the screen
function smallestBoxAt(x, y) {
  const reach = 5 / screenScale();
  const boxes = currentImage().boxes;
  const area = k => (boxes[k][2] - boxes[k][0]) * (boxes[k][3] - boxes[k][1]);
  const inside = b => x > b[0] - reach && x < b[2] + reach && y > b[1] - reach && y < b[3] + reach;
  return boxes
    .map((b, k) => k)
    .filter(k => inside(boxes[k]))
    .sort((a, b) => area(a) - area(b))[0];
}

// ---- Mouse, fingers, keys ----

// Pointers that are down -> where they were last. `travel` is how far they have moved since the first went down:
// a press that has hardly moved is a click.
const pointers = new Map();
let travel = 0;
const pointerDistance = () => {
  const [a, b] = [...pointers.values()];
  return Math.hypot(a[0] - b[0], a[1] - b[1]) || 1;
};

function onPointerDown(e) {
  if (e.target.closest("button")) return;
  if (!pointers.size) travel = 0;
  pointers.set(e.pointerId, [e.clientX, e.clientY]);
  $("stage").setPointerCapture(e.pointerId);
}

function onPointerMove(e) {
  if (!pointers.has(e.pointerId)) return;
  const [x, y] = pointers.get(e.pointerId);
  const before = pointers.size === 2 ? pointerDistance() : 0;
  const k = screenScale();
  pointers.set(e.pointerId, [e.clientX, e.clientY]);
  travel += Math.abs(e.clientX - x) + Math.abs(e.clientY - y);
  if (before) zoomBy(pointerDistance() / before, ...viewCenter());
  else if (travel > 4) {
    viewer.view[0] -= (e.clientX - x) / k;
    viewer.view[1] -= (e.clientY - y) / k;
    redraw();
  }
}

function onPointerUp(e) {
  if (!pointers.delete(e.pointerId) || e.type !== "pointerup" || travel > 4 || pointers.size) return;
  const k = smallestBoxAt(...imagePoint(e));
  selectBox(k == null || k === viewer.box ? -1 : k);
}

function setUpStage() {
  const s = $("stage");
  s.addEventListener(
    "wheel",
    e => {
      e.preventDefault();
      zoomBy(Math.exp(-e.deltaY * 0.0015), ...imagePoint(e));
    },
    {passive: false},
  );
  for (const [kind, act] of [
    ["pointerdown", onPointerDown],
    ["pointermove", onPointerMove],
    ["pointerup", onPointerUp],
    ["pointercancel", onPointerUp],
  ])
    s.addEventListener(kind, act);
  new ResizeObserver(() => {
    if ($("viewer").open) redraw();
  }).observe(s);
}

const stepBox = n => {
  const m = currentImage().boxes.length;
  if (m) selectBox(((viewer.box < 0 && n < 0 ? 0 : viewer.box) + n + m) % m);
};

const toggleBoxes = () => {
  viewer.boxesShown = !viewer.boxesShown;
  redraw();
};

const KEY_ACTIONS = {
  ArrowLeft: () => stepImage(-1),
  ArrowRight: () => stepImage(1),
  ArrowDown: () => stepBox(1),
  ArrowUp: () => stepBox(-1),
  z: () => zoomToBox(),
  0: () => showWhole(),
  b: toggleBoxes,
  "+": () => zoomBy(1.4, ...viewCenter()),
  "-": () => zoomBy(1 / 1.4, ...viewCenter()),
};

function onKey(e) {
  if (e.ctrlKey || e.metaKey || e.altKey) return;
  if (!$("viewer").open) {
    if (e.key !== "/" || e.target.matches("input, select")) return;
    e.preventDefault();
    openTab("images");
    $("filters").open = true;
    $("text").focus();
  } else if (KEY_ACTIONS[e.key]) {
    e.preventDefault();
    KEY_ACTIONS[e.key]();
  } else if (e.key === "Enter" && e.target.matches("tr[data-box]")) selectBox(+e.target.dataset.box);
}

// ---- The findings ----

const MAX_CLASSES = 30; // classes in the table

// The first line: how much was found, and whether it would stop training
function verdict() {
  const total = s => data.kinds.filter(k => k.severity === s).reduce((t, k) => t + k.count, 0);
  const found = SEVERITIES.filter(total);
  if (!found.length)
    return el("p", {class: "good", id: "verdict"}, "\u2714 Nothing was found: no errors, no warnings, no notes.");
  const end =
    found[0] === "error" ? " \u2013 training would stop at the errors" : " \u2013 nothing that stops training";
  return el(
    "p",
    {id: "verdict"},
    found.map((s, k) => [k > 0 && ", ", el("span", {class: "severity " + s}, `${SIGNS[s]} ${plural(total(s), s)}`)]),
    end,
  );
}

function kindTable() {
  const row = k =>
    el(
      "tr",
      {"data-kind": k.kind},
      td(severityLabel(k.severity)),
      td(
        el("button", {class: "plain", onclick: () => $("kind-" + k.id).scrollIntoView()}, k.kind),
        soft("div", k.advice),
      ),
      num(formatCount(k.count)),
      num(k.images ? formatCount(k.images) : "\u2013"),
      el("td", {class: "action"}, k.actions.join(", ")),
    );
  const head = [["severity"], ["finding and what to do"], ["number", "num"], ["images", "num"], ["action", "action"]];
  return el("div", {class: "wide"}, table("kinds", head, data.kinds.map(row)));
}

// A bar as long as the share; what is there at all can be seen
function meter(share) {
  const wide = Math.max(share * 100, share > 0 ? 1 : 0);
  return svgEl(
    "svg",
    {class: "meter", viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true"},
    svgEl("rect", {width: wide, height: 8}),
  );
}

function datasetTables() {
  const most = Math.max(1, ...data.classes.map(c => c.boxes));
  const head = words => words.map((w, k) => [w, k ? "num" : ""]);
  const ofClass = k =>
    el(
      "tr",
      {},
      td(colorSwatch(k), " ", bdi(className(k))),
      num(formatCount(data.classes[k].boxes)),
      num(formatCount(data.classes[k].images)),
      td(meter(data.classes[k].boxes / most)),
    );
  const ofSplit = s =>
    el(
      "tr",
      {},
      td(bdi(s.name || "(none)")),
      [s.images, s.boxes, s.empty].map(v => num(formatCount(v))),
    );
  return el(
    "div",
    {class: "tables"},
    el(
      "div",
      {},
      el("h2", {}, "Classes"),
      table("classes", head(["class", "boxes", "images", ""]), classOrder.slice(0, MAX_CLASSES).map(ofClass)),
      classOrder.length > MAX_CLASSES && soft("p", `and ${plural(classOrder.length - MAX_CLASSES, "class")} more`),
    ),
    el(
      "div",
      {},
      el("h2", {}, "Splits"),
      table("splits", head(["split", "images", "boxes", "without a box"]), data.splits.map(ofSplit)),
    ),
  );
}

// ---- A few findings of each kind ----

const MAX_SAMPLES = 8;
const MAX_OPEN_LINES = 10;
const MAX_LINES = 500;
const pendingSamples = new Set();
const sampleWatcher = new IntersectionObserver(
  entries => {
    for (const e of entries) if (e.isIntersecting) fillSample(e.target);
  },
  {rootMargin: "500px"},
);

// While the page is still loading, the block of the image may not be there yet: it waits.
function fillSample(b) {
  const im = data.images[+b.dataset.i];
  const k = +b.dataset.box;
  if (!$("t" + im.index) && document.readyState === "loading") {
    pendingSamples.add(b);
    return;
  }
  sampleWatcher.unobserve(b);
  b.replaceChildren(...thumbWithBoxes(im, null, k >= 0 ? new Set([k]) : null));
}

function enlargeButton(images, im, box) {
  const b = el("button", {
    class: "pic",
    "data-i": im.index,
    "data-box": box,
    "aria-label": "enlarge " + im.path,
    onclick: () => openViewer(images.includes(im.index) ? images : [im.index], im.index, box),
  });
  sampleWatcher.observe(b);
  return b;
}

// Two images that are one stand side by side.
function sampleCard(f, images) {
  const both = f.other >= 0 ? [f.image, f.other].map(i => data.images[i]) : [data.images[f.image]];
  const pics = both.map((im, k) => enlargeButton(images, im, k ? -1 : f.box));
  const names = both.map(im => baseName(im.path) + (f.other >= 0 && im.split ? ` (${im.split})` : "")).join("  |  ");
  return el(
    "div",
    {class: "finding"},
    f.other >= 0 ? el("div", {class: "two"}, pics) : pics,
    soft("p", bdi(names)),
    el("p", {}, bdi(messageOf(f))),
  );
}

// Findings about no image on the page: a few lines, the rest folded
function lineList(rows) {
  const list = part =>
    el(
      "ul",
      {},
      part.map(f => el("li", {}, bdi(f.message))),
    );
  const rest = rows.slice(MAX_OPEN_LINES, MAX_LINES);
  return [
    list(rows.slice(0, MAX_OPEN_LINES)),
    rest.length > 0 &&
      el(
        "details",
        {},
        el("summary", {}, `${formatCount(rows.length - MAX_OPEN_LINES)} more without an image`),
        list(rest),
        rows.length > MAX_LINES &&
          soft("p", `and ${formatCount(rows.length - MAX_LINES)} more: see the report as JSON`),
      ),
  ];
}

function kindSection(k) {
  const rows = data.findings.filter(f => f.kind === k.kind);
  const withImage = rows.filter(f => f.image >= 0);
  const withoutImage = rows.filter(f => f.image < 0);
  const images = [...new Set(withImage.map(f => f.image))];
  const pairs = withImage.some(f => f.other >= 0);
  const left = k.count - rows.length;
  const showAll = k.shown === 1 ? "Show it among the images" : `Show all ${formatCount(k.shown)} among the images`;
  return el(
    "section",
    {class: "kind", id: "kind-" + k.id, "data-kind": k.kind},
    el(
      "div",
      {class: "head"},
      el("h3", {}, severitySign(k.severity), " ", k.kind),
      el("span", {}, plural(k.count, "finding")),
      k.advice && soft("span", "\u2192 " + k.advice),
    ),
    withImage.length > 0 &&
      el(
        "div",
        {class: "strip" + (pairs ? " pairs" : "")},
        withImage.slice(0, pairs ? MAX_SAMPLES / 2 : MAX_SAMPLES).map(f => sampleCard(f, images)),
      ),
    withoutImage.length > 0 && lineList(withoutImage),
    withImage.length > 0 && el("button", {class: "all", onclick: () => showKind(k.kind)}, showAll),
    left > 0 && soft("p", `${formatCount(left)} more are in images that are not on this page`),
  );
}

// ---- Start ----

const TABS = ["findings", "images"];
function openTab(id) {
  for (const t of TABS) {
    $(t).hidden = t !== id;
    $("tab-" + t).setAttribute("aria-selected", t === id);
    $("tab-" + t).tabIndex = t === id ? 0 : -1;
  }
  window.scrollTo(0, 0);
}

function setUpButtons() {
  for (const t of TABS) $("tab-" + t).onclick = () => openTab(t);
  document.querySelector("nav").addEventListener("keydown", e => {
    const other = TABS.find(t => $(t).hidden);
    if (["ArrowLeft", "ArrowRight"].includes(e.key) && !$("tab-" + other).hidden) {
      openTab(other);
      $("tab-" + other).focus();
    }
  });
  for (const [id, act] of [
    ["fit", showWhole],
    ["zoom-to-box", zoomToBox],
    ["hide", toggleBoxes],
    ["in", KEY_ACTIONS["+"]],
    ["out", KEY_ACTIONS["-"]],
  ])
    $(id).onclick = act;
  $("viewer").addEventListener("close", () => {
    document.documentElement.style.overflow = "";
    $("canvas").replaceChildren();
  });
  document.addEventListener("keydown", onKey);
  document.addEventListener("DOMContentLoaded", () => {
    visibleCards.forEach(fillCard);
    pendingSamples.forEach(fillSample);
  });
}

function start() {
  const ratios = data.images.map(im => im.width / im.height).sort((a, b) => a - b);
  const middling = ratios[ratios.length >> 1] || 1.33;
  document.documentElement.style.setProperty("--aspect", Math.min(Math.max(middling, 1), 2.4));
  data.images.forEach(im => {
    cards.push(card(im));
    cardWatcher.observe(cards[im.index]);
  });
  data.kinds.forEach((k, n) => {
    k.id = n;
  });
  if (data.tab === "findings" && data.findings.some(f => f.image >= 0)) filters.sort = $("sort").value = "findings";
  setUpFilters();
  setUpStage();
  setUpButtons();
  applyFilters();
  const found = data.kinds.length > 0 ? [el("h2", {}, "One by one"), ...data.kinds.map(kindSection)] : [];
  $("findings").append(
    verdict(),
    ...(data.kinds.length ? [kindTable()] : []),
    ...(data.splits.length ? [datasetTables()] : []),
    ...found,
  );
  $("subtitle").textContent = data.subtitle;
  $("share").textContent = data.share;
  $("foot").textContent = data.foot;
  $("number").textContent = data.kinds.length ? formatCount(data.kinds.reduce((t, k) => t + k.count, 0)) : "";
  $("tab-images").hidden = !data.images.length;
  openTab(data.images.length ? data.tab : "findings");
}
start();
