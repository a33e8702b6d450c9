"""evaluate.pareto: the front is what no other beats, files of strangers are named, labels don't overlap."""
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jetson_det.core import InputError
from jetson_det.evaluate.compare import ComparedModel, Comparison
from jetson_det.evaluate.intervals import Interval
from jetson_det.evaluate.pareto import (
    ParetoPoint,
    artifact_bytes,
    comparison_points,
    pareto,
    pareto_figure,
    read_points,
    short_names,
    time_points,
)
from jetson_det.evaluate.plots import figure_bytes


def point(name, ap, ms, **kw): return ParetoPoint(name, ap, milliseconds=ms, where="orin-nano", **kw)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=12))
def test_the_front_is_what_no_other_beats(figures):
    points = [point(f"p{k}", ap / 20, float(ms)) for k, (ap, ms) in enumerate(figures)]
    def beats(q, p):
        is_as_good = q.ap >= p.ap and q.milliseconds <= p.milliseconds
        return is_as_good and (q.ap, q.milliseconds) != (p.ap, p.milliseconds)
    wanted = {p.name for p in points if not any(beats(q, p) for q in points)}
    assert set(pareto(points).front) == wanted


def test_a_beaten_model_whose_interval_reaches_the_front():
    result = pareto([point("a", .5, 1), point("b", .48, 2, low=.4, high=.52), point("c", .4, 3, low=.35, high=.45)])
    assert result.front == ["a"] and result.reaching == ["b"] and "interval that reaches the front: b" in repr(result)


@pytest.fixture
def files(tmp_path):
    "Files as the verbs write them, cut to what is read."
    def write(file, **record):
        (tmp_path/file).write_text(json.dumps(record))
        return tmp_path/file
    return dict(
        a=write("a.json", artifact="x/a.onnx", stats=dict(AP=.4), images=10, settings=dict(data="f"),
                seconds=dict(preprocess=.1, inference=.8, counting=9., total=9.), bytes=3,
                intervals=dict(stats=[dict(name="AP", low=.3, high=.5)])),
        b=write("b.json", artifact="x/b.onnx", stats=dict(AP=.6), images=10, settings=dict(data="f"),
                seconds=dict(preprocess=.2, inference=2., total=9.)),
        compared=write("c.json", rows=[dict(name="c", stats=[dict(name="AP", value=.5, low=.4, high=.6)], size=7,
                                            milliseconds=30.)]),
        bench=write("bench.json", artifact="a.onnx", model="yolox", measured_on=dict(device="Jetson"),
                    stages=dict(inference=dict(p50=5.), total=dict(p50=6.)), on_device=dict(board="nano")),
        estimate=write("e.json", name="b.onnx", board="nano", precision="fp16", mode="10W", batch=2, ms=18., low=16.,
                       high=20.))


def test_files_are_joined_by_the_artifact(files):
    a, b = read_points([files["a"], files["b"]])
    assert (a.low, a.high, a.size, a.data) == (.3, .5, 3, "f") and a.milliseconds == pytest.approx(90)
    assert b.milliseconds == pytest.approx(220) and a.where == b.where and a.timed == "frame"
    a, = read_points([files["bench"], files["a"]]) # measured goes before the evaluation's own, in any order
    assert (a.milliseconds, a.where, a.measured) == (6, "nano", True)
    a, b = read_points([files[k] for k in ("a", "b", "bench", "estimate")])
    assert (a.milliseconds, a.timed, b.milliseconds, b.fast, b.slow, b.timed) == (5, "network", 9, 8, 10, "network")
    assert (a.measured, b.measured) == (True, False)
    result = pareto([a, b])
    assert result.front == ["x/a.onnx", "x/b.onnx"] and "the network alone, nano" in repr(result)
    json.dumps(result.to_dict(), allow_nan=False)
    c, = read_points([files["compared"]])
    assert (c.name, c.ap, c.low, c.size, c.milliseconds) == ("c", .5, .4, 7, 30)


def test_a_training_folder(tmp_path):
    folder = tmp_path/"run_1"
    (folder/"best").mkdir(parents=True)
    (folder/"best"/"manifest.json").write_bytes(b"12345")
    record = dict(artifact="/elsewhere/best", val=dict(stats=dict(AP=.3), images=2, seconds=dict(inference=.2)))
    (folder/"metrics.json").write_text(json.dumps(record))
    p, = read_points([folder])
    assert (p.name, p.ap, p.size) == ("run_1", .3, 5) and p.milliseconds == pytest.approx(100)
    (folder/"metrics.json").write_text("{}")
    with pytest.raises(InputError, match="run_1/metrics.json: holds no evaluation"): read_points([folder])


@pytest.mark.parametrize("text, message", [
    ("{", "line 1: not valid JSON"), ("[]", "not figures of evaluate"), ('{"rows": 3}', "not figures of evaluate"),
    ('{"rows": [{"name": "a", "stats": []}]}', "not figures"), ('{"stats": {"AP": null}}', "has no AP"),
    ('{"stats": {"AP": "x"}}', "stats.AP is x; it must be a number"), ('{"stats": 3}', "not figures"),
    ('{"stats": {"AP": -1}}', "must be a number, 0 or more"), ('{"stats": {"AP": NaN}}', "must be a number"),
    ('{"stages": {"total": {}}, "measured_on": {}}', "not figures"),
    ('{"board": "nano", "name": "a", "ms": 1, "low": 1, "high": 2, "batch": 0}', "not figures"),
])
def test_damaged_files(text, message, tmp_path):
    (tmp_path/"d.json").write_text(text)
    with pytest.raises(InputError, match=message) as e: read_points([tmp_path/"d.json"])
    assert "d.json" in str(e.value) and "\n" not in str(e.value)


def test_what_cannot_be_compared_is_refused(files, tmp_path):
    with pytest.raises(InputError, match="no file gives an accuracy"): read_points([files["bench"]])
    with pytest.raises(InputError, match="two files give its accuracy"): read_points([files["a"], files["a"]])
    with pytest.raises(InputError, match="cannot be read"): read_points([tmp_path/"none.json"])
    same = dict(stats=dict(AP=.1), settings={})
    for k in "yz": (tmp_path/f"{k}.json").write_text(json.dumps(dict(same, artifact=f"{k}/a.onnx")))
    with pytest.raises(InputError, match="a.onnx: may be y/a.onnx, z/a.onnx"):
        read_points([tmp_path/"y.json", tmp_path/"z.json", files["bench"]])
    with pytest.raises(InputError, match="no models"): pareto([])
    with pytest.raises(InputError, match="different images or labels"):
        pareto([point("a", .1, 1, data="x"), point("b", .2, 2, data="y")])
    with pytest.raises(InputError, match="a: is there twice"): pareto([point("a", .1, 1), point("a", .2, 2)])
    other = ParetoPoint("o", .3, milliseconds=1., where="desk")
    with pytest.raises(InputError, match="times of 2 machines"): pareto([point("a", .1, 1), other])
    with pytest.raises(InputError, match="no time of 'moon'"): pareto([point("a", .1, 1)], where="moon")
    kept = pareto([point("a", .1, 1), other, ParetoPoint("n", .2)], where="desk")
    assert kept.front == ["o"]
    assert dict(kept.left_out) == {"a": "its time is that of orin-nano", "n": "no time is known"}
    with pytest.raises(InputError, match="others of the network alone"):
        pareto([point("a", .1, 1), point("b", .1, 1, timed="network")])
    with pytest.raises(InputError, match="neither a time nor a size"): pareto([ParetoPoint("a", .1)])
    by_size = pareto([ParetoPoint("a", .1, size=5), ParetoPoint("b", .2, size=4), ParetoPoint("c", .3)])
    assert (by_size.by, by_size.front) == ("size", ["b"]) and by_size.left_out[0][0] == "c"


def texts(fig):
    renderer = fig.canvas.get_renderer()
    notes = [t for t in fig.axes[0].texts if t.get_text()]
    return [(t.get_text(), t.get_window_extent(renderer).extents) for t in notes]


def assert_apart(fig):
    "No label over another, over a point or outside."
    found = texts(fig)
    boxes = np.array([box for _, box in found])
    for k, a in enumerate(boxes):
        for b in boxes[k + 1:]: assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3]
    ax = fig.axes[0]
    room = ax.get_window_extent().extents
    assert (boxes[:, :2] >= room[:2] - 1).all() and (boxes[:, 2:] <= room[2:] + 1).all()
    for line in ax.get_lines():
        if line.get_marker() in (None, "None", ""): continue
        x, y = ax.transData.transform(line.get_xydata())[0]
        assert not any(b[0] < x < b[2] and b[1] < y < b[3] for b in boxes)
    return [text for text, _ in found]


@pytest.mark.parametrize("count, seed", [(3, 0), (16, 1), (50, 2)])
def test_labels_are_apart(count, seed):
    rng = np.random.default_rng(seed)
    points = []
    for k in range(count):
        ap = float(rng.normal(.5, .01))
        points.append(point(f"a_rather_long_name_of_a_run_{k:03}_$x$", ap, float(rng.uniform(9, 10)), low=ap - .02,
                            high=ap + .02, measured=bool(k % 2), size=int(1e6 * (k + 1))))
    result = pareto(points)
    fig = pareto_figure(result, "T")
    shown = assert_apart(fig)
    left = count - len(shown)
    assert (f"{left} label" in fig.axes[0].get_title("left")) == (left > 0)
    if count == 3: assert left == 0
    assert figure_bytes(fig, dpi=100).startswith(b"\x89PNG")


def test_edges_of_the_plot():
    "One point, equal points, a time of 0, AP of 0 and 1."
    for points in ([point("a", .5, 3)], [point("a", .5, 3), point("b", .5, 3)], [point("a", 0, 0), point("b", 1, 9)]):
        assert len(assert_apart(pareto_figure(pareto(points)))) == len(points)


def test_a_comparison():
    def row(name, ap, ms): return ComparedModel(name, [Interval("AP", ap, .1, .9, .1, 5)], milliseconds=ms, size=3)
    c = Comparison([row("a", .4, 3.), row("b", .5, 2.), row("c", None, 1.)], 5, 5, 9, .95, 100)
    points = comparison_points(c)
    assert [p.name for p in points] == ["a", "b"] and pareto(points).front == ["b"] and not math.isnan(points[0].low)


def test_names_are_as_short_as_they_can_be():
    assert short_names(["x/a.onnx", "y/a.onnx", "run"]) == ["x/a.onnx", "y/a.onnx", "run"]
    assert short_names(["/a/b/c", "/a/b/d"]) == ["c", "d"]
    with pytest.raises(InputError, match="given twice"): short_names(["x/a.onnx", "x/a.onnx"])
    points = [ParetoPoint(f"/somewhere/far/{name}", .5, milliseconds=ms) for name, ms in (("a", 1), ("b", 2))]
    assert "somewhere" not in repr(pareto(points)) and texts(pareto_figure(pareto(points)))[0][0] == "a"


def test_a_comparison_takes_times_from_files(files):
    points = [ParetoPoint("a.onnx", .4, milliseconds=99.), ParetoPoint("b.onnx", .5, milliseconds=98.)]
    assert time_points(points, []) == points
    a, b = time_points(points, [files["bench"], files["estimate"]])
    assert (a.milliseconds, b.milliseconds, a.timed, b.timed) == (5, 9, "network", "network")
    a, b = time_points(points, [files["bench"]])
    assert (a.milliseconds, b.milliseconds) == (6, None) and points[0].milliseconds == 99
    with pytest.raises(InputError, match="a.json: has no times"): time_points(points, [files["a"]])


def test_bytes_of_an_artifact(tmp_path):
    (tmp_path/"a.onnx").write_bytes(b"123")
    assert artifact_bytes(tmp_path/"a.onnx") == 3
    with pytest.raises(InputError, match="neither a checkpoint"): artifact_bytes(tmp_path)
    with pytest.raises(InputError, match="no such folder"): artifact_bytes(tmp_path/"b")
