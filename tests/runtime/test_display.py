"What a notebook shows of the runtime's objects: harmless, short, and never an error or a leak."
import copy
import gc
import os
import pickle
import re
import weakref

import cv2
import numpy as np
import pytest
from html_pages import STRANGE, check

from jetson_det.runtime.contract import preset
from jetson_det.runtime.display import as_html, curve, facts, read_thumbnail, table
from jetson_det.runtime.draw import FrameDetections, class_color, draw
from jetson_det.runtime.geometry import Detections, as_detections
from jetson_det.runtime.sessions import Session
from jetson_det.runtime.tiles import Tiled


def boxes_of(labels):
    "Detections with these labels."
    n = len(labels)
    boxes = np.float32([[8 * (k % 7), 5, 8 * (k % 7) + 20, 40] for k in range(n)]).reshape(-1, 4)
    return as_detections(boxes, np.linspace(.9, .1, n), labels)


@pytest.mark.parametrize("name", STRANGE)
def test_names_of_strangers_are_text(name):
    frame = np.full((60, 90, 3), 90, np.uint8)
    session = Session(preset("yolox", (name, "other"), (64, 96))._replace(name=name[:200]), lambda x: [])
    pages = [table([name], [[name, 1]], noun=name), facts([(name, name)]), curve([1, 2], name),
             FrameDetections.of(boxes_of([0, 1]), frame, (name, "other"))._repr_html_(), session._repr_html_()]
    for page in pages:
        check(page)
        assert len(page) < 40000
    repr(session).encode("utf-8")


def test_text_that_is_escaped_stays_readable():
    assert check(as_html("a<b>&\"c\"")) == "a<b>&\"c\""
    assert check(table(["n"], [["{}"]])) == "n{}"


@pytest.mark.parametrize("total", [0, 1, 19, 20, 21, 22, 10000])
def test_a_table_is_short_and_says_what_is_left_out(total):
    text = check(table(["name"], [["row %d" % k] for k in range(total)]))
    assert text.count("row ") == min(total, 20)
    if total > 20: assert "and {} more row".format(total - 20) in text
    else: assert "more" not in text


def test_numbers():
    cells = [1, .5, None, np.float32(.25), np.int64(7), float("nan"), "text"]
    assert check(table([], [cells])) == "10.500-0.2507nantext"


@pytest.mark.parametrize("n", [0, 1, 12, 5000])
def test_any_number_of_detections_is_one_short_page(n):
    frame = np.full((60, 90, 3), 90, np.uint8)
    found = FrameDetections.of(boxes_of([0] * n), frame, ("Sack",))
    text = check(found._repr_html_())
    assert text.count("Sack") == min(n, 10) and found._repr_html_().count("<img") == 1
    assert ("no detections" if n == 0 else "{} detection".format(n)) in text
    assert len(found._repr_html_()) < 40000
    check(Detections(*found)._repr_html_())


@pytest.mark.parametrize("kind", ["gray", "alpha", "uint16", "tall", "one pixel", "not contiguous"])
def test_every_kind_of_frame_is_drawn(kind):
    frame = {"gray": np.zeros((60, 90), np.uint8), "alpha": np.zeros((60, 90, 4), np.uint8),
             "uint16": np.zeros((60, 90, 3), np.uint16), "tall": np.zeros((9000, 3, 3), np.uint8),
             "one pixel": np.zeros((1, 1, 3), np.uint8),
             "not contiguous": np.zeros((60, 90, 6), np.uint8)[:, ::-1, ::2]}[kind]
    assert "<img" in FrameDetections.of(boxes_of([0, 1]), frame, ("Sack",))._repr_html_()


@pytest.mark.parametrize("box", [[np.nan] * 4, [-1e30, 0, 1e30, np.inf], [30, 30, 2, 2], [0, 0, 0, 0]])
def test_boxes_that_cannot_be_are_no_error(box):
    found = Detections(np.float32([box]), np.float32([np.nan]), np.int64([10**6]))
    frame = np.zeros((60, 90, 3), np.uint8)
    assert "class 1000000" in check(FrameDetections.of(found, frame, ("Sack",))._repr_html_())
    draw(frame, found._replace(labels=np.int64([0])), ("Sack",))


def test_boxes_are_where_they_belong_in_the_small_image():
    frame = np.zeros((1200, 2000, 3), np.uint8)
    found = as_detections([[1000, 600, 1600, 1000]], [.9], [0])
    page = FrameDetections.of(found, frame, ("S",))._repr_html_()
    import base64
    data = base64.b64decode(re.search("base64,([^\"]+)", page).group(1))
    small = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    ys, xs = np.nonzero(small[200:].max(2) > 90)
    share = 560 / 2000
    assert small.shape == (336, 560, 3)
    assert abs(xs.max() - 1600 * share) < 3 and abs(ys.max() + 200 - 1000 * share) < 3
    assert not frame.any()


def test_detections_stay_three_arrays():
    frame = np.zeros((60, 90, 3), np.uint8)
    plain = boxes_of([0, 1])
    found = FrameDetections.of(plain, frame, ("Sack", "Person"))
    boxes, scores, labels = found
    assert boxes is plain.boxes and scores is plain.scores and labels is plain.labels
    assert isinstance(found, Detections) and isinstance(found, tuple) and len(found) == 3
    assert found == plain and found._fields == plain._fields and found[1] is scores
    assert repr(found) == repr(plain)
    assert list(found._asdict()) == ["boxes", "scores", "labels"]
    changed = found._replace(scores=scores / 2)
    assert changed.frame is frame and changed.classes == found.classes
    assert changed.scores[0] == scores[0] / 2 and changed.boxes is boxes
    with pytest.raises(ValueError): found._replace(nothing=1)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_has_the_arrays_and_the_classes_but_no_frame(protocol):
    frame = np.zeros((600, 900, 3), np.uint8)
    found = FrameDetections.of(boxes_of([0, 1]), frame, ("Sack", "Person"))
    data = pickle.dumps(found, protocol)
    assert len(data) < 3000
    for again in pickle.loads(data), copy.copy(found), copy.deepcopy(found):
        assert type(again) is FrameDetections and again.classes == ("Sack", "Person") and again.frame is None
        assert (again.boxes == found.boxes).all() and (again.labels == found.labels).all()
        check(again._repr_html_())


def session_of_one_box():
    "A session that finds one box in every frame."
    contract = preset("yolox", ("Sack",), (64, 96))._replace(output="boxes_scores")
    return Session(contract, lambda x: [np.float32([[[4, 4, 40, 40]]] * len(x)), np.float32([[[.9]]] * len(x))])


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: Tiled(s, 64)])
def test_a_session_shows_its_frame_and_keeps_no_more_than_one(wrap):
    session = wrap(session_of_one_box())
    found = session(np.zeros((64, 96, 3), np.uint8))
    assert "<img" in found._repr_html_() and "Sack" in found._repr_html_()
    gone = weakref.ref(found.frame)
    later = session(np.ones((64, 96, 3), np.uint8))
    gc.collect()
    assert gone() is None and "<img" not in found._repr_html_() and "Sack" in found._repr_html_()
    assert later.frame.all()
    many = session([np.zeros((64, 96, 3), np.uint8) for _ in range(20)])
    gc.collect()
    assert [f.frame for f in many] == [None] * 20 and later.frame is None
    mine = np.zeros((64, 96, 3), np.uint8)
    assert session([mine, mine])[1].frame is mine


def test_ten_thousand_classes_make_a_short_page():
    session = Session(preset("yolox", tuple("class %d" % k for k in range(10000)), (64, 96)), lambda x: [])
    text = check(session._repr_html_())
    assert "and 9988 more" in text and len(text) < 2000


def test_a_broken_object_is_shown_as_text():
    session = Session(preset("yolox", ("Sack",), (64, 96)), lambda x: [])
    session.contract = None
    assert session._repr_html_() is None
    assert Detections([1], None, 3)._repr_html_() is None


def test_thumbnails_of_what_is_no_image(tmp_path):
    image = np.full((480, 640, 3), 90, np.uint8)
    for name in ("a.png", "a.jpg"): cv2.imwrite(str(tmp_path / name), image)
    (tmp_path / "torn.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    (tmp_path / "empty.jpg").write_bytes(b"")
    os.mkfifo(str(tmp_path / "pipe.jpg"))
    for name in ("a.png", "a.jpg"):
        for size in ((480, 640), (1, 1), (10**6, 10**6)): # what the labels state may be wrong
            small, reason = read_thumbnail(tmp_path / name, size, 100)
            assert max(small.shape) <= 100 and reason == ""
    for name, why in (("torn.png", "no image"), ("empty.jpg", "no image"), ("absent.jpg", "missing"),
                      ("pipe.jpg", "cannot be read"), ("", "cannot be read"), ("a\0b", "cannot be read")):
        assert read_thumbnail(os.path.join(str(tmp_path), name), (480, 640)) == (None, why)


@pytest.mark.parametrize("values", [[], [1], [None, float("nan")], [1, 1, 1], [float("inf"), 2, 3], range(100000)])
def test_curves(values):
    page = curve(values, "AP")
    check(page)
    assert len(page) < 5000 and "nan" not in page and "inf" not in page


def test_colors_are_those_of_the_boxes():
    b, g, r = class_color(3)
    assert "rgb({},{},{})".format(r, g, b) in FrameDetections.of(boxes_of([3]), None)._repr_html_()
