"""The page of a dataset: what is in the file, and what a browser makes of it."""
import base64
import json
import os
import re
import shutil
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jetson_det.core import InputError
from jetson_det.data.quality import view
from jetson_det.data.quality.check import CheckReport, check_dataset
from jetson_det.data.dataset import CROWD, IGNORE, DetDataset, Flaw
from jetson_det.data.quality.page import page_html
from jetson_det.data.quality.stats import sizes_at_input
from jetson_det.scenes.docks import write_scenes
from jetson_det.data.quality.view import (Subject, _choose_images, _jpeg_within, _jpegs_of, _locate, _make_jpegs,
                                          _named_path, write_check_page, write_view)

PAINT = {0: (40, 40, 220), 1: (40, 180, 40), 2: (220, 60, 30)} # BGR of the rectangles that the images show


def data_of(page):
    "The data in a page, read as a browser reads it: up to the first end tag."
    block = rb'<script type="application/json" id="data">(.*?)</script>'
    return json.loads(re.search(block, Path(page).read_bytes(), re.S)[1])


def jpeg_of(page, name):
    "An image in a page, decoded; None when it is empty."
    data = base64.b64decode(re.search(rb'id="%s">(.*?)</script>' % name.encode(), Path(page).read_bytes())[1])
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None


def dataset(root, n=12, size=(180, 240), classes=("Sack", "Person", "Plate"), names=None, **kw):
    "n gray images with a painted rectangle in every box; the last has none."
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = []
    names = names or [f"cam{k % 2}/{k:03}.png" for k in range(n)]
    for k, name in enumerate(names):
        img = np.full((*size, 3), 150, np.uint8)
        for b in range(k % 4 if k < n - 1 else 0):
            w, h = (2, 3) if k == 5 else rng.integers(10, 60, 2)
            x = rng.integers(0, size[1] - w)
            y = rng.integers(0, size[0] - h)
            label = (k + b) % len(classes)
            img[y:y + h, x:x + w] = PAINT[label % 3]
            rows.append((k, x, y, x + w, y + h, label, (CROWD, IGNORE)[k % 2] if (k + b) % 5 == 0 else 0))
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(cv2.imencode(".png", img)[1].tobytes())
    r = np.array(rows, np.float64).reshape(-1, 7)
    splits = [("train", "train", "val")[k % 3] for k in range(n)]
    texts = [f"no {k}" if k % 3 == 0 else "" for k in range(len(r))]
    return DetDataset(root, classes, names, [size] * n, r[:, 0], r[:, 1:5], r[:, 5], splits, flags=r[:, 6],
                      format="test", attributes={"text": texts}, **kw)


def report_of(ds):
    "A few findings of each kind: of a box, of a pair, of an image, of a label file, of the whole."
    p = ds.paths
    return CheckReport(str(ds.root), ds, [
        Flaw("error", "zero-area", p[2], f"box 2 ({ds.classes[0]})", f"{p[2]}: box 2 has no area", "dropped"),
        Flaw("warning", "duplicate-image", p[7], "", f"{p[7]} is the same file as {p[1]}: one is in train, one in val",
             "noted"),
        Flaw("warning", "tiny", p[5], f"box 1 ({ds.classes[2]})", f"{p[5]}: box 1 is small", "noted"),
        Flaw("warning", "missing-image", "gone.jpg", "", "gone.jpg is not there", "dropped"),
        Flaw("note", "no-labels", p[-1], "", f"{p[-1]} has no box", "noted"),
        Flaw("note", "unused-class", "", "Plate", "class 'Plate' is rare", "noted")
    ])


# What findings are about

def test_named_path():
    known = {"a b.jpg", "b.jpg", "c/d.jpg", "b"}
    assert _named_path("x is the same as a b.jpg: both in train", known) == "a b.jpg"
    assert _named_path("b.jpg is the same as c/d.jpg.", known, "b.jpg") == "c/d.jpg"
    assert _named_path("nothing", known) == _named_path("", known) == _named_path("b.jpg is the same file", known,
                                                                               "b.jpg") == ""
    assert _named_path("like 'c/d.jpg', (b.jpg)", known) == "c/d.jpg"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(st.characters(blacklist_categories=("Cs", "Cc", "Zl", "Zp", "Zs")), min_size=1, max_size=8),
             min_size=2,
             max_size=2,
             unique=True))
def test_named_path_of_any_script(names):
    a, b = (n + ".jpg" for n in names)
    if a not in b and b not in a: assert _named_path(f"{a} is the same file as {b}", {a, b}, a) == b


def test_locate(tmp_path):
    ds = dataset(tmp_path)
    rows = report_of(ds).to_dict()["flaws"]
    assert _locate(ds, rows) == [(2, 1, -1), (7, -1, 1), (5, 0, -1), (-1, -1, -1), (11, -1, -1), (-1, -1, -1)]
    row = lambda **kw: dict(dict(severity="note", kind="k", file="", where="", message="", action="", advice=""), **kw)
    odd = [
        row(file="labels/003.txt", where="line 7"),
        row(file=ds.paths[2], where="box 99"),
        row(file=ds.paths[2], where="box 0"),
        row(file=ds.paths[2], where="box " + "9"*400),
        row(file=ds.paths[0], kind="near-duplicate", where=ds.paths[4]),
        row(file=ds.paths[0], kind="duplicate-image", message=f"{ds.paths[0]} twice")
    ]
    assert _locate(ds, odd) == [(3, -1, -1), (2, -1, -1), (2, -1, -1), (2, -1, -1), (0, -1, 4), (0, -1, -1)]
    assert _locate(ds, []) == []


# Which images

def test_images_with_findings_are_always_in():
    at = [Subject(50, -1, -1), Subject(3, 0, -1), Subject(80, -1, 81), Subject(-1, -1, -1), Subject(3, 1, -1)]
    images, flagged, order = _choose_images(100, at, ["a", "b", "c", "c", "b"], most=10)
    assert flagged == 4 and {3, 50, 80, 81} <= set(images.tolist()) and len(images) == 10 and set(
        order[:4]) == {3, 50, 80, 81}
    assert _choose_images(100, at, ["a", "b", "c", "c", "b"], most=10)[0].tolist() == images.tolist() == sorted(order)
    assert _choose_images(100, at, ["a", "b", "c", "c", "b"], most=10, seed=1)[0].tolist() != images.tolist()
    assert _choose_images(100, at, ["a", "b", "c", "c", "b"], most=2)[0].tolist() == [3, 50, 80, 81]
    assert len(_choose_images(100, at[:0], [], most=200)[0]) == 100


def test_too_many_findings_take_turns(monkeypatch):
    monkeypatch.setattr(view, "_MAX_FLAGGED", 10)
    at = [Subject(k, -1, -1) for k in range(90)]
    images, flagged, _ = _choose_images(100, at, ["error"] * 3 + ["common"] * 85 + ["rare"] * 2, most=5)
    assert flagged == 90 and len(images) == 10 and {0, 1, 2, 88, 89} <= set(images.tolist())


# JPEGs

def test_jpegs_are_small_and_whole(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (700, 900, 3), np.uint8)
    for suffix in (".jpg", ".png", ".webp"):
        (tmp_path / f"n{suffix}").write_bytes(cv2.imencode(suffix, noise)[1].tobytes())
        small, large = _jpegs_of(tmp_path / f"n{suffix}", (700, 900), (320, 1280))
        sizes = [cv2.imdecode(np.frombuffer(b, np.uint8), 1).shape for b in (small, large)]
        assert sizes == [(249, 320, 3), (700, 900, 3)] and len(small) < 13_000 and len(large) < 96_000
    assert cv2.imdecode(np.frombuffer(_jpeg_within(np.zeros((1, 4000, 3), np.uint8), 320), np.uint8),
                        1).shape == (1, 320, 3)


def test_reduced_decoding_is_used_and_right(tmp_path, monkeypatch):
    img = np.zeros((1600, 2400, 3), np.uint8)
    img[400:800, 600:1800] = 200
    cv2.imwrite(str(tmp_path / "a.jpg"), img)
    seen, decode = [], cv2.imdecode
    monkeypatch.setattr(view.cv2, "imdecode", lambda data, flags: seen.append(decode(data, flags)) or seen[-1])
    small, = _jpegs_of(tmp_path / "a.jpg", (1600, 2400), (300,))
    assert [v.shape for v in seen] == [(200, 300, 3)]
    got = decode(np.frombuffer(small, np.uint8), 0)
    assert np.abs(got.astype(int) - cv2.resize(img[..., 0], (300, 200), interpolation=cv2.INTER_AREA)).mean() < 2


def test_what_cannot_be_decoded_is_empty(tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no picture")
    for name in ("empty.jpg", "text.jpg", "nowhere.jpg", "nul\0.jpg"):
        assert _jpegs_of(tmp_path / name, (10, 10), (320, 640)) == [b"", b""]
    assert _jpegs_of(tmp_path / "text.jpg", (40_000, 40_000), (320,)) == [b""] # said to be huge: not even opened


def test_deep_gray_and_turned_images(tmp_path):
    deep = np.zeros((60, 80), np.uint16)
    deep[:, 40:] = 60_000
    cv2.imwrite(str(tmp_path / "deep.png"), deep)
    got = cv2.imdecode(np.frombuffer(_jpegs_of(tmp_path / "deep.png", (60, 80), (320,))[0], np.uint8), 1)
    assert got[:, :38].mean() < 5 and got[:, 42:].mean() > 225
    jpeg = cv2.imencode(".jpg", np.zeros((60, 80, 3), np.uint8))[1].tobytes()
    tiff = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    (tmp_path / "turned.jpg").write_bytes(jpeg[:2] + b"\xff\xe1" + (len(tiff) + 2).to_bytes(2, "big") + tiff + jpeg[2:])
    assert cv2.imread(str(tmp_path / "turned.jpg")).shape == (80, 60, 3) # the note is there
    assert cv2.imdecode(np.frombuffer(_jpegs_of(tmp_path/"turned.jpg", (80, 60), (320, ))[0], np.uint8),
                        1).shape == (80, 60, 3)


def test_each_file_is_read_once_and_the_page_has_an_end(tmp_path, monkeypatch):
    n = 100
    noise = np.random.default_rng(0).integers(0, 255, (330, 450, 3), np.uint8)
    for k in range(n):
        (tmp_path / f"{k}.jpg").write_bytes(cv2.imencode(".jpg", np.roll(noise, k, 1), [1, 60])[1].tobytes())
    ds = DetDataset(tmp_path, ("a",), [f"{k}.jpg" for k in range(n)], [(330, 450)] * n)
    reads, fromfile = [], np.fromfile
    monkeypatch.setattr(view.np, "fromfile", lambda path, dtype: reads.append(str(path)) or fromfile(path, dtype))
    monkeypatch.setattr(view, "_MIN_PAGE_BYTES", 0)
    calls = []
    flaws = [Flaw("warning", "odd", f"{k}.jpg", "", "odd", "noted") for k in (90, 7)]
    page = write_view(ds, tmp_path / "page.html", CheckReport("d", ds, flaws), progress=lambda *v: calls.append(v))
    assert len(reads) == len(set(reads)) == n and calls[-1] == (n, n) and len(calls) == n
    larger = set(map(int, re.findall(rb'id="l(\d+)"', page.read_bytes())))
    assert {7, 90} <= larger and 10 < len(larger) < n and page.stat().st_size < n * 20_000 + 80_000
    monkeypatch.setattr(view, "_MIN_PAGE_BYTES", 20_000_000)
    assert len(_make_jpegs(ds, list(range(n)))[1]) == n


# The file

def test_the_data_in_the_page(tmp_path):
    ds = dataset(tmp_path / "d")
    page = write_view(ds, tmp_path / "new folder/page.html", report_of(ds), (320, 416))
    d = data_of(page)
    assert [im["path"] for im in d["images"]] == ds.paths.tolist()
    assert (d["tab"], d["input_size"], d["share"]) == ("images", [320, 416], "")
    assert np.allclose(np.concatenate([im["boxes"] for im in d["images"] if im["boxes"]]), ds.boxes, atol=.006)
    sizes = np.concatenate([im["sizes"] for im in d["images"]])
    assert (np.digitize(sizes, d["edges"]) == np.digitize(sizes_at_input(ds, (320, 416)), d["edges"])).all()
    assert sum(sum(im["flags"]) for im in d["images"]) == ds.flags.sum()
    texts = [a["text"] for im in d["images"] for a in im["attributes"].values()]
    assert texts == [t for t in ds.attributes["text"] if t]
    assert {k["kind"]: (k["severity"], k["count"], k["images"], k["shown"]) for k in d["kinds"]} == {
        "zero-area": ("error", 1, 1, 1),
        "duplicate-image": ("warning", 1, 2, 2),
        "tiny": ("warning", 1, 1, 1),
        "missing-image": ("warning", 1, 0, 0),
        "no-labels": ("note", 1, 1, 1),
        "unused-class": ("note", 1, 0, 0),
    }
    severities = [k["severity"] for k in d["kinds"]]
    assert severities == sorted(severities, key=["error", "warning", "note"].index)
    assert {c["name"]: c["boxes"] for c in d["classes"]} == ds.class_counts()
    assert [c["images"] for c in d["classes"]] == [len(set(ds.box_image[ds.labels == k].tolist())) for k in range(3)]
    assert [(s["name"], s["images"], s["empty"]) for s in d["splits"]] == [("train", 8, 2), ("val", 4, 2)]
    for k in (1, 6): assert np.abs(jpeg_of(page, f"t{k}").astype(int) - ds.image(k)).mean() < 4
    assert page.read_bytes() == write_view(ds, tmp_path/"again.html", report_of(ds).to_dict(), (320, 416)).read_bytes()


def test_sizes_keep_their_side_of_an_edge(tmp_path):
    at_edges = np.repeat(view._EDGES, 3) + np.tile([-.001, 0, .001], 5)
    side = np.concatenate([np.random.default_rng(0).uniform(1, 90, 400), at_edges])
    boxes = np.c_[side * 0, side * 0, side, side]
    ds = DetDataset(tmp_path, ("a",), ["a.jpg"], [(416, 416)], [0] * len(side), boxes, [0] * len(side))
    sizes = data_of(write_view(ds, tmp_path / "p.html"))["images"][0]["sizes"]
    want = sizes_at_input(ds, (416, 416))
    assert (np.digitize(sizes, view._EDGES) == np.digitize(want, view._EDGES)).all()
    assert np.abs(np.array(sizes) - side).max() < .011


def test_a_part_of_a_dataset_is_named_as_one(tmp_path):
    ds = dataset(tmp_path / "d")
    d = data_of(write_view(ds, tmp_path / "p.html", report_of(ds), most=6))
    assert len(d["images"]) == 6
    assert d["share"] == "6 of 12 images are on this page: all 5 with findings, and a sample of the others (seed 0)"
    paths = [d["images"][f["image"]]["path"] if f["image"] >= 0 else "" for f in d["findings"]]
    assert paths == [ds.paths[2], ds.paths[7], ds.paths[5], "", ds.paths[11], ""]
    assert d["images"][d["findings"][1]["other"]]["path"] == ds.paths[1]
    assert sum(c["boxes"] for c in d["classes"]) == len(ds.boxes)
    assert data_of(write_view(ds, tmp_path / "p.html", most=3))["share"].endswith("a sample (seed 0)")
    assert len(data_of(write_view(ds, tmp_path / "p.html", report_of(ds), most=0))["images"]) == 5


def test_findings_of_the_reader_are_shown_without_a_report(tmp_path):
    flaw = Flaw("warning", "zero-area", "cam0/002.png", "box 1", "cam0/002.png: box 1 has no area", "dropped")
    ds = dataset(tmp_path / "d", flaws=[flaw])
    f, = data_of(write_view(ds, tmp_path / "p.html"))["findings"]
    assert (f["image"], f["box"], f["kind"]) == (2, 0, "zero-area") and f["advice"]


def test_a_real_check_finds_pairs_and_boxes(tmp_path, monkeypatch):
    monkeypatch.setenv("JETSON_DET_CACHE", str(tmp_path / "cache"))
    folder = write_scenes(tmp_path / "d", 12, (120, 160), seed=3, splits={"train": .5, "val": .5})
    labels = json.loads((folder / "annotations/train.json").read_text())
    flat = labels["annotations"][-1]
    flat["bbox"][2] = 0
    (folder / "annotations/train.json").write_text(json.dumps(labels))
    train, val = (sorted((folder / "images" / s).iterdir()) for s in ("train", "val"))
    shutil.copy(train[2], val[3])
    d = data_of(write_check_page(check_dataset(folder), tmp_path / "p.html"))
    pair, = (f for f in d["findings"] if f["other"] >= 0)
    paths = {d["images"][pair[k]]["path"] for k in ("image", "other")}
    assert paths == {f"images/train/{train[2].name}", f"images/val/{val[3].name}"}
    found, = (f for f in d["findings"] if f["kind"] == "zero-area")
    box = d["images"][found["image"]]["boxes"][found["box"]]
    assert np.allclose(box, [*flat["bbox"][:2], flat["bbox"][0], flat["bbox"][1] + flat["bbox"][3]], atol=.01)


def test_check_page_of_what_cannot_be_read(tmp_path):
    flaw = Flaw("error", "unreadable", "somewhere/d", "", "labels.json, line 3: not valid JSON", "stops")
    page = write_check_page(CheckReport("somewhere/d", None, [flaw]), tmp_path / "p.html")
    d = data_of(page)
    assert d["tab"] == "findings" and not d["images"]
    assert d["findings"][0]["message"].startswith("labels.json, line 3")
    assert b"Check of d" in page.read_bytes()


@pytest.mark.parametrize(
    "kw",
    [dict(input_size=(0, 5)), dict(input_size=(416,)), dict(most=-1), dict(thumb=8), dict(thumb=9999)])
def test_wrong_settings(tmp_path, kw):
    ds = dataset(tmp_path / "d", 3)
    with pytest.raises(InputError) as e: write_view(ds, tmp_path / "p.html", **kw)
    assert "\n" not in str(e.value) and not (tmp_path / "p.html").exists()


ODD = ("</script><script>window.hacked=1</script>", "<img src=x onerror=window.hacked=1>",
       "日本語 & \"quotes\" 'n' \u202eright to left\u2028line")
ODD_FILES = [
    "<b>bold.png", "a&amp;b \"q\" 'r'.png", "шум #1 100%.png", "</script><script>window.hacked=1<",
    "\udcff not text.png", "$& ${x} {{y}}.png"
]


def odd_dataset(root):
    return dataset(root, 6, classes=ODD, names=[n.replace("/", "\u2215") if "script" in n else n for n in ODD_FILES])


def test_odd_names_are_data(tmp_path):
    ds = odd_dataset(tmp_path / "<i>d")
    flaws = [
        Flaw("warning", "<u>kind", ds.paths[k], "box 1", f"{ds.paths[k]}: <u>x</u>", "</script>") for k in range(6)
    ]
    page = write_check_page(CheckReport(str(ds.root), ds, flaws), tmp_path / "p.html")
    text = page.read_text("ascii")
    d = data_of(page)
    assert [c["name"] for c in d["classes"]] == list(ODD)
    assert [im["path"] for im in d["images"]] == ds.paths.tolist()
    assert d["findings"][0]["action"] == "</script>"
    assert text.count("</script>") == text.count("<script") == 2 + 6
    for tag in ("<img", "<i>d", "<u>"): assert tag not in text


def test_nothing_points_elsewhere(tmp_path):
    text = write_view(dataset(tmp_path / "d", 3), tmp_path / "p.html").read_text("ascii")
    assert set(re.findall(r"[a-z]+://[^\s\"'`)]*", text)) == {"http://www.w3.org/2000/svg"}
    assert "innerHTML" not in text and not re.search(r"\burl\(|@import|\beval\(|\bfetch\(|XMLHttp", text)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'; img-src data:") and "unsafe" not in policy


# A real browser

def free_browser(folder, *options):
    "Chromium under the driver."
    selenium = pytest.importorskip("selenium", reason="selenium is not installed")
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service
    programs = [shutil.which(p) for p in ("chromium", "chromedriver")]
    if None in programs: pytest.skip("no chromium or no chromedriver here")
    o = Options()
    o.binary_location = programs[0]
    for a in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
              "disable-background-networking", "disable-component-update", "disable-sync", "disable-dev-shm-usage",
              "window-size=1400,900", f"user-data-dir={folder}", *options):
                  o.add_argument("--" + a)
    o.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=o, service=Service(programs[1]))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    b = free_browser(tmp_path_factory.mktemp("profile"))
    yield b
    b.quit()


class Page:
    "A page in the browser, with what the tests ask of it."
    def __init__(self, driver, path):
        self.driver = driver
        for kind in ("browser", "performance"): driver.get_log(kind)
        driver.get(Path(path).as_uri())

    def js(self, code, *args): return self.driver.execute_script(code, *args)

    def until(self, code, *args):
        "Wait for a JavaScript expression to be true; its value."
        for _ in range(100):
            value = self.js("return " + code, *args)
            if value: return value
            time.sleep(.05)
        raise AssertionError(f"never true: {code}")

    def find(self, css): return self.driver.find_element("css selector", css)
    def names(self):
        return self.js("return [...document.querySelectorAll('#grid .card')].map(c => data.images[+c.dataset.i].path)")
    def tick(self, group, value):
        self.js("document.querySelector(`[data-group=${arguments[0]}] [data-value='${arguments[1]}'] input`).click()",
                group, value)
    def counts(self, group):
        return self.js(
            "return Object.fromEntries([...document.querySelectorAll(`[data-group=${arguments[0]}] .option`)].map(o =>"
            " [o.dataset.value, +o.querySelector('.count').textContent.replace(/,/g, '')]))",
            group,
        )
    def keys(self, *keys):
        "As from a keyboard: to whatever has the focus."
        from selenium.webdriver import ActionChains
        for key in keys: ActionChains(self.driver).send_keys(key).perform()

    def quiet(self):
        "No message on the console, nothing asked of anybody but the file itself."
        assert self.driver.get_log("browser") == []
        events = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        asked = {
            e["params"]["request"]["url"].split(",")[0][:40]
            for e in events
            if e["method"] == "Network.requestWillBeSent" and e["params"]["documentURL"].startswith("file:")
        }
        assert asked and all(u.startswith(("file:///", "data:image/jpeg;base64", "data:")) for u in asked), asked


@pytest.fixture
def open_page(chromium):
    pages = []
    def opened(path):
        pages.append(Page(chromium, path))
        return pages[-1]
    yield opened
    for p in pages[-1:]: p.quiet()


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shown")
    ds = dataset(folder / "d")
    return ds, write_view(ds, folder/"view.html", report_of(ds)), write_check_page(report_of(ds), folder/"check.html")


def boxes_by_image(ds):
    "For each image, of each box: corners, label, flags, size at the input."
    sizes = sizes_at_input(ds, (416, 416))
    columns = [[*ds.boxes_of(i), sizes[ds.box_image == i]] for i in range(len(ds))]
    return [list(zip(*(column.tolist() for column in of_image))) for of_image in columns]


def path_of(box):
    "A box as the page draws it."
    return "M{:g} {:g}H{:g}V{:g}H{:g}Z".format(*box, box[0])


@pytest.mark.browser
def test_filters(open_page, shown):
    ds, page, _ = shown
    p = open_page(page)
    per = boxes_by_image(ds)
    where = lambda ok: sorted(ds.paths[i] for i in range(len(ds)) if ok(i, per[i]))
    assert p.names() == sorted(ds.paths, key=lambda n: n) and p.find("#found").text == "12 images"
    assert p.counts("label") == {str(k): len(where(lambda i, b: any(x[1] == k for x in b))) for k in range(3)}
    p.tick("label", 1)
    assert sorted(p.names()) == where(lambda i, b: any(x[1] == 1 for x in b)) and "of 12" in p.find("#found").text
    p.tick("size", 3) # 16 to 32 pixels: of the same box
    assert sorted(p.names()) == where(lambda i, b: any(x[1] == 1 and 16 <= x[3] < 32 for x in b))
    def with_label(k): return len(where(lambda i, b: any(x[1] == k and 16 <= x[3] < 32 for x in b)))
    def with_size(s): return len(where(lambda i, b: any(x[1] == 1 and np.digitize(x[3], view._EDGES) == s for x in b)))
    assert p.counts("label") == {str(k): with_label(k) for k in range(3)}
    assert p.counts("size") == {**{str(s): with_size(s) for s in range(6)}, "none": 0}
    for group, value in (("label", 1), ("size", 3), ("size", "none")): p.tick(group, value)
    assert sorted(p.names()) == where(lambda i, b: not b)
    p.find("#clear").click()
    assert len(p.names()) == 12 and p.find("#summary").get_attribute("textContent") == "Filters"
    for group, value in (("split", "val"), ("flag", CROWD), ("flag", IGNORE)): p.tick(group, value)
    assert sorted(p.names()) == where(lambda i, b: ds.splits[i] == "val" and any(x[2] for x in b)) != []
    p.find("#clear").click()
    p.tick("severity", "warning")
    flagged = [1, 5, 7]
    assert sorted(p.names()) == sorted(ds.paths[flagged])
    assert p.counts("kind") == {"zero-area": 0, "duplicate-image": 2, "tiny": 1, "no-labels": 0}
    assert p.counts("split") == {s: int((ds.splits[flagged] == s).sum()) for s in ("train", "val")}
    assert p.counts("severity") == {"error": 1, "warning": 3, "note": 1}
    p.tick("kind", "tiny")
    assert p.names() == [ds.paths[5]]
    p.find("#clear").click()
    p.find("#text").send_keys("CAM1/00")
    assert sorted(p.names()) == where(lambda i, b: ds.paths[i].startswith("cam1/00"))
    p.find("#text").send_keys("zzz")
    assert p.names() == [] and p.find("#nothing").is_displayed()
    p.find("#clear2").click()
    p.find("#text").send_keys("no 3") # a box's attribute
    assert p.names() == [ds.paths[i] for i in range(12) if "no 3" in ds.attributes["text"][ds.box_image == i]]


@pytest.mark.browser
def test_orders(open_page, shown):
    ds, page, _ = shown
    p = open_page(page)
    per = boxes_by_image(ds)
    index = {n: i for i, n in enumerate(ds.paths.tolist())}
    def order(name):
        p.js("const s = document.getElementById('sort'); s.value = arguments[0]; s.dispatchEvent(new Event('change'))",
             name)
        return [index[n] for n in p.names()]
    counts = [len(per[i]) for i in order("boxes")]
    assert counts == sorted(counts, reverse=True)
    least = [min((b[3] for b in per[i]), default=np.inf) for i in order("small")]
    assert least == sorted(least)
    assert order("findings")[:5] == [2, 1, 5, 7, 11] # the error, the warnings, the note


def painted(png, paint):
    "The outline, in pixels of a screenshot, of what has a color: x1, y1, x2, y2."
    img = cv2.imdecode(np.frombuffer(png, np.uint8), 1).astype(int)
    ys, xs = np.nonzero(np.abs(img - paint).max(2) < 40)
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])


@pytest.mark.browser
def test_enlarged_boxes_lie_on_what_they_are_of(open_page, shown):
    ds, page, _ = shown
    p = open_page(page)
    i = 9 # one box
    (box,), (label,), _ = ds.boxes_of(i)
    p.js("[...document.querySelectorAll('.card')].find(c => +c.dataset.i === arguments[0]).click()", i)
    p.until("document.querySelector('#boxes path.box') && document.querySelector('#drawing image')")
    assert p.js("return document.querySelector('#boxes path.box').getAttribute('d')") == path_of(box)
    rect = "const r = e => { const b = e.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; }; "
    stage, line = (np.array(p.js(rect + f"return r(document.querySelector('{css}'))"))
                   for css in ("#stage", "#boxes path.box"))
    p.keys("b") # without boxes: the image alone
    time.sleep(.3)
    found = painted(p.find("#stage").screenshot_as_png, PAINT[label]) + np.tile(stage[:2], 2)
    assert np.abs(found - line).max() <= 3, (found, line)
    scale = (line[2] - line[0]) / (box[2] - box[0])
    assert scale > 2
    p.keys("b", "z")
    p.keys("+")
    p.js("selectBox(0); zoomToBox()")
    closer = np.array(p.js(rect + "return r(document.querySelector('#boxes path.box'))"))
    assert closer[2] - closer[0] > 1.5 * (line[2] - line[0])
    middle = (stage[:2] + stage[2:]) / 2
    assert np.abs((closer[:2] + closer[2:]) / 2 - middle).max() < 2
    p.keys("0")
    assert np.abs(np.array(p.js(rect + "return r(document.querySelector('#boxes path.box'))")) - line).max() < .5


@pytest.mark.browser
def test_the_panel_of_an_image(open_page, shown):
    ds, page, _ = shown
    p = open_page(page)
    p.js("[...document.querySelectorAll('.card')].find(c => +c.dataset.i === 2).click()")
    text = p.find("#panel").text
    for part in (ds.paths[2], "240 x 180 px; at the input 416 x 312", "split val", "2 boxes", "zero-area",
                 "box 2 has no area", "draw the box again"):
        assert part in text
    rows = p.js(
        "return [...document.querySelectorAll('#panel tbody tr')].map(r => [...r.cells].map(c => c.innerText.trim()))")
    for (_, name, pixels, at_input), b, l, f in zip(rows, *ds.boxes_of(2)):
        name, *tags = name.split("\n")
        want = [word for bit, word in ((CROWD, "crowd"), (IGNORE, "ignore")) if f & bit]
        assert name == ds.classes[l] and [tag for tag in tags if ":" not in tag] == want
        assert pixels == "{:g} x {:g}".format(b[2] - b[0], b[3] - b[1])
        assert np.allclose([float(v) for v in at_input.split(" x ")], (b[2:] - b[:2]) * 416 / 240, atol=.06)
    p.find("#panel .finding button").click()
    assert p.js(
        "return [viewer.box, document.querySelector('#panel tr.selected').dataset.box,"
        " document.querySelectorAll('#boxes g.selected').length]"
    ) == [1, "1", 1]


@pytest.mark.browser
def test_a_click_on_a_box_chooses_the_smallest_there(open_page, shown):
    from selenium.webdriver import ActionChains
    ds, page, _ = shown
    p = open_page(page)
    i = 7
    p.js("[...document.querySelectorAll('.card')].find(c => +c.dataset.i === arguments[0]).click()", i)
    p.until("document.querySelectorAll('#boxes path.box').length === 3")
    boxes = ds.boxes_of(i)[0]
    k = int(np.argmin((boxes[:, 2:] - boxes[:, :2]).prod(1)))
    x, y = p.js(
        "const r = document.querySelectorAll('#boxes path.box')[arguments[0]].getBoundingClientRect(), s ="
        " document.getElementById('stage').getBoundingClientRect();return [(r.left + r.right - s.left - s.right) / 2,"
        " (r.top + r.bottom - s.top - s.bottom) / 2]",
        k,
    )
    ActionChains(p.driver).move_to_element_with_offset(p.find("#stage"), int(x), int(y)).click().perform()
    assert p.js("return viewer.box") == k
    before = p.js("return [...viewer.view]")
    ActionChains(p.driver).move_to_element_with_offset(p.find("#stage"), 0,
                                                       0).click_and_hold().move_by_offset(60, 30).release().perform()
    # dragging moves, and chooses nothing
    assert p.js("return viewer.view[0]") < before[0] and p.js("return viewer.box") == k
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
    at = lambda: p.js(
        "const m = document.getElementById('drawing').getScreenCTM(); return [m.a, (arguments[0] - m.e) / m.a]", x)
    stage = p.find("#stage").rect
    x = stage["x"] + stage["width"] / 2 + 50
    (scale, pixel) = at()
    ActionChains(p.driver).scroll_from_origin(ScrollOrigin.from_element(p.find("#stage"), 50, 0), 0, -400).perform()
    p.until(f"document.getElementById('drawing').getScreenCTM().a > {scale * 1.3}")
    assert abs(at()[1] - pixel) < 1 # what is under the pointer stays there


@pytest.mark.browser
def test_keyboard(open_page, shown):
    from selenium.webdriver.common.keys import Keys
    ds, page, _ = shown
    p = open_page(page)
    p.keys("/")
    assert p.js("return document.activeElement.id") == "text"
    p.js("document.querySelectorAll('.card')[0].focus()")
    p.keys(Keys.ENTER)
    assert p.js("return document.getElementById('viewer').open")
    p.keys(Keys.ARROW_RIGHT)
    p.keys(Keys.ARROW_RIGHT)
    assert p.names()[2] in p.find("#panel h2").text and "3 of 12" in p.find("#panel").text
    p.keys(Keys.ARROW_DOWN)
    assert p.js("return viewer.box") == (0 if len(ds.boxes_of(ds.paths.tolist().index(p.names()[2]))[0]) else -1)
    p.keys(Keys.ARROW_LEFT)
    assert "2 of 12" in p.find("#panel").text
    p.keys(Keys.ESCAPE)
    p.until("!document.getElementById('viewer').open")
    assert p.js("return document.activeElement.classList.contains('card')")
    p.js("document.getElementById('tab-images').focus()")
    p.keys(Keys.ARROW_LEFT)
    assert p.find("#findings").is_displayed() and p.js("return document.activeElement.id") == "tab-findings"


@pytest.mark.browser
def test_thumbnails_show_boxes_where_they_are(open_page, shown):
    ds, page, _ = shown
    p = open_page(page)
    p.until("document.querySelectorAll('#grid .pic img').length >= 8")
    got = p.js("""
        const cards = [...document.querySelectorAll('#grid .card')].filter(c => c.querySelector('img'));
        return cards.map(c => {
            const s = c.querySelector('svg');
            const r = s.getBoundingClientRect();
            const i = c.querySelector('img').getBoundingClientRect();
            const paths = [...s.querySelectorAll('path.box')];
            const boxes = paths.map(e => [+e.dataset.label, e.getAttribute('d'), e.classList.contains('dashed')]);
            const same = ['left', 'width', 'top', 'height'].every(k => r[k] === i[k]);
            return [+c.dataset.i, s.getAttribute('viewBox'), boxes, same];
        })""")
    for i, box, paths, same in got:
        assert box == "0 0 240 180" and same
        want = sorted((l, path_of(b), bool(f)) for b, l, f in zip(*ds.boxes_of(i)))
        assert sorted((l, "M" + part, dashed) for l, d, dashed in paths for part in d.split("M")[1:]) == want
    p.tick("label", 0)
    faint = p.js(
        "return [...document.querySelectorAll('#grid .card')].filter(c => c.querySelector('img')).flatMap(c =>"
        " [...c.querySelectorAll('path.box')].map(e => [+e.dataset.label, e.parentNode.getAttribute('class')]))"
    )
    assert faint and all((c == "plain") == (l == 0) for l, c in faint)


@pytest.mark.browser
def test_the_check_page(open_page, shown):
    ds, _, page = shown
    p = open_page(page)
    assert p.find("#findings").is_displayed() and not p.find("#images").is_displayed()
    for part in ("1 error", "3 warnings", "2 notes"): assert part in p.find("#verdict").text
    rows = p.js("return [...document.querySelectorAll('#kinds tbody tr')].map(r => [...r.cells].map(c => c.innerText))")
    _, finding, *others = rows[0]
    assert finding.startswith("zero-area\n") and "draw the box again" in finding
    assert others == ["1", "1", "dropped"]
    cells = "[...document.querySelectorAll('#classes tbody tr')].map(r => [...r.cells].map(c => c.innerText))"
    table = p.js("return " + cells)
    def n_images(name): return len(set(ds.box_image[ds.labels == ds.classes.index(name)].tolist()))
    by_boxes = sorted(ds.class_counts().items(), key=lambda item: -item[1])
    assert [[cell.strip() for cell in row[:3]] for row in table] == [[c, str(n), str(n_images(c))] for c, n in by_boxes]
    p.js("document.querySelector('[data-kind=zero-area].kind').scrollIntoView()")
    p.until("document.querySelector('[data-kind=zero-area].kind .focus path.box')")
    b = ds.boxes_of(2)[0][1]
    drawn = p.js("return document.querySelector('[data-kind=zero-area].kind .focus path.box').getAttribute('d')")
    assert drawn == path_of(b)
    pair = p.find("[data-kind=duplicate-image].kind .two").find_elements("css selector", "button")
    assert [e.get_attribute("data-i") for e in pair] == ["7", "1"] and abs(pair[0].rect["y"] - pair[1].rect["y"]) < 1
    assert "gone.jpg is not there" in p.find("[data-kind=missing-image].kind").text
    p.find("[data-kind=duplicate-image].kind .all").click()
    assert p.find("#images").is_displayed() and sorted(p.names()) == sorted(ds.paths[[1, 7]])
    p.js("document.querySelector('.card').click()")
    assert "show the other" in p.find("#panel").text


@pytest.mark.browser
def test_nothing_found_and_nothing_read(open_page, tmp_path):
    ds = dataset(tmp_path / "d", 3)
    p = open_page(write_check_page(CheckReport("d", ds, []), tmp_path / "clean.html"))
    assert "Nothing was found" in p.find("#verdict").text
    p.quiet()
    flaw = Flaw("error", "unreadable", "d", "", "x.json, line 3: not valid JSON", "stops")
    p = open_page(write_check_page(CheckReport("d", None, [flaw]), tmp_path / "broken.html"))
    assert "x.json, line 3" in p.find("#findings").text and not p.find("#tab-images").is_displayed()


@pytest.mark.browser
def test_odd_names_do_nothing(open_page, tmp_path):
    ds = odd_dataset(tmp_path / "<i>d")
    flaws = [
        Flaw("warning", "<u>kind", ds.paths[k], "box 1", f"{ds.paths[k]}: <u>x</u>", "</script>") for k in range(6)
    ] + [Flaw("note", "' \" `", "", "", ODD[0], "")]
    p = open_page(write_check_page(CheckReport(str(ds.root), ds, flaws), tmp_path / "p.html"))
    p.js("document.getElementById('tab-images').click()")
    shown = json.loads(
        p.js("return JSON.stringify([...document.querySelectorAll('.card .name')].map(e => e.textContent))"))
    assert sorted(shown) == sorted(ds.paths)
    options = p.js("return [...document.querySelectorAll('[data-group=label] .name')].map(e => e.textContent)")
    assert set(options) == {ODD[k] for k in np.unique(ds.labels)}
    p.js("document.querySelectorAll('.card')[3].click()")
    assert p.js(
        "return [window.hacked === undefined, document.querySelectorAll('b b, u, i, img[src=x]').length,"
        " document.title]"
    ) == [True, 0, "Check of <i>d"]


@pytest.mark.browser
def test_images_that_cannot_be_decoded_are_named(open_page, tmp_path):
    ds = dataset(tmp_path / "d", 4)
    (ds.root / ds.paths[1]).write_bytes(b"broken")
    os.remove(ds.root / ds.paths[2])
    p = open_page(write_view(ds, tmp_path / "p.html"))
    p.until("document.querySelectorAll('.lost').length === 2")
    p.js("[...document.querySelectorAll('.card')].find(c => +c.dataset.i === 1).click()")
    assert "could not be decoded" in p.find("#panel").text


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(open_page, shown, scheme):
    p = open_page(shown[2])
    p.driver.execute_cdp_cmd("Emulation.setEmulatedMedia",
                             {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    try:
        pairs = p.js("""
            const out = [];
            const texts = 'h1, #subtitle, nav button, #verdict span, #kinds td, #kinds td *, .kind p, .kind .soft, th, '
                + 'footer p';
            for (const e of document.querySelectorAll(texts)) {
                if (!e.textContent) continue;
                let g = e;
                while (getComputedStyle(g).backgroundColor === 'rgba(0, 0, 0, 0)') g = g.parentElement;
                out.push([getComputedStyle(e).color, getComputedStyle(g).backgroundColor, e.textContent.slice(0, 30)]);
            }
            return out;""")
    finally: p.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    def light(c):
        v = np.array([float(x) for x in re.findall(r"[\d.]+", c)[:3]]) / 255
        return np.where(v > .04045, ((v + .055) / 1.055) ** 2.4, v / 12.92) @ [.2126, .7152, .0722]
    grounds = {light(b) > .5 for _, b, _ in pairs}
    assert len(pairs) > 20 and grounds == {scheme == "light"}
    for ink, ground, text in pairs:
        a, b = sorted((light(ink), light(ground)))
        assert (b + .05) / (a + .05) >= 4.5, (ink, ground, text)


@pytest.mark.browser
def test_on_a_phone(open_page, shown):
    p = open_page(shown[2])
    p.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                             {"width": 380, "height": 760, "deviceScaleFactor": 2, "mobile": True})
    try:
        p.driver.refresh()
        for action in ("", "document.getElementById('tab-images').click()",
                       "document.getElementById('filters').open = true", "document.querySelector('.card').click()"):
            p.js(action)
            time.sleep(.2)
            assert p.js("return [document.documentElement.scrollWidth, innerWidth]") == [380, 380], action
            if "tab" in action: assert not p.find("#text").is_displayed() # the filters are folded
        stage = p.find("#stage").rect
        panel = p.find("#panel").rect
        assert stage["width"] == panel["width"] == 380 and panel["y"] >= stage["height"] > 300
    finally: p.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.browser
def test_a_thousand_images_open_at_once(open_page, tmp_path):
    n = 1000
    rng = np.random.default_rng(0)
    jpeg = cv2.imencode(".jpg", cv2.GaussianBlur(rng.integers(0, 255, (240, 320, 3), np.uint8), (0, 0), 3),
                        [1, 90])[1].tobytes().ljust(11_000, b"\0")
    images = [
        dict(path=f"{k:04}.jpg", width=320, height=240, split="train", group="",
             boxes=(rng.random((8, 2)) * 100).repeat(2, 0).reshape(8, 4).tolist(),
             labels=[k % 5] * 8, flags=[0] * 8, sizes=[20] * 8, attributes={})
        for k in range(n)
    ]
    classes = [dict(name=str(c), boxes=9, images=9, shown=9) for c in range(5)]
    data = dict(images=images, findings=[], kinds=[], classes=classes, splits=[], edges=[4, 8, 16, 32, 64],
                input_size=[416, 416], thumb=320, texts=False, tab="images", subtitle="", share="", foot="")
    (tmp_path / "p.html").write_bytes(page_html("thousand", data, [jpeg] * n, {}))
    p, took = None, []
    for _ in range(3):
        p = open_page(tmp_path / "p.html")
        took.append(p.until("performance.getEntriesByType('navigation')[0].loadEventEnd"))
    print(f"1000 images, {(tmp_path / 'p.html').stat().st_size / 1e6:.1f} MB: {min(took):.0f} ms")
    assert min(took) < 3000 # a second on a machine that does nothing else
    # only what is near the window is filled
    assert len(p.names()) == n and p.until("document.querySelectorAll('#grid img').length") < 100
    p.js("window.scrollTo(0, document.body.scrollHeight)")
    p.until("[...document.querySelectorAll('#grid .card')].pop().querySelector('img')")
    assert p.js("const t = performance.now(); filters.label.add(3); applyFilters(); return performance.now() - t"
                ) < 1000 and len(p.names()) == n // 5


# Real data

@pytest.mark.data
def test_real_data(data, tmp_path):
    report = check_dataset(data / "datasets/bccd")
    page = write_check_page(report, tmp_path / "p.html")
    d = data_of(page)
    flat, = (k for k in d["kinds"] if k["kind"] == "zero-area")
    assert (flat["count"], flat["images"], flat["shown"]) == (2, 2, 2)
    assert len(d["images"]) == 364 and page.stat().st_size < 21e6
    for f in d["findings"]:
        if f["kind"] == "zero-area":
            x1, y1, x2, y2 = d["images"][f["image"]]["boxes"][f["box"]]
            assert x2 <= x1 or y2 <= y1
