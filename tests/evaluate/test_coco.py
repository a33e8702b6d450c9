"evaluate.coco against pycocotools, number by number."
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from coco_oracle import NAMES, pycocotools_stats, same
from coco_scene import scene
from jetson_det.core import InputError, rng_for
from jetson_det.data.dataset import CROWD, DIFFICULT, IGNORE, DetDataset
from jetson_det.evaluate.coco import coco_of, coco_results, coco_stats, evaluate, shared_classes
from jetson_det.runtime.geometry import Detections, as_detections


@pytest.mark.parametrize("seed", range(6))
def test_twelve_numbers_of_random_scenes(seed):
    ds, found = scene(seed)
    gt = coco_of(ds)
    rows = coco_results(found, ds.image_ids)
    same(coco_stats(ds, found), pycocotools_stats(gt, rows))
    same(coco_stats(gt, found, ds.classes), pycocotools_stats(gt, rows))


def largest_difference(seeds):
    "The largest difference to pycocotools over small scenes of crowds, ignored boxes, copies and ties."
    worst = 0.
    for seed in seeds:
        ds, found = scene(1000 + seed, n=3, classes=3, most=7)
        if not any(a["area"] >= 0 and not a["iscrowd"] for a in coco_of(ds)["annotations"]): continue
        if not sum(len(d.scores) for d in found): continue # pycocotools takes no empty list
        if seed % 3 == 0: found = [d._replace(scores=d.scores.round(1)) for d in found]
        ours = coco_stats(ds, found)
        truth = pycocotools_stats(coco_of(ds), coco_results(found, ds.image_ids))
        same(ours, truth)
        have = [-1 if ours.stats[k] is None else ours.stats[k] for k in NAMES]
        worst = max(worst, float(np.abs(np.array(have) - truth.stats).max()))
    return worst


def test_random_problems():
    assert largest_difference(range(25)) < 1e-12 # precisions are rounded to twelve decimals


@pytest.mark.slow
def test_two_hundred_random_problems():
    worst = largest_difference(range(200))
    print(f"largest difference to pycocotools: {worst:.1e}")
    assert worst < 1e-12


def test_names_that_are_no_utf8():
    ds, found = scene(0)
    want = coco_stats(coco_of(ds), found).to_json()
    odd = coco_of(ds)
    for category in odd["categories"]: category["name"] += "\udce9"
    for a in odd["annotations"]: a["attributes"] = {"note\udce9": "\ud83d"}
    have = coco_stats(odd, found).to_json()
    assert have["stats"] == want["stats"] and want["stats"]["AP50"] > 0


def test_over_a_hundred_of_a_class_in_an_image():
    ds, found = scene(3, n=4, classes=2, p_flag=0)
    rng = rng_for(5)
    boxes = ds.boxes[rng.integers(0, len(ds.boxes), 300)] + rng.normal(0, 3, (300, 4))
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    found = [as_detections(boxes, rng.random(300), rng.integers(0, 2, 300))] * 4
    same(coco_stats(ds, found), pycocotools_stats(coco_of(ds), coco_results(found, ds.image_ids)))
    more = coco_stats(ds, found, max_detections=300)
    assert "AR300" in more.stats and more.stats["AR300"] >= coco_stats(ds, found).stats["AR100"]
    assert "AR5" in coco_stats(ds, found, max_detections=5).stats


def test_ignored_means_neither_right_nor_wrong():
    boxes = [[0, 0, 50, 50], [100, 100, 150, 150]]
    three = [[0, 0, 50, 50], [100, 100, 150, 150], [300, 300, 350, 350]]
    make = lambda flags: DetDataset(".", ("a",), ["0.png"], [[400, 400]], [0, 0], boxes, [0, 0], flags=flags)
    for flag in (IGNORE, DIFFICULT):
        r = coco_stats(make([0, flag]), [as_detections(boxes, [.5, .9], [0, 0])])
        assert r.stats["AP"] == pytest.approx(1) and (r.boxes, r.ignored) == (1, 1) # found: no harm
        # missed: no harm
        assert coco_stats(make([0, flag]), [as_detections(boxes[:1], [.5], [0])]).stats["AP"] == pytest.approx(1)
    r = coco_stats(make([0, CROWD]), [as_detections(three[:2] + [[105, 105, 120, 120]], [.5, .9, .8], [0, 0, 0])])
    assert r.stats["AP"] == pytest.approx(1) # any number inside a crowd
    assert coco_stats(make([0, CROWD]),
                      [as_detections(three, [.5, .9, .8], [0, 0, 0])]).stats["AP50"] == pytest.approx(.5)
    raw = make([0, IGNORE]).to_coco() # pycocotools reads `ignore` of a COCO file and overwrites it
    found = [as_detections(boxes[:1], [.5], [0])]
    same(coco_stats(raw, found), pycocotools_stats(raw, coco_results(found, [1])))
    assert coco_stats(raw, found).boxes == 2


def test_annotation_id_zero_is_found_too():
    gt = dict(images=[{"id": 1}],
              categories=[{"id": 1, "name": "a"}],
              annotations=[{"id": 0, "image_id": 1, "category_id": 1, "bbox": [0, 0, 40, 40]}])
    assert coco_stats(gt, [as_detections([[0, 0, 40, 40]], [.9], [0])]).stats["AP"] == pytest.approx(1)


def test_classes_by_name():
    ds, found = scene(1, classes=3, p_flag=0)
    shuffled = ("zebra", "c2", "C1", "c0") # the model's own order and one class more; C1 is c1
    to = {0: 3, 1: 2, 2: 1}
    renamed = [as_detections(d.boxes, d.scores, [to[l] for l in d.labels.tolist()]) for d in found]
    a = coco_stats(ds, found)
    b = coco_stats(ds, renamed, shuffled)
    assert a.stats == b.stats and b.unused == ["zebra"] and b.unknown == []
    some = coco_stats(
        ds,
        [as_detections(d.boxes[d.labels == 0], d.scores[d.labels == 0], [0]*int((d.labels == 0).sum()))
         for d in found], ("c0", ))
    assert some.unknown == ["c1", "c2"
                            ] and some.per_class[1]["AP"] == 0 and some.per_class[0]["AP"] == a.per_class[0]["AP"]
    assert some.stats["AP"] == pytest.approx(a.per_class[0]["AP"] / 2) # c2 has no boxes and counts nowhere
    with pytest.raises(InputError, match="the model knows cat; the data has c0, c1, c2"):
        coco_stats(ds, found, ("cat",))
    to, _, unused = shared_classes(("person", "Person"), ("Person",))
    assert shared_classes(("traffic light",), ("Traffic_Light",))[0].tolist() == [0]
    assert to.tolist() == [-1, 0] and unused == ["person"]


def test_bad_calls_are_one_line():
    ds, found = scene(2)
    for call, text in [(lambda: coco_stats(ds, found[:-1]), "29 lists of detections for 30 images"),
                       (lambda: coco_stats(ds.subset([]), []), "no boxes that count"),
                       (lambda: coco_stats(ds, found, max_detections=0), "at least 1"),
                       (lambda: coco_stats({"images": []}, []), "not a COCO dictionary"),
                       (lambda: coco_stats(ds, found, ds.classes[:2]), "which is outside 0..1")]:
        with pytest.raises(InputError, match=text) as e: call()
        assert "\n" not in str(e.value)


def test_what_cannot_be_counted_is_named():
    "No traceback, no silent drop: the first image with it, and how many."
    ds, found = scene(2)
    k = next(k for k, d in enumerate(found) if len(d.scores) > 2)
    d = found[k]
    change = lambda **columns: [d._replace(**columns) if i == k else other for i, other in enumerate(found)]
    one = np.arange(len(d.scores)) == 1
    n = len(one)
    cases = [(change(scores=np.where(one, np.nan, d.scores)), "a detection has a score .*1 det"),
             (change(scores=d.scores * np.inf), "a detection has a score that is not a finite"),
             (change(boxes=np.where(one[:, None], np.inf, d.boxes)), "a detection has a box that"),
             (change(labels=np.where(one, 4, d.labels)), "a detection has the label 4, which is outside 0..3"),
             (change(labels=np.where(one, -1, d.labels)), "a detection has the label -1"),
             (change(scores=d.scores[1:]), rf"boxes of the shape \({n}, 4\), scores \({n - 1},\)")]
    for bad, text in cases:
        text = f"image {ds.paths[k]}: {text}"
        with pytest.raises(InputError, match=text) as e: coco_stats(ds, bad)
        assert "\n" not in str(e.value)
    gt = coco_of(ds)
    for change, text in [(dict(images=gt["images"] + gt["images"][:1]), "stands twice"),
                         (dict(annotations=[dict(gt["annotations"][0], bbox=[0, 0, float("nan"), 9])]), "not finite")]:
        with pytest.raises(InputError, match=text): coco_stats(dict(gt, **change), found)


def test_a_million_detections_on_one_image():
    ds, found = scene(3, n=4, classes=2, p_flag=0)
    rng = rng_for(9)
    xy = rng.uniform(0, 400, (1_000_000, 2)).astype(np.float32)
    many = Detections(np.concatenate([xy, xy + 40], 1), rng.random(1_000_000).astype(np.float32) / 2,
                      rng.integers(0, 2, 1_000_000))
    result = coco_stats(ds, [many] + found[1:])
    assert sum(c["detections"] for c in result.per_class) == 1_000_000 + sum(len(d.scores) for d in found[1:])
    best = [np.argsort(-np.where(many.labels == k, many.scores, -1), kind="stable")[:100] for k in range(2)]
    few = Detections(*(column[np.concatenate(best)] for column in many))
    assert coco_stats(ds, [few] + found[1:]).stats == result.stats


@pytest.mark.slow
def test_the_size_of_coco_val():
    "5000 images, 36,000 boxes, 500,000 detections: at most 1.5 s of CPU and 500 MB, in a process of its own."
    import subprocess
    import sys
    here = Path(__file__).parents[2]
    answer = subprocess.run([sys.executable, str(here / "bench" / "bench_evaluate.py"), "--once"], cwd=here,
                            env=dict(os.environ, PYTHONPATH=str(here)), capture_output=True, text=True, check=True)
    figures = json.loads(answer.stdout)
    print(figures)
    assert figures["coco, CPU s"] < 1.5 and figures["peak, MB"] < 500 and figures["errors, CPU s"] < 1


class Replay:
    "A session that gives stored detections, and notes how it was asked."
    def __init__(self, ds, found):
        self.contract = SimpleNamespace(classes=ds.classes, name="replay")
        self.timings = {"inference": .001}
        self.confidence = .3
        self.iou = .45
        self.max_detections = 77
        self.found = iter(found)
        self.asked = []
    def __call__(self, frames):
        self.asked.append((len(frames), self.confidence, self.iou, self.max_detections))
        return [next(self.found) for _ in frames]


def test_evaluate_sets_and_gives_back(tmp_path, capfd):
    import cv2
    ds, found = scene(4, n=10)
    for p in ds.paths: cv2.imwrite(str(tmp_path / p), np.zeros((8, 8, 3), np.uint8))
    ds.root = tmp_path
    session = Replay(ds, found)
    r = evaluate(session, ds, confidence=.02, iou=.6, batch=4, progress=False)
    assert session.asked == [(4, .02, .6, None), (4, .02, .6, None), (2, .02, .6, None)]
    assert (session.confidence, session.iou, session.max_detections) == (.3, .45, 77)
    assert r.stats == coco_stats(ds, found).stats and r.seconds["inference"] == pytest.approx(.003)
    assert capfd.readouterr() == ("", "")
    json.dumps(r.to_dict(), allow_nan=False)
    r.save_detections(tmp_path / "d.json")
    same(r, pycocotools_stats(coco_of(ds), json.loads((tmp_path / "d.json").read_text())))
    (tmp_path / ds.paths[3]).unlink()
    session = Replay(ds, found)
    with pytest.raises(InputError, match=ds.paths[3]): evaluate(session, ds, progress=False)
    assert session.max_detections == 77


def test_counting_is_quick():
    "72 images of some hundred detections: a small part of a second, and less than pycocotools takes."
    ds, _ = scene(5, n=72, p_flag=0)
    rng = rng_for(8)
    found = []
    for i in range(72):
        xy = rng.uniform(0, 400, (120, 2))
        found.append(
            as_detections(np.concatenate([xy, xy + rng.uniform(5, 150, (120, 2))], 1), rng.random(120),
                          rng.integers(0, 4, 120)))
    ours = []
    theirs = []
    rows = coco_results(found, ds.image_ids)
    for _ in range(3):
        start = time.perf_counter()
        coco_stats(ds, found)
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        pycocotools_stats(coco_of(ds), rows)
        theirs.append(time.perf_counter() - start)
    print(f"counting 72 images: {min(ours) * 1e3:.0f} ms, pycocotools {min(theirs) * 1e3:.0f} ms")
    assert min(ours) < min(theirs)


def fixtures():
    root = os.environ.get("JETSON_DET_DATA")
    if not root or not (Path(root) / "datasets/coco_fixtures").is_dir():
        pytest.skip("JETSON_DET_DATA names no folder with datasets/coco_fixtures")
    return Path(root) / "datasets/coco_fixtures"


def per_image(gt, rows):
    "COCO results as Detections in the order of sorted image ids, labels by sorted category ids."
    cats = {c: k for k, c in enumerate(sorted(c["id"] for c in gt["categories"]))}
    by = {int(im["id"]): [] for im in gt["images"]}
    for r in rows: by[int(r["image_id"])].append(r)
    # float64: two overlaps
    make = lambda rs: Detections(
        np.array([[x, y, x + w, y + h] for x, y, w, h in (r["bbox"] for r in rs)]).reshape(-1, 4),
        np.array([r["score"] for r in rs]), np.array([cats[r["category_id"]]
                                                      for r in rs], np.int64))  # are just at a threshold
    return [make(by[int(im["id"])]) for im in gt["images"]]


@pytest.mark.data
def test_a_hundred_real_images():
    folder = fixtures() / "val2014_100"
    gt, rows = (json.loads((folder/f"instances_val2014_{n}.json").read_text()) for n in ("100", "fakebbox100_results"))
    found = per_image(gt, rows)
    result = coco_stats(gt, found)
    same(result, pycocotools_stats(gt, rows))
    published = [.5046, .6970, .5730, .5856, .5194, .5014, .3868, .5937, .5954, .6398, .5664, .5643]
    np.testing.assert_allclose([result.stats[k] for k in NAMES], published, atol=6e-5)


@pytest.mark.data
@pytest.mark.parametrize("names", [("gt_dataset", "dt_dataset"), ("gt_ignore_test", "dt_ignore_test")])
def test_crowd_and_ignore_fixtures(names):
    gt, rows = (json.loads((fixtures() / f"{n}.json").read_text()) for n in names)
    for im in gt["images"]: im["id"] = int(im["id"])
    for a in gt["annotations"]:
        a["image_id"] = int(a["image_id"])
        a.setdefault("area", a["bbox"][2] * a["bbox"][3])
    found = per_image(gt, rows)
    gt_one = dict(gt, annotations=[dict(a, id=k) for k, a in enumerate(gt["annotations"], 1)])
    same(coco_stats(gt, found), pycocotools_stats(gt_one, rows))


@pytest.mark.data
def test_the_coco_model_on_other_classes():
    """The stored ONNX through a preset, on a photograph whose labels name the same things in another order and with
    capitals."""
    from jetson_det.models.session import open_artifact
    root = fixtures().parents[1]
    # as one sees them, to some pixels
    where = [[14, 231, 801, 740], [50, 398, 240, 902], [222, 404, 345, 860], [670, 390, 810, 878]]
    ds = DetDataset(root/"datasets/images", ("Forklift", "bus", "Person"), ["bus.jpg"], [[1080, 810]], [0]*4, where,
                    [1, 2, 2, 2])
    session = open_artifact(root / "models/yolox_nano_coco_416.onnx", contract="yolox", threads=1)
    r = evaluate(session, ds, progress=False)
    assert r.stats["AP50"] > .8 and r.unknown == ["Forklift"] and len(r.unused) == 78 and len(
        r.detections[0].scores) > 4
    with pytest.raises(InputError,
                       match="no class in common: the model knows person, bicycle, .* and 72 more; the data has RBC"):
        evaluate(session, DetDataset(ds.root, ("RBC",), ds.paths, ds.sizes, [0], where[:1], [0]), progress=False)


def test_an_area_of_no_class_forgives_every_class():
    "KITTI's DontCare: a detection inside it is neither right nor wrong, whatever its class."
    ds = DetDataset("d", ("car", "van"), ["a.png"], [(100, 200)], [0, 0], [(10, 10, 50, 50), (100, 0, 200, 100)],
                    [0, 0],
                    flags=[0, CROWD | IGNORE])
    found = [as_detections([(10, 10, 50, 50), (110, 10, 140, 40), (150, 50, 180, 90)], [.5, .9, .8], [0, 0, 1])]
    assert coco_stats(ds, found).stats["AP50"] == pytest.approx(1)
    assert coco_stats(ds.keep_boxes(np.array([True, False])), found).stats["AP50"] < 1.
