"What leaves the board."
import os
import stat
import threading

import cv2
import numpy as np
import pytest

from jetson_det.runtime.files import InputError
from jetson_det.runtime.geometry import as_detections
from jetson_det.runtime.ops import privacy
from jetson_det.runtime.ops.privacy import PrivacyRules, apply_privacy, blur_boxes, hash_text, read_key, read_privacy
from jetson_det.runtime.stream.result import FrameResult

KEY = b"k" * 32


def frame(texts=("AB 12", None), image=None):
    image = np.random.RandomState(0).randint(0, 256, (60, 90, 3)).astype(np.uint8) if image is None else image
    boxes = as_detections([[10, 10, 40, 30], [50, 20, 80, 50]], [.9, .8], [0, 1])
    return FrameResult("gate", 3, 1.7e9, image, boxes, ("plate", "person"), texts=texts)


def test_hash_is_hmac_sha256_of_letters_and_digits():
    "RFC 4231, test case 2: key Jefe; its data has spaces and a mark, so the digest is that of the letters alone."
    import hashlib
    import hmac
    expected = hmac.new(b"Jefe", b"WHATDOYAWANTFORNOTHING", hashlib.sha256).hexdigest()[:16]
    assert hash_text("what do ya want for nothing?", b"Jefe") == expected
    assert hash_text("ab-12 c", KEY) == hash_text("AB12C", KEY) != hash_text("AB12D", KEY)
    assert hash_text("AB12C", KEY) != hash_text("AB12C", b"l" * 32)
    assert hash_text(" -", KEY) == "" and len(hash_text("\udcff\u00d6\u0416", KEY)) == 16


def test_texts():
    given = frame()
    assert apply_privacy(given, PrivacyRules()) is given
    assert apply_privacy(given, PrivacyRules("drop")).texts is None
    assert apply_privacy(given, PrivacyRules("hash", KEY)).texts == (hash_text("AB12", KEY), None)
    assert given.texts == ("AB 12", None)
    assert "kkk" not in repr(PrivacyRules("hash", KEY)) + str(PrivacyRules("hash", KEY))


def test_blur_covers_the_boxes_alone_and_copies():
    given = frame()
    before = given.image.copy()
    shown = apply_privacy(given, PrivacyRules(blur=("person",)))
    assert (given.image == before).all()
    changed = (shown.image != before).any(2)
    assert changed[18:52, 48:82].mean() > .9 and not changed[:, :46].any()
    assert apply_privacy(given, PrivacyRules(blur=("person",)), image=False) is given
    with pytest.raises(InputError, match="'people'"): apply_privacy(given, PrivacyRules(blur=("people",)))


def test_a_blurred_plate_can_not_be_told_from_another():
    "Two plates, blurred: less apart than one of them is from itself moved by two pixels."
    plates = []
    for text in ("AB 123 CD", "XK 987 WZ"):
        image = np.full((60, 200, 3), 255, np.uint8)
        cv2.putText(image, text, (10, 42), cv2.FONT_HERSHEY_SIMPLEX, 1.1, (0, 0, 0), 3)
        plates.append(image)
    blurred = [blur_boxes(p, [[0, 0, 200, 60]]).astype(float) for p in plates]
    moved = np.roll(plates[0], 2, 1).astype(float)
    assert abs(blurred[0] - blurred[1]).mean() < abs(plates[0] - moved).mean() / 2
    edges = [cv2.Laplacian(i.astype(np.uint8), cv2.CV_64F).var() for i in (plates[0], blurred[0])]
    assert edges[1] < edges[0] / 1000


def test_boxes_beyond_the_image():
    image = np.random.RandomState(0).randint(0, 256, (20, 30, 3)).astype(np.uint8)
    odd = [[-1e9, -5, 1e9, 5], [np.nan] * 4, [40, 40, 50, 50], [5, 5, 5, 5], [9, 9, 3, 3], [29, 19, 31, 21]]
    assert blur_boxes(image, odd).shape == image.shape
    assert blur_boxes(image, []) is image


def test_key_file(tmp_path):
    path = tmp_path / "new" / "key"
    key = read_key(path)
    assert len(key) == 32 and key == read_key(path) and os.listdir(str(path.parent)) == ["key"]
    assert stat.S_IMODE(os.stat(str(path)).st_mode) == 0o600
    os.chmod(str(path), 0o640)
    with pytest.raises(InputError, match="chmod 600"): read_key(path)
    short = tmp_path / "short"
    short.write_bytes(b"x")
    os.chmod(str(short), 0o600)
    with pytest.raises(InputError, match="this file has 1"): read_key(short)
    with pytest.raises(InputError): read_key(tmp_path)
    with pytest.raises(InputError): read_key(short / "key")


def test_two_processes_make_one_key(tmp_path):
    keys = []
    threads = [threading.Thread(target=lambda: keys.append(read_key(tmp_path / "key"))) for _ in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len(keys) == 8 and len(set(keys)) == 1


def test_no_hard_links(tmp_path, monkeypatch):
    def refuse(*_): raise OSError(1, "Operation not permitted")
    monkeypatch.setattr(privacy.os, "link", refuse)
    assert len(read_key(tmp_path / "key")) == 32 and os.listdir(str(tmp_path)) == ["key"]


@pytest.mark.parametrize("settings, place", [
    ([], "privacy must be"), ({"text": "hash"}, "privacy.text:"), ({"texts": "Hash"}, "privacy.texts"),
    ({"texts": True}, "privacy.texts"), ({"blur": "person"}, "privacy.blur"), ({"blur": [1]}, "privacy.blur"),
    ({"texts": "hash"}, "privacy.key_file"), ({"texts": "hash", "key_file": 3}, "privacy.key_file")])
def test_settings_are_checked(tmp_path, settings, place):
    with pytest.raises(InputError, match=place): read_privacy(settings, tmp_path)


def test_settings(tmp_path):
    assert read_privacy(None) == PrivacyRules()
    rules = read_privacy({"texts": "hash", "key_file": "k", "blur": ["person"]}, tmp_path)
    assert rules.key == (tmp_path / "k").read_bytes() and rules.blur == ("person",)
