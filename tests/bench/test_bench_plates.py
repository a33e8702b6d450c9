"""What the benchmark of plates counts."""
import importlib
from pathlib import Path

import cv2
import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "bench"))
    return importlib.import_module("bench_plates")


def test_photos_with_their_labels(bench, tmp_path):
    cv2.imwrite(str(tmp_path / "a.jpg"), np.full((40, 60, 3), 90, np.uint8))
    (tmp_path / "a.txt").write_text("a.jpg\t10\t20\t30\t8\tAB12\na.jpg\t1\t2\t12\t4\tCD34\n")
    photo, = bench.read_photos(tmp_path, ["a.jpg"])
    assert photo.boxes.tolist() == [[10, 20, 40, 28], [1, 2, 13, 6]]
    assert photo.texts == ("AB12", "CD34") and photo.image.shape == (40, 60, 3)


@pytest.mark.parametrize("boxes, texts, counted", [
    ([[10, 20, 40, 28]], ["AB12"], (1, 1, 0)),
    ([[10, 20, 40, 28]], ["A812"], (1, 0, 0)),
    ([[10, 20, 22, 28]], ["AB12"], (0, 0, 1)),  # IoU .4
    ([[50, 0, 59, 8], [10, 20, 39, 28]], ["AB12", "AB12"], (1, 1, 1)),
    ([[50, 0, 59, 8], [10, 20, 39, 28]], ["AB12", ""], (1, 0, 1)), # the text of another box is no reading
    ([], [], (0, 0, 0)),
])
def test_plates_found_and_read(bench, boxes, texts, counted):
    photo = bench.Photo("a.jpg", None, np.float32([[10, 20, 40, 28]]), ("AB12",))
    assert bench.judge([photo], [(boxes, texts)]) == counted


def test_the_ratio_and_its_interval(bench):
    rng = np.random.RandomState(0)
    peer = rng.uniform(10, 20, (12, 9))
    row = bench.ratio_of(1.5 * peer, peer)
    assert (row["all"], row["fastest"]) == pytest.approx((1.5, 1.5))
    assert row["interval"] == pytest.approx((1.5, 1.5))
    low, high = bench.ratio_of(rng.uniform(10, 20, (12, 9)), peer)["interval"]
    assert low < 1 < high


def test_fewer_exact_readings_are_a_miss(bench):
    peer = {"found": 16, "exact": 14, "exact_crops": 15}
    assert bench.reads_as_many({"ours": peer, "fast-alpr": peer})
    for key in peer: assert not bench.reads_as_many({"ours": dict(peer, **{key: 13}), "fast-alpr": peer})
