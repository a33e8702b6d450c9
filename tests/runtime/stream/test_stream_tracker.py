"""Identities that stay: crossing, hidden, unsure, skipped. Runs under Python 3.6 too."""
from itertools import permutations

import numpy as np
import pytest

from jetson_det.runtime.draw import draw
from jetson_det.runtime.files import InputError
from jetson_det.runtime.geometry import as_detections, box_iou
from jetson_det.runtime.stream.tracker import Tracker, assign


def walker(frame, speed=4, x=0, y=50, width=40, height=90, label=0, score=.9):
    "One row of a film: a box that moves to the right."
    left = x + speed * frame
    return [left, y, left + width, y + height], score, label


def film_frame(rows):
    boxes, scores, labels = zip(*rows) if rows else ((), (), ())
    return as_detections(boxes, scores, labels)


def id_at(tracks, box):
    "The id of the track whose box this is."
    overlap = box_iou(tracks.boxes, [box])[:, 0]
    assert (overlap > .5).sum() == 1
    return int(tracks.ids[overlap.argmax()])


def best_sum(gain, least):
    "By trying every assignment."
    n, m = gain.shape
    if n > m: return best_sum(gain.T, least)
    return max(sum(max(gain[i, j] - least, 0) for i, j in enumerate(columns)) for columns in permutations(range(m), n))


def test_assign_finds_the_best_of_all_assignments():
    rng = np.random.RandomState(0)
    for _ in range(300):
        n, m = rng.randint(1, 6, 2)
        gain = rng.rand(n, m)
        if rng.rand() < .5: gain = np.round(gain * 4) / 4 # with ties
        least = rng.choice([0, .25, .6])
        rows, columns = assign(gain, least)
        assert (gain[rows, columns] > least).all()
        assert len(set(rows)) == len(rows) == len(set(columns)) and (np.diff(rows) > 0).all()
        assert np.isclose((gain[rows, columns] - least).sum(), best_sum(gain, least))


def test_assign_without_pairs():
    for shape in (0, 0), (0, 3), (3, 0), (3, 3):
        rows, columns = assign(np.zeros(shape))
        assert len(rows) == len(columns) == 0
    rows, columns = assign(np.array([[np.nan, .5], [np.nan, np.nan]]))
    assert rows.tolist() == [0] and columns.tolist() == [1]


def test_objects_that_cross_keep_their_ids():
    tracker = Tracker()
    for frame in range(80):
        a = walker(frame)
        b = walker(-frame, x=320, y=55)
        tracks = tracker(film_frame([a, b]), frame)
        if frame == 0: first = id_at(tracks, a[0])
        assert sorted(tracks.ids.tolist()) == [1, 2]
        if frame not in range(30, 51): assert id_at(tracks, a[0]) == first # apart


@pytest.mark.parametrize("gap, is_kept", [(1, True), (9, True), (10, True), (11, False), (25, False)])
def test_a_hidden_object_comes_back_up_to_the_buffer(gap, is_kept):
    tracker = Tracker(buffer=10)
    for frame in range(20): tracker(film_frame([walker(frame)]), frame)
    for frame in range(20, 20 + gap): assert len(tracker(film_frame([]), frame).ids) == 0
    seen = [tracker(film_frame([walker(frame)]), frame).ids.tolist() for frame in range(20 + gap, 24 + gap)]
    assert seen[-1] == ([1] if is_kept else [2])
    if is_kept: assert seen[0] == [1]
    else: assert seen[0] == [] # tentative


def test_skipped_frames_count_like_empty_ones():
    for gap in range(14):
        empty = Tracker(buffer=10)
        skipped = Tracker(buffer=10)
        for tracker in (empty, skipped):
            for frame in range(15): tracker(film_frame([walker(frame)]), frame)
        for frame in range(15, 15 + gap): empty(film_frame([]), frame)
        for frame in range(15 + gap, 18 + gap):
            a = empty(film_frame([walker(frame)]), frame)
            b = skipped(film_frame([walker(frame)]), frame)
            assert a.ids.tolist() == b.ids.tolist()


def test_low_scores_hold_a_track_and_start_none():
    tracker = Tracker()
    for frame in range(60):
        rows = [walker(frame, score=.9 if frame < 10 else .15), walker(0, x=500, score=.4), walker(0, x=700, score=.05)]
        tracks = tracker(film_frame(rows), frame)
        assert tracks.ids.tolist() == [1] and tracks.missed.tolist() == [0]
    ignored = Tracker(low_score=.2)
    for frame in range(12):
        tracks = ignored(film_frame([walker(frame, score=.9 if frame < 10 else .15)]), frame)
    assert len(tracks.ids) == 0


def test_a_lost_track_is_not_found_by_a_low_score():
    tracker = Tracker()
    for frame in range(10): tracker(film_frame([walker(frame)]), frame)
    tracker(film_frame([]), 10)
    assert len(tracker(film_frame([walker(11, score=.3)]), 11).ids) == 0
    assert tracker(film_frame([walker(12)]), 12).ids.tolist() == [1]


def test_a_flash_gets_no_id():
    tracker = Tracker()
    tracker(film_frame([walker(0)]), 0)
    tracker(film_frame([walker(1), walker(0, x=600)]), 1)
    tracker(film_frame([walker(2)]), 2)
    for frame in (3, 4, 5): tracks = tracker(film_frame([walker(frame), walker(0, x=600)]), frame)
    assert sorted(tracks.ids.tolist()) == [1, 2]  # the flash took no number
    assert dict(zip(tracks.ids.tolist(), tracks.age.tolist())) == {1: 5, 2: 2}


@pytest.mark.parametrize("shift, score, is_kept", [(60, .9, True), (64, .9, False),   # IoU x score: .225 and .198
                                                   (29, .3, True), (38, .3, False)])  # IoU: .55 and .45
def test_how_far_a_box_may_be_from_its_track(shift, score, is_kept):
    tracker = Tracker()
    for frame in range(8): tracker(film_frame([walker(0, width=100)]), frame)
    tracks = tracker(film_frame([walker(0, x=shift, width=100, score=score)]), 8)
    assert tracks.ids.tolist() == ([1] if is_kept else [])


@pytest.mark.parametrize("shift, is_kept", [(47, True), (53, False)]) # IoU x score: .324 and .276
def test_how_far_a_box_may_be_from_a_tentative_track(shift, is_kept):
    tracker = Tracker()
    tracker(film_frame([]), 0)
    assert len(tracker(film_frame([walker(0, width=100)]), 1).ids) == 0
    assert len(tracker(film_frame([walker(0, x=shift, width=100)]), 2).ids) == is_kept


@pytest.mark.parametrize("label, offset, is_one", [(0, 4, True), (0, 20, False), (1, 4, False)])
def test_a_lost_track_ends_where_an_older_one_passes(label, offset, is_one):
    "Two tracks at one place are one object: IoU over .85 with the older one, of its class."
    tracker = Tracker(buffer=60)
    for frame in range(60):
        rows = [walker(frame, x=-40, width=100)]
        if 3 <= frame < 10 or frame >= 57: rows.append(walker(0, x=80, y=50 + offset, width=100, label=label))
        tracks = tracker(film_frame(rows), frame)
        assert 1 in tracks.ids
    assert sorted(tracks.ids.tolist()) == ([1, 3] if is_one else [1, 2])


def test_only_new_score_starts():
    for new_score, count in (None, 0), (.5, 1):
        tracker = Tracker(high_score=.5, new_score=new_score)
        for frame in range(4): tracks = tracker(film_frame([walker(frame, score=.55)]), frame)
        assert len(tracks.ids) == count


def test_classes_are_kept_apart():
    aware = Tracker()
    loose = Tracker(class_aware=False)
    for frame in range(10):
        found = film_frame([walker(frame, label=frame >= 5)])
        tracks = aware(found, frame)
        assert loose(found, frame).ids.tolist() == [1]
    assert tracks.ids.tolist() == [2] and tracks.labels.tolist() == [1]
    two = Tracker()
    for frame in range(10): tracks = two(film_frame([walker(frame), walker(frame, label=3, score=.8)]), frame)
    assert tracks.ids.tolist() == [1, 2] and tracks.labels.tolist() == [0, 3]


def test_ids_are_never_given_twice():
    tracker = Tracker(buffer=1)
    seen = set()
    for film in range(3):
        now = set()
        for frame in range(40):
            tracks = tracker(film_frame([walker(0, x=150 * (frame // 4 % 3))]), frame)
            now |= set(tracks.ids.tolist())
        assert now and not now & seen
        seen |= now
        tracker.reset()


def test_predict_changes_nothing_that_follows():
    rng = np.random.RandomState(1)
    plain = Tracker(buffer=5)
    filled = Tracker(buffer=5)
    frame = 0
    for _ in range(60):
        for between in range(frame + 1, frame + rng.randint(1, 9)):
            if frame: filled.predict(between)
            frame = between
        frame += 1
        rows = [walker(frame, speed=2, y=100 * k) for k in range(5) if rng.rand() < .8]
        a = plain(film_frame(rows), frame)
        b = filled(film_frame(rows), frame)
        for x, y in zip(a, b): np.testing.assert_array_equal(x, y)


def test_predicted_boxes_follow():
    tracker = Tracker()
    for frame in range(0, 100, 2): tracker(film_frame([walker(frame)]), frame)
    for frame in range(99, 110):
        tracks = tracker.predict(frame)
        assert box_iou(tracks.boxes, [walker(frame)[0]])[0, 0] > .9
        assert tracks.missed.tolist() == [frame - 98] and tracks.age.tolist() == [frame]


def test_a_shrinking_box_stays_a_box():
    tracker = Tracker(buffer=60)
    for frame in range(8):
        side = 200 * .8 ** frame
        tracks = tracker(as_detections([[100, 100, 100 + side, 100 + side]], [.9], [0]), frame)
    assert tracks.ids.tolist() == [1]
    for frame in range(8, 60):
        boxes = tracker.predict(frame).boxes
        assert len(boxes) == 1 and np.isfinite(boxes).all() and (boxes[:, 2:] >= boxes[:, :2]).all()


def test_columns_are_typed_and_sorted():
    tracker = Tracker()
    rows = [walker(0, y=100 * k, score=.6 + .05 * k, label=k) for k in range(5)]
    for tracks in (tracker(film_frame([]), 0), tracker(film_frame(rows), 3), tracker.predict()):
        assert [c.dtype.name for c in tracks] == ["float32", "float32", "int64", "int64", "int64", "int64"]
        assert tracks.boxes.shape == (len(tracks.ids), 4) and (np.diff(tracks.scores) <= 0).all()
    tracks = tracker(film_frame(rows), 10)
    np.testing.assert_array_equal(tracks.boxes, film_frame(rows).boxes) # the detector's own pixels
    frame = np.zeros((600, 200, 3), np.uint8)
    np.testing.assert_array_equal(draw(frame, tracks.detections, "abcde"), draw(frame, film_frame(rows), "abcde"))


def test_what_cannot_be_followed():
    tracker = Tracker()
    empty = as_detections([[5, 5, 5, 50], [9, 9, 1, 1]], [.9, .9], [0, 0])
    for frame in range(3): assert len(tracker(empty, frame).ids) == 0
    for wrong in np.nan, np.inf:
        with pytest.raises(InputError, match="NaN or inf"): tracker(as_detections([[0, 0, 5, wrong]], [.9], [0]), 5)
    with pytest.raises(InputError, match="each box needs both"):
        tracker(as_detections([[0, 0, 5, 5]], [.9], [0])._replace(scores=np.zeros(2)))
    tracker(film_frame([]), 5) # a refused frame has not been counted
    for index in 5, 4, 0:
        with pytest.raises(InputError, match="must rise"): tracker(film_frame([]), index)
        with pytest.raises(InputError, match="must rise"): tracker.predict(index)


@pytest.mark.parametrize("settings", [dict(low_score=.6), dict(high_score=1.2), dict(low_score=-.1), dict(new_score=.2),
                                      dict(buffer=-1), dict(buffer=1.5)])
def test_settings_out_of_order(settings):
    with pytest.raises(InputError, match="tracker: "): Tracker(**settings)
