"""Image files: headers, files that are no whole images, hashes, the same image twice, what is remembered."""
import os
import struct
import time
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from jetson_det.data.dataset import DetDataset
from jetson_det.data.formats.registry import read_dataset
from jetson_det.data.images.header import image_header
from jetson_det.data.images.duplicates import clusters, near_duplicates, same_image
from jetson_det.data.images.facts import (ImageInfo, inspect_image, inspect_images, is_truncated, stack_facts,
                                          trim_folder)
from jetson_det.data.images import facts as images
from jetson_det.runtime.images import upright
from jetson_det.scenes.docks import dock_scene


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JETSON_DET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def encoded(img, suffix=".jpg", *params): return cv2.imencode(suffix, img, params)[1].tobytes()
def decoded(data, flags=cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION):
    return cv2.imdecode(np.frombuffer(data, np.uint8), flags)


@pytest.fixture(scope="module")
def scene(): return dock_scene(3, (233, 311))[0]


def tiff_note(orientation, order):
    "A TIFF structure with a long tag before the orientation."
    return (b"II" if order == "<" else b"MM") + struct.pack(order + "HIHHHIIHHIHHI", 42, 8, 2, 256, 4, 1, 99, 274, 3, 1,
                                                            orientation, 0, 0)


def with_exif(jpg, orientation, order="<"):
    note = b"Exif\0\0" + tiff_note(orientation, order)
    return jpg[:2] + b"\xff\xe1" + struct.pack(">H", len(note) + 2) + note + jpg[2:]


def chunk(name, data): return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
def png_of(w, h, bits=8, color=2, extra=b""):
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, bits, color, 0, 0, 0)) + extra + chunk(
        b"IDAT", zlib.compress(b"\0"*99)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix, params, kind", [
    (".jpg", (), "jpeg"), (".jpg", (cv2.IMWRITE_JPEG_PROGRESSIVE, 1), "jpeg"), (".png", (), "png"),
    (".bmp", (), "bmp"), (".webp", (cv2.IMWRITE_WEBP_QUALITY, 80), "webp"),
    (".webp", (cv2.IMWRITE_WEBP_QUALITY, 101), "webp"), (".tiff", (), "tiff"), (".gif", (), "gif"),
])
def test_headers_of_every_type(scene, suffix, params, kind):
    h = image_header(encoded(scene, suffix, *params))
    assert (h.kind, h.size, h.bits, h.orientation, h.animated) == (kind, (233, 311), 8, 1, False) and h.channels == 3


def test_channels_and_bits(scene):
    gray = scene[..., 0]
    alpha = cv2.cvtColor(scene, cv2.COLOR_BGR2BGRA)
    alpha[:9, :9, 3] = 100
    look = lambda img, suffix: image_header(encoded(img, suffix))[2:4]
    assert look(gray, ".jpg") == (1, 8) and look(gray, ".png") == (1, 8) and look(gray, ".tiff") == (1, 8)
    assert look(alpha, ".png") == (4, 8) and look(alpha, ".webp") == (4, 8) and look(alpha, ".bmp") == (4, 8)
    assert look(scene.astype(np.uint16) * 257, ".png") == (3, 16) and look(gray.astype(np.uint16), ".tiff") == (1, 16)
    assert image_header(png_of(5, 4, 4, 3)).channels == 3 and image_header(png_of(5, 4, 4, 3)).bits == 8
    assert image_header(png_of(5, 4, 8, 3, chunk(b"tRNS", b"\0"))).channels == 4
    assert image_header(png_of(5, 4, 8, 4)).channels == 2 and image_header(png_of(5, 4, 8, 2, chunk(b"acTL",
                                                                                                    b"\0"*8))).animated


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("k", range(1, 9))
def test_orientation_as_opencv_turns_it(scene, k, order):
    data = with_exif(encoded(scene), k, order)
    assert image_header(data).orientation == k and image_header(data).size == (233, 311)
    assert np.array_equal(upright(decoded(data), k), decoded(data, cv2.IMREAD_COLOR))
    png = encoded(scene, ".png")
    png = png[:33] + chunk(b"eXIf", tiff_note(k, order)) + png[33:]
    assert image_header(png).orientation == k and np.array_equal(upright(scene, k), decoded(png, cv2.IMREAD_COLOR))


def test_orientations_that_cannot_be(scene):
    for bad in (0, 9, 65535): assert image_header(with_exif(encoded(scene), bad)).orientation == 1
    whole = with_exif(encoded(scene), 6)
    for cut in range(30): image_header(whole[:20 + cut])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_headers_survive_damage(data):
    img = np.arange(30 * 40 * 3, dtype=np.uint8).reshape(30, 40, 3)
    b = bytearray(
        with_exif(encoded(img), 6) if (
            k := data.draw(st.integers(0, 4))) == 0 else encoded(img, (".png", ".webp", ".tiff", ".bmp")[k - 1]))
    for _ in range(data.draw(st.integers(1, 8))):
        b[data.draw(st.integers(0, min(len(b), 120) - 1))] = data.draw(st.integers(0, 255))
    b = bytes(b[:data.draw(st.integers(0, len(b)))])
    h = image_header(b)
    assert len(h.size) == 2 and 1 <= h.orientation <= 8
    is_truncated(b)


@pytest.mark.parametrize("suffix, params", [
    (".jpg", ()), (".jpg", (cv2.IMWRITE_JPEG_PROGRESSIVE, 1)), (".png", ()), (".webp", ()),
])
def test_truncation_at_every_place(scene, suffix, params):
    data = encoded(cv2.resize(scene, (80, 60)), suffix, *params)
    assert not is_truncated(data) and not is_truncated(data + b"trailing bytes" * 99)
    for cut in range(12, len(data) - 8, 37): assert is_truncated(data[:cut]), cut


def test_bytes_between_segments_are_no_truncation(scene):
    data = encoded(scene)
    assert not is_truncated(data[:2] + b"\xff\xfe\0\4ab" + b"\0\0\0" + data[2:])


def test_what_is_wrong_with_a_file(tmp_path, scene):
    jpg = encoded(scene)
    files = {
        "a.jpg": jpg, "cut.jpg": jpg[:-900], "empty.jpg": b"", "page.jpg": b"  <html>404</html>",
        "lfs.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
        "heic.jpg": b"\0\0\0\x18ftypheic" + b"\0"*90, "text.jpg": b"no image", "bomb.png": png_of(60000, 60000),
        "bomb.webp": encoded(scene, ".webp")[:12], "scan.jpg": b"\xff\xd8\xff\xda not an image \xff\xd9"
    }
    for name, data in files.items(): (tmp_path / name).write_bytes(data)
    start = time.time()
    looks = {name: inspect_image(tmp_path / name) for name in [*files, "gone.jpg", "."]}
    assert time.time() - start < 2 # the bomb was not decoded
    assert {k: v.problem
            for k, v in looks.items()} == {
                "a.jpg": "", "cut.jpg": "truncated-image", "empty.jpg": "empty-image", "page.jpg": "unreadable-image",
                "lfs.jpg": "unreadable-image", "heic.jpg": "unreadable-image", "text.jpg": "unreadable-image",
                "bomb.png": "huge-image", "bomb.webp": "truncated-image", "scan.jpg": "unreadable-image",
                "gone.jpg": "missing-image", ".": "missing-image"
            }
    assert "git lfs pull" in looks["lfs.jpg"].message and "web page" in looks["page.jpg"].message and "HEIC" in looks[
        "heic.jpg"].message and "60000x60000" in looks["bomb.png"].message
    assert all("\n" not in v.message for v in looks.values()) and looks["a.jpg"].hash and not looks["cut.jpg"].hash


def test_a_size_that_is_just_not_huge(tmp_path):
    (tmp_path / "a.png").write_bytes(png_of(images._MAX_PIXELS // 1000, 1000))
    (tmp_path / "b.png").write_bytes(png_of(images._MAX_PIXELS // 1000 + 1, 1000))
    assert inspect_image(tmp_path / "b.png").problem == "huge-image"
    assert inspect_image(tmp_path / "a.png").problem != "huge-image"


# Hashes

def edits(img):
    h, w = img.shape[:2]
    size = lambda s: (round(w * s), round(h * s))
    yield "quality 30", encoded(img, ".jpg", cv2.IMWRITE_JPEG_QUALITY, 30)
    yield "smaller", encoded(cv2.resize(img, size(.6), interpolation=cv2.INTER_AREA))
    yield "much smaller", encoded(cv2.resize(img, size(.35), interpolation=cv2.INTER_AREA))
    yield "larger", encoded(cv2.resize(img, size(1.5), interpolation=cv2.INTER_CUBIC))
    yield "square", encoded(cv2.resize(img, (416, 416)))
    yield "brighter", encoded(cv2.convertScaleAbs(img, alpha=1, beta=12))
    yield "contrast", encoded(cv2.convertScaleAbs(img, alpha=.85, beta=10))
    yield "PNG", encoded(cv2.resize(img, size(.5), interpolation=cv2.INTER_AREA), ".png")
    yield "blurred", encoded(cv2.GaussianBlur(img, (3, 3), 0))


def written(folder, pictures, splits=None):
    folder.mkdir(exist_ok=True)
    for k, data in enumerate(pictures): (folder / f"{k}.jpg").write_bytes(data)
    return DetDataset(folder, ("s", ), [f"{k}.jpg" for k in range(len(pictures))], [(1, 1)]*len(pictures),
                      splits=splits)


def test_edited_copies_are_found_and_other_scenes_are_not(tmp_path):
    scenes = [dock_scene(k, (240 + 7 * k, 320 + 5 * k))[0] for k in range(24)]
    pictures = [encoded(s) for s in scenes]
    source = list(range(24))
    for k in range(0, 24, 3):
        for _, data in edits(scenes[k]):
            pictures = pictures + [data]
            source = source + [k]
    facts = inspect_images(written(tmp_path / "d", pictures), keep=False)
    found = clusters(len(facts), near_duplicates(facts))
    assert np.array_equal(found, source) # every copy with its scene, no scene with another


def test_turned_by_a_note_or_stored_turned(tmp_path, scene):
    pictures = [with_exif(encoded(scene), k)
                for k in range(1, 9)] + [encoded(np.ascontiguousarray(upright(scene, k))) for k in range(1, 9)]
    facts = inspect_images(written(tmp_path / "d", pictures), keep=False)
    for a, b in zip(facts.hashes[:8].tolist(), facts.hashes[8:].tolist()): assert (a ^ b).bit_count() <= 4
    assert same_image(facts.thumbs[:8], facts.thumbs[8:]).all()


def test_pictures_without_structure_have_no_hash(tmp_path):
    rng = np.random.default_rng(0)
    flat = [encoded(np.clip(rng.normal(g, 3, (200, 300, 3)), 0, 255).astype(np.uint8)) for g in (0, 3, 128, 128, 255)]
    facts = inspect_images(written(tmp_path / "d", flat), keep=False)
    assert not facts.hashes.any() and near_duplicates(facts) == []


def facts_of(hashes, thumbs): return stack_facts([ImageInfo(hash=int(h), thumb=t) for h, t in zip(hashes, thumbs)])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 80), st.integers(0, 12))
def test_all_pairs_within_the_distance_are_connected(seed, n, most):
    "Against all with all, on hashes that are near each other."
    rng = np.random.default_rng(seed)
    hashes = rng.integers(1, 2**63, 4, np.uint64)[rng.integers(0, 4, n)]
    for _ in range(most):
        hashes ^= np.where(rng.random(n) < .5, np.uint64(1) << rng.integers(0, 64, n).astype(np.uint64), np.uint64(0))
    thumbs = np.repeat(rng.integers(0, 255, (1, 16, 16), np.uint8), n, 0)
    near = [(i, j)
            for i in range(n)
            for j in range(i)
            if hashes[i] and hashes[j] and int(hashes[i] ^ hashes[j]).bit_count() <= 7]
    pairs = near_duplicates(facts_of(hashes, thumbs))
    assert np.array_equal(clusters(n, pairs), clusters(n, near))
    assert pairs == sorted(pairs) and all(i < j
                                          for i, j in pairs) and len(pairs) == n - len(set(clusters(n, pairs).tolist()))


def test_the_same_hash_is_not_enough():
    rng = np.random.default_rng(0)
    thumbs = rng.integers(0, 255, (6, 16, 16), np.uint8)
    assert near_duplicates(facts_of([7] * 6, thumbs)) == []
    assert near_duplicates(facts_of([7] * 6, thumbs[[0, 1, 0, 2, 1, 0]])) == [(0, 2), (0, 5), (1, 4)]


@given(st.integers(1, 40), st.lists(st.tuples(st.integers(0, 39), st.integers(0, 39)), max_size=60))
def test_clusters(n, pairs):
    pairs = [(i % n, j % n) for i, j in pairs]
    found = clusters(n, pairs)
    label = list(range(n))
    for _ in range(n):
        for i, j in pairs: label[i] = label[j] = min(label[i], label[j])
    assert [label.index(l) for l in label] == [found.tolist().index(f) for f in found]
    assert list(dict.fromkeys(found.tolist())) == list(range(len(set(label))))


@pytest.mark.slow
def test_many_images_take_seconds():
    n = 120_000
    rng = np.random.default_rng(0)
    hashes = rng.integers(1, 2**63, n, np.uint64)
    thumbs = rng.integers(0, 255, (n, 16, 16), np.uint8)
    hashes[1::2] = hashes[::2] ^ np.uint64(0b1001000000000001000000010000000001000000000000000100)
    thumbs[1::2] = thumbs[::2]
    facts = facts_of(hashes, thumbs)
    start = time.time()
    assert len(near_duplicates(facts)) == n // 2 and time.time() - start < 30
    hashes[:] = hashes[0]
    thumbs[:] = thumbs[0]
    start = time.time()
    assert len(near_duplicates(facts_of(hashes, thumbs))) == n - 1 and time.time() - start < 30


# What is remembered

def count_reads(monkeypatch):
    reads = []
    monkeypatch.setattr(images, "inspect_image", lambda p: reads.append(p) or inspect_image(p))
    return reads


def aged(folder):
    for f in folder.iterdir(): os.utime(f, (1e9, 1e9))


def equal(a, b):
    return all(
        np.array_equal(getattr(a, f), getattr(b, f)) and getattr(a, f).dtype == getattr(b, f).dtype for f in vars(a))


def test_the_second_look_reads_nothing(tmp_path, monkeypatch, scene):
    ds = written(tmp_path / "d", [encoded(scene), encoded(scene)[:900], b""])
    (tmp_path / "d/2.jpg").unlink()
    aged(tmp_path / "d")
    reads = count_reads(monkeypatch)
    told = []
    first = inspect_images(ds, progress=lambda *a: told.append(a))
    assert len(reads) == 3 and told == [(1, 3), (2, 3), (3, 3)]
    again = inspect_images(ds)
    assert len(reads) == 4 and equal(first, again) # the missing one is asked for again
    part = inspect_images(ds.subset([1]))
    assert len(reads) == 4 and equal(part, first.pick([1]))
    assert sorted(f.name for f in (tmp_path / "d").iterdir()) == ["0.jpg", "1.jpg"]


def test_a_changed_file_is_read_again(tmp_path, monkeypatch, scene):
    ds = written(tmp_path / "d", [encoded(scene), encoded(scene[::-1].copy())])
    aged(tmp_path / "d")
    first = inspect_images(ds)
    reads = count_reads(monkeypatch)
    (tmp_path / "d/1.jpg").write_bytes(encoded(scene))
    os.utime(tmp_path / "d/1.jpg", (1e9 + 5, 1e9 + 5))
    second = inspect_images(ds)
    assert len(reads) == 1 and second.digests[0] == second.digests[1] != first.digests[1]
    assert equal(inspect_images(ds), second) and len(reads) == 1
    # just now: not remembered, so a second change at once is seen
    (tmp_path / "d/0.jpg").write_bytes(encoded(scene[:, ::-1].copy()))
    inspect_images(ds), inspect_images(ds)
    assert len(reads) == 3


def test_a_change_of_the_same_length_with_the_old_time_is_read(tmp_path, monkeypatch, scene):
    "As an editor or `rsync --times` leaves it: the time of the last change of any kind tells."
    ds = written(tmp_path / "d", [encoded(scene, ".bmp")])
    aged(tmp_path / "d")
    first = inspect_images(ds)
    reads = count_reads(monkeypatch)
    ds.path_of(0).write_bytes(encoded(scene[::-1].copy(), ".bmp"))
    aged(tmp_path / "d")
    assert inspect_images(ds).digests[0] != first.digests[0] and len(reads) == 1


def test_rows_of_other_images_stay_and_gone_ones_leave(tmp_path, monkeypatch, scene):
    ds = written(tmp_path / "d", [encoded(np.roll(scene, 9 * k, 1)) for k in range(4)])
    aged(tmp_path / "d")
    whole = inspect_images(ds, keep=False)
    inspect_images(ds.subset([0, 1])), (tmp_path / "d/0.jpg").unlink(), inspect_images(ds.subset([2, 3]))
    reads = count_reads(monkeypatch)
    assert equal(inspect_images(ds.subset([3, 1])), whole.pick([3, 1])) and not reads
    known, facts = images._recall(ds.root)
    assert sorted(known) == ["1.jpg", "2.jpg", "3.jpg"] and len(facts) == 3


@pytest.mark.parametrize("damage", [
    lambda b: b"", lambda b: b[:len(b) // 2], lambda b: b"PK nothing", lambda b: b[:200] + b"\xff" * 50 + b[250:],
])
def test_a_damaged_memory_is_made_again(tmp_path, cache, damage, scene):
    ds = written(tmp_path / "d", [encoded(scene)])
    aged(tmp_path / "d")
    first = inspect_images(ds)
    file, = (cache / "images").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert equal(inspect_images(ds), first)


def test_odd_names_and_a_cache_that_cannot_be_written(tmp_path, monkeypatch, scene):
    names = ["a b#%.jpg", "Säcke 袋.jpg", os.fsdecode(b"\xff\xfe.jpg")]
    (tmp_path / "d").mkdir()
    for n in names: (tmp_path / "d" / n).write_bytes(encoded(scene))
    aged(tmp_path / "d")
    ds = DetDataset(tmp_path / "d", ("s",), names, [(1, 1)] * 3)
    first = inspect_images(ds)
    reads = count_reads(monkeypatch)
    assert equal(inspect_images(ds), first) and not reads
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JETSON_DET_CACHE", str(tmp_path / "file"))
    assert equal(inspect_images(ds), first)


def test_the_memory_is_bounded(tmp_path, cache, scene):
    for k in range(5):
        d = written(tmp_path / f"d{k}", [encoded(scene)])
        aged(tmp_path / f"d{k}")
        inspect_images(d)
        os.utime(images._memory_file(d.root), (2e9 + k, 2e9 + k))
    files = sorted((cache / "images").iterdir(), key=lambda f: f.stat().st_mtime)
    trim_folder(cache / "images", max_files=100, max_bytes=sum(f.stat().st_size for f in files[3:]))
    assert sorted(files[3:]) == sorted((cache / "images").iterdir())


def test_nothing_at_all():
    empty = stack_facts([])
    assert len(empty) == 0 and near_duplicates(empty) == [] and clusters(
        0, []).tolist() == [] and empty.thumbs.shape == (0, 16, 16)


# Real data

@pytest.mark.data
@pytest.mark.parametrize("name, pairs", [
    ("bccd", [("BloodImage_00037", "BloodImage_00038")]), ("kangaroo", [("00007", "00033")]), ("plates_eu", []),
    ("raccoon", [
        ("raccoon-11", "raccoon-116"), ("raccoon-120", "raccoon-83"), ("raccoon-21", "raccoon-45"),
        ("raccoon-50", "raccoon-52"), ("raccoon-50", "raccoon-74"), ("raccoon-65", "raccoon-98"),
    ]),
])
def test_real_pairs(data, name, pairs):
    "Each pair was looked at: bccd's are one sample in two focuses, the others are copies."
    ds = read_dataset(data / "datasets" / name)
    facts = inspect_images(ds)
    stem = lambda i: ds.paths[i].rsplit("/", 1)[-1].rsplit(".", 1)[0]
    assert sorted(tuple(sorted((stem(i), stem(j)))) for i, j in near_duplicates(facts)) == pairs


@pytest.mark.data
@pytest.mark.parametrize("name", ["bccd", "raccoon", "plates_eu"])
def test_real_copies_are_found(data, name, tmp_path):
    ds = read_dataset(data / "datasets" / name)
    rows = np.arange(0, len(ds), max(len(ds) // 12, 1))
    pictures = [encoded(ds.image(i), ".jpg", cv2.IMWRITE_JPEG_QUALITY, 92) for i in rows]
    copies = [d for p in pictures for _, d in edits(decoded(p))]
    facts = inspect_images(written(tmp_path / "d", pictures + copies), keep=False)
    found = clusters(len(facts), near_duplicates(facts))
    source = np.repeat(found[:len(rows)], len(copies) // len(rows))
    assert (found[len(rows):] == source).mean() >= .97


@pytest.mark.data
@pytest.mark.parametrize("name, near, far", [
    ("car-detection.mp4", .4, .01), ("bottle-detection.mp4", .8, .03), ("one-by-one-person-detection.mp4", .8, .08),
])
def test_frames_of_a_camera(data, name, near, far, tmp_path):
    "Neighboring frames are mostly one image; eight seconds and more apart they are only where nothing has moved."
    reader = cv2.VideoCapture(str(data / "videos" / name))
    frames = []
    while len(frames) < 380 and (got := reader.read())[0]:
        frames.append(cv2.resize(got[1], (160, 90), interpolation=cv2.INTER_AREA))
    facts = inspect_images(written(tmp_path / "d", [encoded(f) for f in frames]), keep=False)
    alike = lambda lag: (np.bitwise_count(facts.hashes[lag:] ^ facts.hashes[:-lag]) <= 7) & same_image(
        facts.thumbs[lag:], facts.thumbs[:-lag])
    assert alike(1).mean() >= near and alike(240).mean() <= far
