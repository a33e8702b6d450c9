"The page of results and the report of a training: what strangers wrote is text, and nothing is lost when it fails."
import base64
import re
import warnings
from html.parser import HTMLParser
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from jetson_det.core import rng_for
from jetson_det.data.dataset import DetDataset
from jetson_det.data.formats.registry import read_dataset
from jetson_det.evaluate.coco import coco_stats
from jetson_det.evaluate import page as pages
from jetson_det.evaluate.charts import Curve, bar, line_chart, text_of
from jetson_det.evaluate.crops import crop, numbered, small_jpeg
from jetson_det.evaluate.page import result_plots, result_section, results_page, write_report, write_results
from jetson_det.evaluate.report import evaluation_report
from jetson_det.evaluate.plots import (_write, comparison_sheet, confusion_figure, contact_sheet, figure_bytes,
                                       plain_name, pr_figure)
from jetson_det.runtime.contract import preset
from jetson_det.runtime.geometry import as_detections
from jetson_det.runtime.outputs import is_own_output

HOSTILE = ("<script>alert(1)</script>", "a$b^{", "_hidden", "\x1b[31mred\nline", "\u65e5\u672c\u202e",
           "x" * 300, "50% $\\frac{", "'\"&amp;")


def evaluated(root, classes, n=5, size=(60, 90), name="{}.png", quality=.7):
    "Noise images with a box of each class, some of them found."
    rng = rng_for(31, len(classes))
    where = np.repeat(np.arange(n), len(classes))
    labels = np.tile(np.arange(len(classes)), n)
    xy = rng.uniform(0, 40, (len(where), 2))
    boxes = np.concatenate([xy, xy + rng.uniform(8, 20, (len(where), 2))], 1)
    paths = [name.format(i) for i in range(n)]
    for p in paths: cv2.imwrite(str(root / p), rng.integers(0, 256, (*size, 3), np.uint8))
    ds = DetDataset(root, classes, paths, [size] * n, where, boxes, labels)
    found = []
    for i in range(n):
        b, l, _ = ds.boxes_of(i)
        some = rng.random(len(b)) < quality
        found.append(as_detections(b[some], rng.uniform(.3, 1, some.sum()), rng.permutation(l[some])))
    return ds, coco_stats(ds, found)


class Elements(HTMLParser):
    "Tags, their attributes, and the text between them; each tag is closed."
    def __init__(self, page):
        super().__init__()
        self.tags = []
        self.text = ""
        self.open = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br"): self.open.append(tag)

    def handle_startendtag(self, tag, attrs): self.tags.append((tag, dict(attrs)))
    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, data): self.text += data


TAGS = {
    "html", "head", "meta", "link", "title", "style", "body", "a", "header", "h1", "dl", "dt", "dd", "main", "section",
    "h2", "h3", "p", "ol", "ul", "li", "b", "strong", "small", "span", "div", "table", "caption", "thead", "tbody",
    "tr", "th", "td", "figure", "figcaption", "img", "details", "summary", "br", "svg", "g", "path", "line", "rect",
    "text", "polyline"}


def check_page(text):
    "What holds of every page: it is well-formed, asks nobody for anything, and says what its images show."
    parsed = Elements(text)
    assert {tag for tag, _ in parsed.tags} <= TAGS
    assert not any(name.startswith("on") or name == "style" for _, attrs in parsed.tags for name in attrs)
    for tag, attrs in parsed.tags:
        if tag == "img": assert attrs["src"].startswith("data:image/") and len(attrs["alt"]) > 10
        if tag in ("a", "link"): assert attrs["href"].startswith(("#", "data:"))
        if tag == "svg": assert attrs.get("aria-hidden") == "true" or len(attrs["aria-label"]) > 20
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    assert "url(" not in style and "@import" not in style
    ids = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) and "main" in ids
    policy, = [a["content"] for tag, a in parsed.tags if "http-equiv" in a]
    assert policy.startswith("default-src 'none'")
    return parsed


def test_names_of_strangers_are_text(tmp_path):
    ds, result = evaluated(tmp_path, HOSTILE, name="<img src=x onerror=alert(2)> $a^{{$ {}.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots = result_plots(ds, result)
    assert [p.name for p in plots] == [
        "precision_recall.png", "confusion.png", "labels_and_detections.jpg", "worst.jpg"]
    section = result_section("val </h2><script>alert(3)</script>", result, plots)
    page = results_page("</title><script>alert(4)</script>", [("data", "<b>\udcff</b>")], [section])
    parsed = Elements(page.decode("ascii"))
    assert {tag for tag, _ in parsed.tags} <= TAGS
    assert [a["src"][:11] for tag, a in parsed.tags if tag == "img"] == ["data:image/"] * 4
    assert not any(name.startswith("on") for _, attrs in parsed.tags for name in attrs)
    assert "<script>alert(1)</script>" in parsed.text and "\\x1b[31mred\\nline" in parsed.text
    assert "\x1b" not in parsed.text and "\u202e" not in parsed.text
    policy, = [a["content"] for tag, a in parsed.tags if "http-equiv" in a]
    assert policy.startswith("default-src 'none'")


def test_every_class_is_in_the_legend(tmp_path):
    ds, result = evaluated(tmp_path, HOSTILE)
    text = "\n".join(t.get_text() for t in pr_figure(result).legends[0].get_texts())
    for name in HOSTILE: assert plain_name(name) in text
    assert "$" not in text.replace("\\$", "")
    assert len(plain_name("x" * 300)) == 24 and plain_name("a.jpg") == "a.jpg"


def test_plots_of_odd_results(tmp_path):
    "Nothing found, nothing wrong, many classes, one very wide image, an empty image, no image with boxes beyond one."
    ds, _ = evaluated(tmp_path, ("a", "b"), n=3)
    nothing = coco_stats(ds, [as_detections()] * 3)
    perfect = coco_stats(ds, [as_detections(b, np.ones(len(b)), l) for b, l, _ in map(ds.boxes_of, range(3))])
    for result in (nothing, perfect):
        assert all(len(p.data) > 1000 for p in result_plots(ds, result))
    assert contact_sheet(ds, perfect).axes[0].get_title() == "no mistakes"
    wide = tmp_path / "wide"
    wide.mkdir()
    assert len(result_plots(*evaluated(wide, tuple(f"class {k}" for k in range(40)), n=1, size=(20, 900)))) == 4
    ds, result = evaluated(tmp_path, tuple(f"class {k}" for k in range(40)), n=2)
    assert "15 of 40 classes" in confusion_figure(ds, result, most=15)._suptitle.get_text()


def test_a_few_false_boxes_are_pale(tmp_path):
    "Two of 42 boxes found are false: hardly darker than none, though they are all that the row holds."
    ds, _ = evaluated(tmp_path, ("a",), n=40)
    found = [as_detections(b, np.ones(len(b)), l) for b, l, _ in map(ds.boxes_of, range(40))]
    boxes, labels, _ = ds.boxes_of(0)
    assert len(boxes), "an image without a box proves nothing"
    far = np.float32([[0, 0, 3, 3], [0, 4, 3, 7]])
    found[0] = as_detections(np.concatenate([boxes, far]), np.ones(len(boxes) + 2), np.concatenate([labels, [0, 0]]))
    share = confusion_figure(ds, coco_stats(ds, found)).axes[0].images[0].get_array()
    assert share[0, 0] == 1 and share[1, 0] == pytest.approx(2 / (len(ds.boxes) + 2))


def test_names_on_a_sheet_do_not_overlap(tmp_path):
    ds, _ = evaluated(tmp_path, tuple(f"class {k}" for k in range(25)), n=2, size=(100, 160))
    result = coco_stats(ds, [as_detections()] * 2) # all are missed
    ax = contact_sheet(ds, result).axes[0]
    places = []
    for text in ax.texts: places.append((*text.get_position(), len(text.get_text())))
    assert 3 < len(places) < 25
    for k, (x, y, n) in enumerate(places):
        assert 0 <= x <= 480 - 6.5 * n and 13 <= y <= 300
        for u, v, m in places[:k]: assert abs(y - v) >= 13 or x + 6.5 * n <= u or u + 6.5 * m <= x


def test_figures_are_sharp_and_their_text_large_enough(tmp_path):
    ds, result = evaluated(tmp_path, ("a", "b"))
    sheet = cv2.imdecode(np.frombuffer(figure_bytes(comparison_sheet(ds, result), "jpg"), np.uint8), cv2.IMREAD_COLOR)
    assert 1200 <= sheet.shape[1] <= 1400
    for fig in (pr_figure(result), confusion_figure(ds, result), comparison_sheet(ds, result)):
        for ax in fig.axes: assert all(t.get_fontsize() >= 7 for t in (ax.title, ax.xaxis.label, *ax.texts))


def test_the_report_lies_in_the_run_and_is_no_data(tmp_path):
    ds, result = evaluated(tmp_path, ("a", "b"))
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    (run / "metrics.csv").write_text("epoch,loss,AP,AP50\n1,9,,\n2,8,.1,.2\n")
    page = write_report(run, "first", [], {"val": (ds, result), "test": (ds, result)})
    text = page.read_text()
    assert text.index("AP on test") < text.index("<h2>val") < text.index("<h2>Training")
    names = sorted(f.name for f in (run / "plots").iterdir() if f.name[0] != ".")
    assert len(names) == 9 and is_own_output(run / "plots") and is_own_output(page)
    for name in names: assert cv2.imread(str(run / "plots" / name)) is not None
    shown = [base64.b64decode(data) for data in re.findall(r"data:image/[a-z]+;base64,([^\"]+)", text)]
    for name in ("test_labels_and_detections.jpg", "training.png"):
        assert (run / "plots" / name).read_bytes() in shown
    assert text.index("What to do next") < text.index("<table>")
    check_page(text)
    (tmp_path / "labels.csv").write_text("filename,class,xmin,ymin,xmax,ymax\n" + "".join(
        f"{i}.png,a,1,1,20,20\n" for i in range(5)))
    assert len(read_dataset(tmp_path)) == 5 # the plots are not among the images


def trainer_of(run, report=True):
    from jetson_det.train.state import RunState
    lines = []
    state = RunState(run, 5, 100, samples=160, batches=20, batch_size=8, group=1)
    cfg = SimpleNamespace(train=SimpleNamespace(report=report), model=SimpleNamespace(name="yolox-nano"),
                          data=SimpleNamespace(path="photos", input_size=(96, 160)),
                          export=SimpleNamespace(confidence=.25))
    return SimpleNamespace(run=state, cfg=cfg, say=lines.append), lines


@pytest.mark.parametrize("error", [MemoryError(), OSError(28, "No space left on device"), KeyboardInterrupt(),
                                   ModuleNotFoundError("No module named 'matplotlib'")])
def test_a_report_that_fails_is_a_warning(tmp_path, monkeypatch, error):
    from jetson_det.evaluate import page
    from jetson_det.train.callbacks.report import Report
    ds, result = evaluated(tmp_path, ("a", "b"))
    trainer, lines = trainer_of(tmp_path)

    def fails(*args): raise error
    monkeypatch.setattr(page, "result_plots", fails)
    Report().after_results(trainer, {"val": (ds, result)})
    assert len(lines) == 1 and lines[0].startswith("warning: no report was made") and "run is complete" in lines[0]
    assert not (tmp_path / "report.html").exists()


def test_a_report_is_switched_off(tmp_path):
    from jetson_det.train.callbacks.report import Report
    ds, result = evaluated(tmp_path, ("a", "b"))
    trainer, lines = trainer_of(tmp_path, report=False)
    Report().after_results(trainer, {"val": (ds, result)})
    assert lines == [] and not (tmp_path / "report.html").exists() and not (tmp_path / "plots").exists()


def test_a_training_leaves_its_report(tmp_path, capsys):
    from jetson_det.train.loop import train
    from train_helpers import config, scenes
    data = scenes(tmp_path / "data", size=(64, 64))
    figures = train(config(data, "data.input_size=[64,64]", "train.epochs=1", "train.report=true"), tmp_path / "run")
    text = (tmp_path / "run" / "report.html").read_text()
    names = sorted(f.name for f in (tmp_path / "run" / "plots").iterdir() if f.name[0] != ".")
    assert "training.png" in names and "val_worst.jpg" in names
    assert text.index("What to do next") < text.index("AP on val") < text.index("<h2>Training")
    assert "whose input is 64x64" in text # the checkpoint's contract was read
    assert f"{figures['val']['stats']['AP']:.3f}" in text
    assert f"report: {tmp_path / 'run' / 'report.html'}" in capsys.readouterr().out


@pytest.fixture
def no_sheet(monkeypatch):
    "Without the sheet of labels beside detections, which has its own tests and takes longest."
    monkeypatch.setattr(pages, "comparison_sheet", lambda *args: None)
    monkeypatch.setattr(pages, "figure_bytes", lambda *args: b"\xff\xd8\xff")


def write_page(tmp_path, ds, result, **options):
    contract = preset("yolox", tuple(f"c{k}" for k in range(len(ds.classes))), (96, 160))
    report = evaluation_report(ds, result, contract, 100, **options)
    names = ("</title><script>a</script>", "<b>", "test")
    file = write_results(tmp_path / "page.html", *names, ds, result, contract, report)
    return report, file.read_text()


def test_the_decision_stands_first_and_strangers_are_text(tmp_path, no_sheet):
    "The whole page of a set whose classes and files have hostile names."
    ds, result = evaluated(tmp_path, HOSTILE, n=8, name="<img src=x onerror=alert(2)> $a^{{$ {}.png", quality=.5)
    report, text = write_page(tmp_path, ds, result, size=3_000_000)
    parsed = check_page(text)
    order = [text.index(f"<h2>{title}") for title in (
        "What to do next", "Classes", "What costs AP", "Sizes", "Taken for what", "Curves", "The worst images",
        "Labels that may be wrong", "Labels beside detections", "Speed and size", "How it was measured")]
    assert order == sorted(order) and order[0] < text.index("<table>")
    assert report.advice and text.index(f"{report.whole.value:.3f}") < text.index("<table>")
    assert "<script>alert(1)</script>" in parsed.text and "onerror=alert(2)" in parsed.text
    assert "\x1b" not in parsed.text and "\u202e" not in parsed.text and " nan" not in parsed.text
    assert len(text) < 3_000_000 and "3.00 MB" in text
    scrolls = [a for _, a in parsed.tags if a.get("class") == "scroll" and a.get("role") == "region"]
    assert scrolls and all(a["tabindex"] == "0" and (a.get("aria-label") or a["aria-labelledby"]) for a in scrolls)
    first = next(a for tag, a in parsed.tags if tag == "a")
    assert first["href"] == "#main" and first["class"] == "skip"


def test_a_page_of_a_large_set_is_bounded(tmp_path, no_sheet):
    "Hundreds of classes, noise that compresses badly, more mistakes than anyone reads: caps, and what they leave out."
    rng = rng_for(9)
    classes = tuple(f"class {k}" for k in range(120))
    ds, _ = evaluated(tmp_path, classes, n=10, size=(300, 450))
    found = []
    for i in range(10):
        corner = rng.uniform(0, 250, (120, 2))
        found.append(as_detections(np.hstack([corner, corner + 40]), rng.uniform(.3, 1, 120), rng.permutation(120)))
    _, text = write_page(tmp_path, ds, coco_stats(ds, found))
    check_page(text)
    assert len(text) < 3_000_000 and text.count("<tr") < 150
    assert "and 70 classes more" in text and "and 105 classes more" in text
    assert text.count("<img") <= 10 * 5 + 20 + 1


@pytest.mark.parametrize("what", ["nothing found", "a class without boxes", "all right", "images gone", "one image"])
def test_pages_of_odd_results(tmp_path, no_sheet, what):
    ds, result = evaluated(tmp_path, ("a", "b"), n=6)
    if what == "nothing found": result = coco_stats(ds, [as_detections()] * 6)
    if what == "a class without boxes":
        ds = DetDataset(tmp_path, ("a", "b", "none"), ds.paths, ds.sizes, ds.box_image, ds.boxes, ds.labels)
        result = coco_stats(ds, result.detections)
    if what == "all right":
        result = coco_stats(ds, [as_detections(b, np.ones(len(b)), l) for b, l, _ in map(ds.boxes_of, range(6))])
    if what == "images gone":
        for path in ds.paths: (tmp_path / path).unlink()
    if what == "one image":
        ds = ds.subset([0])
        result = coco_stats(ds, result.detections[:1])
    _, text = write_page(tmp_path, ds, result)
    words = check_page(text).text
    assert not re.search(r"\b(nan|None)\b", words), re.search(r".{30}\b(nan|None)\b.{30}", words)
    if what == "nothing found": assert "nothing was found in 6 images" in words
    if what == "all right": assert "No mistake costs anything" in words
    if what == "images gone": assert "can't be read now" in words and "<img" in text
    if what == "one image": assert "no interval" in words


def luminance(color):
    "WCAG's relative luminance."
    value = np.array([int(color[k:k + 2], 16) / 255 for k in (1, 3, 5)])
    linear = np.where(value <= .03928, value / 12.92, ((value + .055) / 1.055) ** 2.4)
    return float(linear @ [.2126, .7152, .0722])


def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + .05) / (low + .05)


def schemes():
    "The colors of the style sheet, light and dark."
    style = pages.page_part("jetson_det.evaluate", "page.css")
    whole = lambda color: "#" + "".join(2 * c for c in color[1:]) if len(color) == 4 else color
    out = []
    for block in re.findall(r":root \{(.*?)\}", style, re.S):
        out.append({name: whole(color) for name, color in re.findall(r"--([a-z0-9]+): (#[0-9a-f]+);", block)})
        shade = re.search(r"--shade: (\d+), (\d+), (\d+)", block)
        out[-1]["shade"] = "#" + "".join(f"{int(v):02x}" for v in shade.groups())
    return out


def over(top, ground, share):
    "A color laid over another."
    mix = [round(int(top[k:k + 2], 16) * share + int(ground[k:k + 2], 16) * (1 - share)) for k in (1, 3, 5)]
    return "#" + "".join(f"{v:02x}" for v in mix)


def test_text_and_lines_can_be_seen_in_light_and_in_dark():
    light, dark = schemes()
    assert luminance(light["card"]) > .9 and luminance(dark["card"]) < .03
    for colors in (light, dark):
        for ground in ("bg", "card"):
            for text in ("ink", "soft", "focus"): assert contrast(colors[text], colors[ground]) >= 4.5, text
        for line in ("s0", "s1", "s2", "s3", "s4", "s5", "bar", "whisker"):
            assert contrast(colors[line], colors["card"]) >= 3, line
        assert contrast(colors["whisker"], colors["bar"]) >= 3
        for share in (.1, .2, .3, .4): # figures of the confusion matrix on their shade
            assert contrast(colors["ink"], over(colors["shade"], colors["card"], share)) >= 4.5


def test_curves_differ_without_color():
    "Each has its own dashes and its own marks, and its name beside both."
    style = pages.page_part("jetson_det.evaluate", "page.css")
    dashes = dict(re.findall(r"\.(s\d) > polyline \{\s*stroke-dasharray: ([\d ]+);\s*\}", style))
    assert len(dashes) == len(set(dashes.values())) == 5 # the sixth is whole
    x = np.linspace(0, 1, 5)
    chart = line_chart([Curve(f"<c{k}>", x, x) for k in range(8)], "x", "y", "eight <curves>")
    keys = re.findall(r'<svg class="key.*?class="mark" d="([^"]+)"', chart)
    assert len(keys) == len(set(keys)) == 6 and "&lt;c5&gt;" in chart and "<c" not in chart


def test_bars_stay_in_their_picture():
    for values in ((2., -1., 3.), (0., 0., 0.), (.5, .4, .6)):
        for number in re.findall(r'(?:width|x\d?)="([\d.-]+)"', bar(*values, 1.)): assert 0 <= float(number) <= 220
    assert text_of("x" * 300, 60).endswith("x" * 30) and len(text_of("x" * 300, 60)) == 60


def test_crops_stay_small_and_inside():
    noise = rng_for(3).integers(0, 256, (900, 1200, 3), np.uint8)
    assert len(small_jpeg(noise, 20_000)) <= 20_000
    assert len(numbered(noise, [((-5, -5, 2000, 2000), True), ((0, 0, 1, 1), False)])) <= 60_000
    for box in ((-20, -20, 5, 5), (1190, 890, 1300, 1000), (5, 5, 5, 5), (0, 0, 1200, 900)):
        part = cv2.imdecode(np.frombuffer(crop(noise, [box], []), np.uint8), cv2.IMREAD_COLOR)
        assert min(part.shape[:2]) >= 1 and max(part.shape[:2]) <= 180
    tiny = np.zeros((1, 3, 3), np.uint8)
    assert crop(tiny, [], [(0, 0, 1, 1)]) and numbered(tiny, [])
