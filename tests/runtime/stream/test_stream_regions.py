"""Zones and lines: geometry against OpenCV, counts against the path that was walked. Runs under Python 3.6 too."""
import json

import cv2
import numpy as np
import pytest

from jetson_det.runtime.files import InputError
from jetson_det.runtime.stream.regions import (RegionCounter, _segment_distance, border_distance, crosses_itself,
                                               draw_regions, inside, point_of, read_regions)
from jetson_det.runtime.stream.tracker import Tracks

SIZE = (400, 600)  # h, w
BOX = {"name": "box", "zone": [[200, 100], [400, 100], [400, 300], [200, 300]], "coordinates": "pixels"}
GATE = {"name": "gate", "line": [[300, 300], [300, 100]], "coordinates": "pixels"}


def tracks_at(points, ids=None, labels=None):
    "Tracks whose foot points are these."
    points = np.float32(points).reshape(-1, 2)
    n = len(points)
    boxes = np.hstack([points - [10, 40], points + [10, 0]]).astype(np.float32)
    zeros = np.zeros(n, np.int64)
    return Tracks(boxes, np.full(n, .9, np.float32), zeros if labels is None else np.array(labels),
                  np.arange(1, n + 1) if ids is None else np.array(ids, np.int64), zeros, zeros)


def walk(counter, path, start=0, number=1):
    "The events of one object on this path; None: not seen."
    events = []
    for time, point in enumerate(path, start):
        events += counter(tracks_at([] if point is None else [point], [] if point is None else [number]), time)
    return events


def star(rng, corners):
    "A polygon that does not cross itself."
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
    radius = rng.uniform(20, 150, corners)
    return np.round(np.stack([200 + radius * np.cos(angles), 200 + radius * np.sin(angles)], 1) * 4) / 4


def test_inside_and_distance_equal_opencv():
    rng = np.random.RandomState(0)
    compared = 0
    for _ in range(60):
        polygon = star(rng, rng.randint(3, 12))
        points = rng.uniform(20, 380, (60, 2))
        points = np.vstack([points, polygon[rng.randint(0, len(polygon), 10)] + [0, 30], np.round(points[:20])])
        contour = polygon.astype(np.float32).reshape(-1, 1, 2)
        theirs = np.array([cv2.pointPolygonTest(contour, (float(x), float(y)), True) for x, y in points])
        away = np.abs(theirs) > 1e-3
        np.testing.assert_array_equal(inside(points, polygon)[away], theirs[away] > 0)
        np.testing.assert_allclose(border_distance(points, polygon), np.abs(theirs), atol=1e-3)
        compared += away.sum()
    assert compared > 5000


def test_zones_that_share_a_border_share_no_point():
    "A grid of points, also on every border and corner, in four triangles that make up a square."
    points = np.stack(np.meshgrid(np.arange(0, 9), np.arange(0, 9)), -1).reshape(-1, 2).astype(float)
    corners = np.array([[0, 0], [8, 0], [8, 8], [0, 8]])
    parts = [inside(points, np.array([corners[k], corners[(k + 1) % 4], [4, 4]])) for k in range(4)]
    assert np.sum(parts, axis=0).max() == 1
    np.testing.assert_array_equal(np.sum(parts, axis=0) == 1, inside(points, corners))
    np.testing.assert_array_equal(inside(points, corners), inside(points, corners[::-1])) # either way around
    assert inside(np.zeros((0, 2)), corners).shape == (0,)


def test_segment_distance():
    found = _segment_distance([[0, 5], [-3, -4], [20, 0]], [[0, 0], [7, 7]], [[10, 0], [7, 7]])
    np.testing.assert_allclose(found, [[5, 53 ** .5], [5, 221 ** .5], [10, 218 ** .5]])


@pytest.mark.parametrize("polygon, is_wrong", [
    ([[0, 0], [4, 0], [4, 4], [0, 4]], False),
    ([[0, 0], [4, 0], [4, 4]], False),
    ([[0, 0], [2, 0], [4, 0], [4, 4]], False),           # a corner on a straight side
    ([[0, 0], [4, 4], [4, 0], [0, 4]], True),            # an hourglass
    ([[0, 0], [4, 0], [2, 0]], True),                    # no area
    ([[0, 0], [4, 0], [4, 4], [4, 0]], True),            # there and back
    ([[0, 0], [4, 0], [4, 4], [2, 0], [0, 4]], True),    # a corner on another side
    ([[0, 0], [0, 0], [4, 0], [4, 4]], True),            # a point twice
    ([[0, 0], [2, 2], [4, 0], [4, 4], [2, 2], [0, 4]], True), # two triangles that touch
])
def test_borders_that_cross(polygon, is_wrong):
    for k in range(len(polygon)):
        turned = polygon[k:] + polygon[:k]
        assert crosses_itself(turned) == crosses_itself(turned[::-1]) == is_wrong


def test_crossing_equals_shapely():
    shapely = pytest.importorskip("shapely.geometry")
    rng = np.random.RandomState(3)
    seen = set()
    for _ in range(1500):
        polygon = rng.randint(0, rng.choice([4, 50]), (rng.randint(3, 7), 2)).astype(float)
        wrong = crosses_itself(polygon)
        has_twins = len(np.unique(polygon, axis=0)) < len(polygon) # shapely lets neighbors be equal
        if has_twins: assert wrong
        else: assert wrong == (not shapely.Polygon(polygon).is_valid)
        seen.add((wrong, has_twins))
    assert seen == {(True, True), (True, False), (False, False)}


def test_inside_equals_shapely():
    shapely = pytest.importorskip("shapely.geometry")
    rng = np.random.RandomState(4)
    for _ in range(40):
        polygon = star(rng, rng.randint(3, 10))
        area = shapely.Polygon(polygon)
        points = rng.uniform(20, 380, (40, 2))
        np.testing.assert_array_equal(inside(points, polygon), [area.contains(shapely.Point(p)) for p in points])
        np.testing.assert_allclose(border_distance(points, polygon),
                                   [area.exterior.distance(shapely.Point(p)) for p in points], atol=1e-9)


@pytest.mark.parametrize("given, message", [
    ("yard", "regions must be a list"),
    (["yard"], "region 1 must be a mapping"),
    ([{"zone": []}], "region 1 needs a name"),
    ([{"name": "a"}], "'a' needs either zone or line"),
    ([{"name": "a", "zone": [[0, 0], [1, 0], [1, 1]], "line": [[0, 0], [1, 1]]}], "either zone or line"),
    ([{"name": "a", "zone": [[0, 0], [1, 0]]}], "zone 'a': 2 points; a zone needs 3 or more"),
    ([{"name": "a", "zone": [[0, 0], [1, 0], [0, 0]]}], "crosses or touches itself"),
    ([{"name": "a", "zone": [[0, 0], [1, 1], [1, 0], [0, 1]]}], "crosses or touches itself"),
    ([{"name": "a", "zone": [[0, 0], [1, 0], [1, 1.5]]}], "outside the frame; relative coordinates go from 0 to 1"),
    ([{"name": "a", "zone": [[0, 0], [9, 0], [9, -1]], "coordinates": "pixels"}], "pixels begin at 0"),
    ([{"name": "a", "zone": [[0, 0], [1, 0], [1, float("nan")]]}], "must be pairs of numbers"),
    ([{"name": "a", "zone": [[0, 0], [1, 0], [1]]}], "must be pairs of numbers"),
    ([{"name": "a", "zone": "all"}], "must be pairs of numbers"),
    ([{"name": "a", "zone": None}], "must be pairs of numbers"),
    ([{"name": "a", "zone": [[0, 0, 0], [1, 0, 0], [1, 1, 0]]}], "must be pairs of numbers"),
    ([{"name": "a", "line": [[0, 0], [1, 0], [1, 1]]}], "line 'a': 3 points; a line has 2"),
    ([{"name": "a", "line": [[.5, .5], [.5, .5]]}], "both points are the same"),
    ([{"name": "a", "line": [[0, 0], [1, 1]], "point": "head"}], "point is 'head'; it is one of foot, center"),
    ([{"name": "a", "line": [[0, 0], [1, 1]], "coordinates": "meters"}], "it is one of relative, pixels"),
    ([{"name": "a", "line": [[0, 0], [1, 1]], "labels": ["car"]}], "labels must be a list of class numbers"),
    ([{"name": "a", "line": [[0, 0], [1, 1]], "color": 3, 7: 1}], "unknown key '7'"),
    ([{"name": "a", "line": [[0, 0], [1, 1]]}] * 2, "the name 'a' is given twice"),
])
def test_what_is_no_region(given, message):
    with pytest.raises(InputError) as error: read_regions(given)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_regions_that_do_not_fit_the_frame():
    with pytest.raises(InputError, match="outside the frame of 300x200"): RegionCounter(read_regions([BOX]), (200, 300))
    narrow = [{"name": "slit", "zone": [[100, 0], [104, 0], [104, 400], [100, 400]], "coordinates": "pixels"}]
    with pytest.raises(InputError, match="lower the margin"): RegionCounter(read_regions(narrow), SIZE, margin=.02)
    assert walk(RegionCounter(read_regions(narrow), SIZE, margin=.002), [(90, 50), (102, 50)])[0].kind == "entered"
    for wrong in (dict(margin=-1), dict(margin=.5), dict(patience=-1)):
        with pytest.raises(InputError, match="regions: "): RegionCounter([], SIZE, **wrong)
    counter = RegionCounter([], SIZE)
    counter(tracks_at([]), 3)
    with pytest.raises(InputError, match="must rise"): counter(tracks_at([]), 3)


def test_relative_and_pixels_are_the_same_place():
    relative = read_regions([{"name": "box", "zone": (np.array(BOX["zone"]) / [600, 400]).tolist()}])
    np.testing.assert_allclose(relative[0].in_pixels(SIZE), read_regions([BOX])[0].in_pixels(SIZE))
    np.testing.assert_allclose(relative[0].in_pixels((800, 1200)), np.array(BOX["zone"]) * 2)
    closed = read_regions([dict(BOX, zone=BOX["zone"] + BOX["zone"][:1])])
    assert len(closed[0].corners) == 4


def test_a_zone_counts_a_visit_once():
    counter = RegionCounter(read_regions([BOX]), SIZE) # margin: 4 pixels
    path = [(150, 200), (199, 200), (203, 200), (198, 200), (203, 200), (250, 200), (300, 200), (398, 200), (403, 200),
            (399, 200), (403, 200), (410, 200), (500, 200)]
    events = walk(counter, path)
    assert [(e.region, e.kind, e.id, e.time, e.dwell) for e in events] == [
        ("box", "entered", 1, 5, 0), ("box", "left", 1, 10, 5)]
    assert counter.counts()["box"] == {"present": 0, "entered": 1, "left": 1, "dwell": {}, "mean_dwell": 5}


@pytest.mark.parametrize("zone", [
    [[0, 0], [1, 0], [1, 1], [0, 1]], [[.3, .5], [.7, .5], [.7, 1], [.3, 1]], [[.4, 1], [.5, .2], [.6, 1]]])
def test_a_zone_goes_to_the_border_of_the_frame(zone):
    "Feet that are cut off, or predicted below the frame, are in a zone that ends there."
    for below in -2, 0, 60:
        counter = RegionCounter(read_regions([{"name": "a", "zone": zone}]), SIZE)
        assert [e.kind for e in walk(counter, [(300, 400 + below)] * 3)] == ["entered"]
    everything = RegionCounter(read_regions([{"name": "a", "zone": [[0, 0], [1, 0], [1, 1], [0, 1]]}]), SIZE)
    everything(tracks_at([(0, 0), (600, 400), (0, 400), (600, 0), (900, -50)]), 0)
    assert everything.counts()["a"]["entered"] == 5


def test_a_gate_goes_to_the_border_of_the_frame():
    counter = RegionCounter(read_regions([{"name": "a", "line": [[.5, 1], [.5, 0]]}]), SIZE)
    assert [e.kind for e in walk(counter, [(200, 430), (400, 430), (200, -30)])] == ["to_right", "to_left"]


def test_time_may_be_seconds():
    counter = RegionCounter(read_regions([BOX]), SIZE, patience=2)
    events = []
    for time, point in ((.5, (100, 200)), (1.25, (300, 200)), (4, (300, 220)), (4.5, (500, 200))):
        events += counter(tracks_at([point]), time)
    assert [(e.kind, e.dwell) for e in events] == [("entered", 0), ("left", 2.75)]


@pytest.mark.parametrize("hidden, kinds", [(1, ["entered"]), (10, ["entered"]), (11, ["entered", "left", "entered"])])
def test_a_hidden_track_stays_for_the_patience(hidden, kinds):
    counter = RegionCounter(read_regions([BOX]), SIZE, patience=10)
    events = walk(counter, [(300, 200)] * 3 + [None] * hidden + [(300, 200)])
    assert [e.kind for e in events] == kinds
    assert counter.counts()["box"]["present"] == 1
    if "left" in kinds: assert events[1].time == events[1].dwell == 2 # when it was last seen


def test_a_line_counts_by_direction():
    for path, right, left in (
            ([250, 290, 310, 350], 1, 0), ([350, 250], 0, 1), ([250, 350, 250, 350], 2, 1), ([250, 298], 0, 0),
            ([250, 298, 302, 297, 303, 298, 250], 0, 0),          # jitter, and back
            ([250, 298, 302, 297, 303, 298, 302, 350], 1, 0),     # jitter, and through
            ([250, 303], 0, 0), ([300, 350], 0, 0), ([298, 350], 1, 0), ([250, 304], 1, 0)):
        counter = RegionCounter(read_regions([GATE]), SIZE)
        events = walk(counter, [(x, 200) for x in path])
        assert counter.counts()["gate"] == {"to_right": right, "to_left": left}, path
        assert sorted(e.kind for e in events) == ["to_left"] * left + ["to_right"] * right


def test_a_line_is_a_segment():
    around = [(250, 200), (250, 50), (350, 50), (350, 200)]
    counter = RegionCounter(read_regions([GATE]), SIZE)
    assert walk(counter, around) == []
    through_and_around = around[:1] + [(350, 200), (350, 50), (250, 50), (250, 200)]
    assert [e.kind for e in walk(counter, through_and_around, start=10, number=2)] == ["to_right"]
    # around the end, back through the gate, around the end again, all within the margin
    sly = [(250, 90), (298, 90), (302, 90), (302, 110), (298, 110), (298, 90), (302, 90), (350, 90)]
    assert walk(counter, sly, start=20, number=3) == []


def test_a_hidden_step_through_the_gate_counts():
    counter = RegionCounter(read_regions([GATE]), SIZE, patience=10)
    assert [e.kind for e in walk(counter, [(250, 200)] + [None] * 8 + [(350, 200)])] == ["to_right"]
    assert walk(counter, [None] * 12 + [(250, 200)], start=20) == [] # forgotten: a new start


def test_points_and_labels():
    boxes = [[100, 50, 140, 150]]
    assert point_of(boxes).tolist() == [[120, 150]] and point_of(boxes, "center").tolist() == [[120, 100]]
    given = [dict(BOX, name="foot"), dict(BOX, name="center", point="center"), dict(BOX, name="cars", labels=[2, 3])]
    counter = RegionCounter(read_regions(given), SIZE)
    events = counter(tracks_at([(300, 115), (300, 200)], labels=[0, 3]), 0) # the first one's center is above the zone
    assert [(e.region, e.id, e.label) for e in events] == [
        ("foot", 1, 0), ("foot", 2, 3), ("center", 2, 3), ("cars", 2, 3)]
    assert json.loads(json.dumps(counter.counts()))["foot"]["present"] == 2


def test_counts_of_random_walks_agree_with_the_paths():
    "Without margin: present is who is inside now, and each line's balance is the change of sides within its length."
    rng = np.random.RandomState(5)
    region = [dict(BOX), {"name": "wall", "line": [[300, 400], [300, 0]], "coordinates": "pixels"}]
    for _ in range(20):
        counter = RegionCounter(read_regions(region), SIZE, margin=0, patience=1000)
        places = rng.uniform([50, 50], [550, 350], (6, 2))
        begin = places[:, 0] >= 300
        events = []
        for time in range(60):
            events += counter(tracks_at(places), time)
            counts = counter.counts()
            within = inside(point_of(tracks_at(places).boxes), np.array(BOX["zone"]))
            assert sorted(counts["box"]["dwell"]) == (np.flatnonzero(within) + 1).tolist()
            assert counts["box"]["entered"] - counts["box"]["left"] == counts["box"]["present"] == within.sum()
            balance = (places[:, 0] >= 300).sum() - begin.sum()
            assert counts["wall"]["to_right"] - counts["wall"]["to_left"] == balance
            places = np.clip(np.round(places + rng.normal(0, 25, places.shape)), 1, [599, 399])
        for number in range(1, 7): # of each track: in turn
            for kinds in ("entered", "left"), ("to_right", "to_left"):
                mine = [e.kind for e in events if e.id == number and e.kind in kinds]
                assert all(a != b for a, b in zip(mine, mine[1:]))


def test_drawing():
    frame = np.full(SIZE + (3,), 90, np.uint8)
    regions = read_regions([BOX, GATE, {"name": "corner", "line": [[0, 0], [1, 1]]}])
    counter = RegionCounter(regions, SIZE)
    counter(tracks_at([(300, 200)]), 0)
    names = draw_regions(frame, regions)
    counts = draw_regions(frame, regions, counter.counts())
    assert (frame == 90).all() and names.shape == frame.shape and (names != counts).any()
    assert (names[300, 210:390] != 90).any(-1).all() and (names[150, 250] == 90).all() # the border, not the zone
    right = (names[180:220, 303:330] != 90).any()
    left = (names[180:220, 270:297] != 90).any(-1)
    assert right and left.sum() < (names[180:220, 303:330] != 90).any(-1).sum()
    assert draw_regions(np.zeros((40, 60), np.uint8), regions[2:]).shape == (40, 60, 3)
