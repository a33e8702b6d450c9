"""The tracker beside ByteTrack's rules written out object by object, beside scipy, and beside supervision."""
import numpy as np
import pytest

pytest.importorskip("hypothesis")  # not under Python 3.6
pytest.importorskip("scipy")
from hypothesis import given, settings, strategies as st
from scipy.optimize import linear_sum_assignment

from jetson_det.runtime.geometry import as_detections, box_iou
from jetson_det.runtime.stream import tracker as module
from jetson_det.runtime.stream.tracker import Tracker, assign


def synthetic_film(seed, frames=60, objects=8, size=400, missing=.1, unsure=.15, clutter=.3, classes=1):
    "Detections of each frame: objects that walk, hide, are unsure, and boxes where nothing is."
    rng = np.random.RandomState(seed)
    center = rng.uniform(0, size, (objects, 2))
    velocity = rng.normal(0, 3, (objects, 2))
    sides = rng.uniform(30, 90, (objects, 2))
    labels = rng.randint(0, classes, objects)
    film = []
    for _ in range(frames):
        velocity += rng.normal(0, .3, (objects, 2))
        center += velocity
        sides *= np.exp(rng.normal(0, .01, (objects, 2)))
        half = sides / 2 * np.exp(rng.normal(0, .02, (objects, 2)))
        boxes = np.hstack([center - half, center + half])
        scores = np.where(rng.rand(objects) < unsure, rng.uniform(.05, .6, objects), rng.uniform(.6, .99, objects))
        seen = rng.rand(objects) >= missing
        extra = rng.poisson(clutter)
        corner = rng.uniform(0, size, (extra, 2))
        film.append(as_detections(
            np.vstack([boxes[seen], np.hstack([corner, corner + rng.uniform(20, 90, (extra, 2))])]),
            np.hstack([scores[seen], rng.uniform(.05, .95, extra)]),
            np.hstack([labels[seen], rng.randint(0, classes, extra)])))
    return film


MOVE = np.eye(8) + np.eye(8, k=4)
SEE = np.eye(4, 8)


def noise(height, position, velocity, aspect, aspect_velocity):
    p = position * height
    v = velocity * height
    return np.diag(np.square([p, p, aspect, p, v, v, aspect_velocity, v]))


class OneTrack:
    "One object, with the Kalman filter of the textbook: a state of 8 numbers and matrices of 8x8."
    def __init__(self, z, frame):
        self.x = np.r_[z, np.zeros(4)]
        self.P = noise(z[3], 2 / 20, 10 / 160, 1e-2, 1e-5)
        self.first = self.last = frame
        self.id = None
        self.status = "tentative"

    def predict(self):
        Q = noise(self.x[3], 1 / 20, 1 / 160, 1e-2, 1e-5)
        if self.status == "lost": self.x[7] = 0
        self.x = MOVE @ self.x
        self.P = MOVE @ self.P @ MOVE.T + Q

    def update(self, z):
        h = self.x[3] / 20
        R = np.diag(np.square([h, h, 1e-1, h]))
        S = SEE @ self.P @ SEE.T + R
        K = self.P @ SEE.T @ np.linalg.inv(S)
        self.x = self.x + K @ (z - SEE @ self.x)
        self.P = self.P - K @ S @ K.T

    @property
    def box(self):
        x, y, aspect, h = self.x[:4]
        w = aspect * h
        return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


def measure(box):
    x1, y1, x2, y2 = (float(v) for v in box)
    return np.array([(x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1) / (y2 - y1), y2 - y1])


class PlainTracker:
    "ByteTrack (arXiv 2110.06864), its Algorithm 1 with the states of the authors' code, an object at a time."
    def __init__(self, high=.5, low=.1, new=.6, buffer=30):
        self.high, self.low, self.new, self.buffer = high, low, new, buffer
        self.tracks = []
        self.count = 0
        self.calls = 0

    def match(self, tracks, found, rows, weighted, least, frame):
        cost = np.zeros((len(tracks), len(rows)))
        for i, track in enumerate(tracks):
            for j, row in enumerate(rows):
                gain = float(box_iou([track.box], [found.boxes[row]])[0, 0])
                if weighted: gain *= float(found.scores[row])
                same = track.label == found.labels[row]
                cost[i, j] = 1 - gain if same and gain > least else 1 - least
        pairs = [(i, j) for i, j in zip(*linear_sum_assignment(cost)) if cost[i, j] < 1 - least]
        for i, j in pairs:
            tracks[i].update(measure(found.boxes[rows[j]]))
            tracks[i].last = frame
            tracks[i].row = rows[j]
            self.confirm(tracks[i])
        return ([t for i, t in enumerate(tracks) if i not in [p[0] for p in pairs]],
                [r for j, r in enumerate(rows) if j not in [p[1] for p in pairs]])

    def confirm(self, track):
        track.status = "tracked"
        if track.id is None:
            self.count += 1
            track.id = self.count

    def __call__(self, found, frame):
        "The ids by row of the detections; 0: none."
        for track in self.tracks: track.predict()
        high = [i for i, s in enumerate(found.scores) if s >= self.high]
        low = [i for i, s in enumerate(found.scores) if self.low < s < self.high]
        tracked = [t for t in self.tracks if t.status == "tracked"]
        lost = [t for t in self.tracks if t.status == "lost"]
        tentative = [t for t in self.tracks if t.status == "tentative"]
        left, high = self.match(tracked + lost, found, high, True, .2, frame)
        left, _ = self.match([t for t in left if t in tracked], found, low, False, .5, frame)
        for track in left: track.status = "lost"
        left, high = self.match(tentative, found, high, True, .3, frame)
        self.tracks = [t for t in self.tracks if t not in left]
        for row in high:
            if found.scores[row] < self.new: continue
            track = OneTrack(measure(found.boxes[row]), frame)
            track.label = found.labels[row]
            track.row = row
            if self.calls == 0: self.confirm(track)
            self.tracks.append(track)
        self.calls += 1
        self.tracks = [t for t in self.tracks if frame - t.last <= self.buffer]
        doomed = []
        for a in self.tracks:
            for b in self.tracks:
                if a.status == "lost" or b.status != "lost" or a.label != b.label: continue
                if box_iou([a.box], [b.box])[0, 0] > .85: doomed.append(b if a.last - a.first > b.last - b.first else a)
        self.tracks = [t for t in self.tracks if t not in doomed]
        ids = np.zeros(len(found.scores), int)
        for track in self.tracks:
            if track.status == "tracked": ids[track.row] = track.id
        return ids


def ids_by_row(tracks, found):
    "The id of each detection; 0: none. The tracker returns the detector's own boxes."
    ids = np.zeros(len(found.scores), int)
    for box, number in zip(tracks.boxes, tracks.ids):
        row, = np.flatnonzero((found.boxes == box).all(1))
        ids[row] = number
    return ids


@pytest.mark.parametrize("seed", range(6))
def test_same_ids_as_the_rules_object_by_object(seed):
    film = synthetic_film(seed, frames=40, classes=1 + seed % 3, size=300 if seed < 4 else 150)
    ours = Tracker(buffer=5)
    plain = PlainTracker(buffer=5)
    for frame, found in enumerate(film):
        np.testing.assert_array_equal(ids_by_row(ours(found, frame), found), plain(found, frame))
    assert plain.count >= 8


def renamed(rows):
    "Ids by their order of appearance, so that two trackers can be compared."
    names = {}
    return [[names.setdefault(int(i), len(names)) if i > 0 else -1 for i in row] for row in rows]


@pytest.mark.parametrize("seed", range(8))
def test_same_identities_as_supervision(seed):
    supervision = pytest.importorskip("supervision")
    film = synthetic_film(seed, size=1500, clutter=0, missing=.05)
    film = [as_detections(*(column[one.scores != .5] for column in one)) for one in film]
    ours = Tracker()
    theirs = supervision.ByteTrack(track_activation_threshold=.5)
    a, b = [], []
    for frame, found in enumerate(film):
        a.append(ids_by_row(ours(found, frame), found))
        result = theirs.update_with_detections(supervision.Detections(
            xyxy=found.boxes.astype(np.float64), confidence=found.scores.astype(np.float64),
            class_id=found.labels, data={"row": np.arange(len(found.scores))}))
        ids = np.zeros(len(found.scores), int)
        if len(result): ids[result.data["row"]] = result.tracker_id
        b.append(ids)
    assert renamed(a) == renamed(b)
    assert max(map(max, renamed(a))) >= 7


@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 30), st.sampled_from([0, .2, .5]),
       st.sampled_from([0, 4]))
@settings(max_examples=150, deadline=None)
def test_assign_is_as_good_as_scipy(seed, n, m, least, steps):
    rng = np.random.RandomState(seed)
    gain = rng.rand(n, m)
    gain[rng.rand(n, m) < rng.rand()] = 0 # most pairs don't touch
    if steps: gain = np.round(gain * steps) / steps
    rows, columns = assign(gain, least)
    value = np.maximum(gain - least, 0)
    best = value[linear_sum_assignment(value, maximize=True)].sum()
    assert (gain[rows, columns] > least).all()
    assert len(set(rows.tolist())) == len(rows) == len(set(columns.tolist()))
    np.testing.assert_allclose((gain[rows, columns] - least).sum(), best, atol=1e-9)


@given(st.integers(0, 10**6), st.lists(st.booleans(), min_size=1, max_size=30))
@settings(max_examples=40, deadline=None)
def test_four_small_filters_are_the_large_one(seed, seen):
    rng = np.random.RandomState(seed)
    box = np.float32([50, 60, 50 + rng.uniform(5, 200), 60 + rng.uniform(5, 200)])
    one = OneTrack(measure(box), 0)
    motion = module._start(module._measure(box[None]))
    for is_seen in seen:
        one.status = "tracked" if is_seen else "lost"
        one.predict()
        motion = module._advance(motion, np.array([not is_seen]))
        if is_seen:
            box = box + np.float32(rng.normal(0, 1, 4))
            one.update(measure(box))
            motion = module._correct(motion, module._measure(box[None]))
        P = np.diag(motion.position_variance[0].tolist() + motion.velocity_variance[0].tolist())
        P[np.arange(4), np.arange(4) + 4] = P[np.arange(4) + 4, np.arange(4)] = motion.covariance[0]
        np.testing.assert_allclose(np.r_[motion.position[0], motion.velocity[0]], one.x, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(P, one.P, rtol=1e-6, atol=1e-10)


@given(st.integers(0, 10**6), st.integers(1, 3), st.booleans())
@settings(max_examples=25, deadline=None)
def test_the_order_of_boxes_changes_nothing(seed, classes, has_ties):
    rng = np.random.RandomState(seed)
    straight = Tracker(buffer=4)
    shuffled = Tracker(buffer=4)
    highest = 0
    for frame, found in enumerate(synthetic_film(seed, frames=15, size=200, classes=classes)):
        if has_ties:
            found = as_detections(np.round(found.boxes / 20) * 20, np.round(found.scores * 5) / 5, found.labels)
        order = rng.permutation(len(found.scores))
        a = straight(found, frame)
        b = shuffled(type(found)(*(column[order] for column in found)), frame)
        for x, y in zip(a, b): np.testing.assert_array_equal(x, y)
        # what holds for every film
        assert len(set(a.ids.tolist())) == len(a.ids) <= len(found.scores)
        assert (a.missed == 0).all() and (a.age >= 0).all()
        new = a.ids[a.ids > highest]
        assert sorted(new.tolist()) == list(range(highest + 1, highest + 1 + len(new)))
        highest += len(new)
        pool = set(map(tuple, found.boxes.tolist()))
        assert all(tuple(box) in pool for box in a.boxes.tolist())
