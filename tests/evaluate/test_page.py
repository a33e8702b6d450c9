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
from jetson_det.evaluate.page import result_plots, result_section, results_page, write_report
from jetson_det.evaluate.plots import (_plain, _write, comparison_sheet, confusion_figure, contact_sheet, figure_bytes,
                                       pr_figure)
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
    "Tags, their attributes, and the text between them."
    def __init__(self, page):
        super().__init__()
        self.tags = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs): self.tags.append((tag, dict(attrs)))
    def handle_data(self, data): self.text += data


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
    assert {tag for tag, _ in parsed.tags} <= {
        "html", "head", "meta", "link", "title", "style", "body", "header", "h1", "dl", "dt", "dd", "main", "section",
        "h2", "ul", "li", "b", "span", "div", "table", "thead", "tbody", "tr", "th", "td", "figure", "figcaption",
        "img"}
    assert [a["src"][:11] for tag, a in parsed.tags if tag == "img"] == ["data:image/"] * 4
    assert not any(name.startswith("on") for _, attrs in parsed.tags for name in attrs)
    assert "<script>alert(1)</script>" in parsed.text and "\\x1b[31mred\\nline" in parsed.text
    assert "\x1b" not in parsed.text and "\u202e" not in parsed.text
    policy, = [a["content"] for tag, a in parsed.tags if "http-equiv" in a]
    assert policy.startswith("default-src 'none'")


def test_every_class_is_in_the_legend(tmp_path):
    ds, result = evaluated(tmp_path, HOSTILE)
    text = "\n".join(t.get_text() for t in pr_figure(result).legends[0].get_texts())
    for name in HOSTILE: assert _plain(name) in text
    assert "$" not in text.replace("\\$", "")
    assert len(_plain("x" * 300)) == 24 and _plain("a.jpg") == "a.jpg"


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
    assert text.index("<h2>test") < text.index("<h2>val") < text.index("<h2>Training")
    names = sorted(f.name for f in (run / "plots").iterdir() if f.name[0] != ".")
    assert len(names) == 9 and is_own_output(run / "plots") and is_own_output(page)
    for name in names: assert cv2.imread(str(run / "plots" / name)) is not None
    assert len(re.findall(r"data:image/", text)) == 9
    first = re.search(r"data:image/png;base64,([^\"]+)", text)[1]
    assert base64.b64decode(first) == (run / "plots" / "test_precision_recall.png").read_bytes()
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
    assert "training.png" in names and "val_worst.jpg" in names and len(names) == text.count("data:image/")
    assert f"{figures['val']['stats']['AP']:.3f}" in text
    assert f"report: {tmp_path / 'run' / 'report.html'}" in capsys.readouterr().out
