"""Predictions beside their sources: no photograph is replaced, and no name ends the run of the others."""
import io
import json
import os
import shutil
import tarfile
import warnings
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from predict_sources import count_frames, digests, middle_session, put_film, put_image, visible

from jetson_det.runtime import predict as module
from jetson_det.runtime.files import InputError
from jetson_det.runtime.outputs import MARKER
from jetson_det.runtime.predict import check_prediction, predict
from jetson_det.runtime.stream.sources import check_source, list_images, natural_key, open_source


def boxes_of(folder):
    "What predictions.json holds: name -> number of boxes, in order."
    found = json.loads((folder / "predictions.json").read_text(encoding="utf-8"))
    assert found["complete"] is True and found["classes"] == ["Sack", "Person"]
    return {row["name"]: len(row["detections"]) for row in found["frames"]}


@pytest.fixture
def photos(tmp_path):
    for name in ("a.jpg", "b.png", "day/a.jpg"): put_image(tmp_path / "photos" / name)
    put_film(tmp_path / "photos" / "v.mp4", 3)
    os.symlink(str(tmp_path / "photos"), str(tmp_path / "link"))
    return tmp_path / "photos"


@pytest.mark.parametrize("source, out", [
    ("photos", "photos"), ("photos", "photos/"), ("photos", "./photos/day/.."), ("photos", "link"), ("link", "photos"),
    ("photos", "."), ("photos/day", "photos"), ("photos/a.jpg", "photos"), ("photos/v.mp4", "photos"),
    ("photos/v.mp4", "link"), ("photos/v.mp4", "."), ("photos", "photos/day"), ("photos", "photos/a.jpg"),
    ("photos/a.jpg", "photos/a.jpg"),
    ("photos/v.mp4", "photos/v.mp4"), ("photos/b.png", "link/day"), ("photos", "photos/a.jpg/x"),
])
def test_no_source_is_replaced(photos, source, out, monkeypatch):
    monkeypatch.chdir(str(photos.parent))
    before = digests(photos.parent)
    for check in (lambda: check_prediction(source, out), lambda: predict(middle_session(), source, out)):
        with pytest.raises(InputError) as e: check()
        assert "\n" not in str(e.value) and str(Path(out)) in str(e.value)
    assert digests(photos.parent) == before


def test_letters_in_another_case(photos, tmp_path):
    "On a disk that ignores case, PHOTOS is photos."
    if not os.path.exists(str(tmp_path / "PHOTOS")): pytest.skip("this disk tells A from a")
    with pytest.raises(InputError): predict(middle_session(), photos, tmp_path / "PHOTOS")


def test_names_stay_apart(tmp_path):
    src = tmp_path / "src"
    for k, name in enumerate(("a.jpg", "a.png", "x/y.jpg", "x_y.jpg", "A.JPG", "x/Y.bmp", "a.png.jpg")):
        put_image(src / name, 20 * k, (96, 128))
    done = predict(middle_session(), src, tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())["frames"]
    assert done.frames == 7 and done.is_complete
    for row in rows:  # each drawing is that of its image: its corner has the same gray
        drawn = cv2.imread(str(tmp_path / "out" / row["image"]))
        assert abs(int(drawn[-1, -1, 0]) - int(cv2.imread(str(src / row["name"]))[-1, -1, 0])) <= 2
    assert len({row["image"].lower() for row in rows}) == 7
    assert visible(tmp_path / "out") == sorted(["predictions.json"] + [row["image"] for row in rows])
    assert {row["name"]: row["image"] for row in rows}["x/y.jpg"] == "x/y.jpg"


def test_a_second_prediction_replaces_the_first(photos, tmp_path):
    out = tmp_path / "out"
    predict(middle_session(), photos, out)
    assert visible(out) == ["a.jpg", "b.jpg", "day/a.jpg", "predictions.json"]
    (tmp_path / "one").mkdir()
    put_image(tmp_path / "one" / "c.png")
    done = predict(middle_session(), tmp_path / "one", out)
    assert done.replaced == 4 and "4 files of an earlier prediction there were removed first" in str(done)
    assert visible(out) == ["c.jpg", "predictions.json"] and list(boxes_of(out)) == ["c.png"]
    predict(middle_session(), photos / "v.mp4", out)
    assert visible(out) == ["predictions.json", "v.mp4"]


@pytest.mark.parametrize("name", ["a.jpg", "day/a.jpg", "predictions.json"])
def test_what_a_person_changed_is_not_replaced(photos, tmp_path, name):
    "A second prediction that would write a file of that name does not begin; another one leaves it where it is."
    out = tmp_path / "out"
    predict(middle_session(), photos, out)
    shutil.copy(str(photos / "b.png"), str(out / name))
    before = digests(out)
    with pytest.raises(InputError, match=name + " was changed since predict wrote it.*another folder"):
        predict(middle_session(), photos, out)
    assert digests(out) == before
    if name == "predictions.json":
        with pytest.raises(InputError, match="was changed since"): check_prediction(photos, out)  # before a model
        return
    done = predict(middle_session(), photos / "v.mp4", out)
    assert done.kept == [name] and "changed since an earlier prediction and kept: " + name in str(done)
    assert visible(out) == sorted([name, "predictions.json", "v.mp4"]) and digests(out)[name] == before[name]


def test_an_error_names_what_was_typed(photos, tmp_path, monkeypatch):
    "The folder as it was given, and no file that nobody named."
    monkeypatch.chdir(str(tmp_path))
    for check in (check_prediction, lambda source, out: predict(middle_session(), source, out)):
        with pytest.raises(InputError) as e: check("photos", "photos/a.jpg/deep")
        assert str(e.value).startswith("photos/a.jpg/deep: cannot be written: ") and "deep/x" not in str(e.value)
    def full(self, row): raise OSError(28, "No space left on device", str(self.path))
    monkeypatch.setattr(module.ResultLines, "add", full)
    with pytest.raises(InputError, match="^new: predictions.jsonl cannot be written there: No space left"):
        predict(middle_session(), "photos", "new")


@pytest.mark.parametrize("names, count", [(["a.mp4"], "1 video"), (["b.MOV", "day/a.avi", "notes.txt"], "2 videos")])
def test_a_folder_of_videos(tmp_path, names, count):
    for name in names:
        (tmp_path / "films" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "films" / name).write_bytes(b"")
    with pytest.raises(InputError, match="films: holds {} and no images.*such as ".format(count)) as e:
        predict(middle_session(), tmp_path / "films", tmp_path / "out")
    assert str(e.value).endswith(str(tmp_path / "films" / names[0])) and not (tmp_path / "out").exists()


def test_a_failed_prediction_leaves_the_first(photos, tmp_path):
    predict(middle_session(), photos, tmp_path / "out")
    before = digests(tmp_path / "out")
    for source in (tmp_path / "absent", tmp_path / "out" / "a.jpg"):
        with pytest.raises(InputError): predict(middle_session(), source, tmp_path / "out")
    assert digests(tmp_path / "out") == before


def test_the_default_folder_inside_the_source(photos, monkeypatch):
    "`predict MODEL .` twice: the second one doesn't see the images of the first."
    monkeypatch.chdir(str(photos))
    for _ in range(2):
        done = predict(middle_session(), ".", "predictions")
        assert list(boxes_of(photos / "predictions")) == ["a.jpg", "b.png", "day/a.jpg"]
    assert "results of jetson-det skipped (predictions)" in str(done)
    own = []
    list_images(photos, own)
    assert own == ["predictions"]


ODD = [b"caf\xe9.jpg", "line\nbreak.jpg", "carriage\rreturn.png", "separator\u2028and\u2029.jpg",
       "next\x85line.jpg", "tab\x0b\x0cfeed.jpg", "\x1c\x1d\x1e.jpg", "\x1b[31mred.jpg", "ü²³½.jpg",
       "\u202egpj.exe.jpg", "  .jpg", "'\"<b>&.jpg", "-x.jpg", "%d%s{}.jpg", "z" * 241 + ".jpg",
       "ü" * 124 + ".png", "a.b.c.jpg", "\U0001f600.jpg", "\\.jpg", "con.jpg"]


def test_any_name(tmp_path):
    src = os.fsencode(str(tmp_path)) + b"/src"
    for name in ODD: put_image(src + b"/" + os.fsencode(name))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = predict(middle_session(), tmp_path / "src", tmp_path / "out")
    assert done.is_complete and done.frames == len(ODD)
    names = {os.fsencode(name) for name in boxes_of(tmp_path / "out")}
    assert names == {os.fsencode(name) for name in ODD}
    text = (tmp_path / "out" / "predictions.json").read_bytes()
    rows = json.loads(text.decode("utf-8"))["frames"]  # UTF-8, whatever the names are
    for row in rows: assert os.path.isfile(os.path.join(str(tmp_path / "out"), row["image"]))
    str(done).encode("utf-8")  # can be printed


def test_folders_of_any_name(tmp_path):
    "Source and results in folders that are not UTF-8, and a film there."
    odd = os.fsdecode(os.fsencode(str(tmp_path)) + b"/d\xe9p\xf4t\n")
    put_image(os.path.join(odd, "src", "a.png"))
    put_film(tmp_path / "v.mp4", 5)
    shutil.move(str(tmp_path / "v.mp4"), os.path.join(odd, os.fsdecode(b"f\xeblm.mp4")))
    predict(middle_session(), os.path.join(odd, "src"), os.path.join(odd, "out"))
    done = predict(middle_session(), os.path.join(odd, os.fsdecode(b"f\xeblm.mp4")), os.path.join(odd, "film"))
    assert done.frames == 5 and done.is_complete
    assert sorted(os.listdir(os.path.join(odd, "out"))) == [MARKER, "a.jpg", "predictions.json"]
    shutil.copy(os.path.join(odd, "film", os.fsdecode(b"f\xeblm.mp4")), str(tmp_path / "back.mp4"))
    assert count_frames(tmp_path / "back.mp4") == 5


def test_an_image_that_cannot_be_written(tmp_path, monkeypatch):
    "The path of one result is too long: a warning, everything else is written, and the result says so."
    deep = "/".join(["d" * 200] * 3)
    monkeypatch.chdir(str(tmp_path))
    put_image(tmp_path / "src" / "a.png")
    put_image(tmp_path / "src" / deep / "b.png")
    put_image(tmp_path / "src" / "c.png")
    before = module.save_jpeg
    def save(folder, name, image):
        if name.endswith("/b.jpg"): raise OSError(36, "File name too long", name)
        before(folder, name, image)
    monkeypatch.setattr(module, "save_jpeg", save)
    with pytest.warns(UserWarning, match="b.png|b.jpg.*not written: File name too long"):
        done = predict(middle_session(), "src", "out")
    assert done.frames == 3 and not done.is_complete and len(done.failed) == 1
    assert len(boxes_of(tmp_path / "out")) == 3 and visible(tmp_path / "out") == ["a.jpg", "c.jpg", "predictions.json"]
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())["frames"]
    assert [row["image"] for row in rows if row["name"].endswith("b.png")] == [None]


def test_a_path_that_is_too_long(tmp_path, monkeypatch):
    "A tree that can be read by a short path and not written below a long one."
    monkeypatch.chdir(str(tmp_path))
    tail = "/".join(["d" * 250] * 15)
    try: put_image(os.fsencode("s/" + tail + "/b.png"))
    except OSError: pytest.skip("this system has shorter paths")
    put_image(tmp_path / "s" / "a.png")
    out = "o" * 200 + "/" + "p" * 200
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = predict(middle_session(), "s", out)
    assert done.frames == 2 and len(done.failed) == 1 and "too long" in str(caught[-1].message)
    assert len(boxes_of(tmp_path / out)) == 2 and (tmp_path / out / "a.jpg").exists()


def test_links_to_folders(tmp_path):
    put_image(tmp_path / "real" / "a.jpg")
    (tmp_path / "src").mkdir()
    os.symlink("../real", str(tmp_path / "src" / "linked"))
    os.symlink(str(tmp_path / "real"), str(tmp_path / "src" / "twice"))
    os.symlink("..", str(tmp_path / "src" / "around"))
    done = predict(middle_session(), tmp_path / "src", tmp_path.parent / (tmp_path.name + "-out"))
    assert done.frames == 1
    only = tmp_path / "only"
    only.mkdir()
    os.symlink(str(tmp_path / "real"), str(only / "linked"))
    predict(middle_session(), only, tmp_path / "out")
    assert visible(tmp_path / "out") == ["linked/a.jpg", "predictions.json"]
    assert sorted(boxes_of(tmp_path / "out")) == ["linked/a.jpg"]


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(str(tmp_path / "pipe.jpg"))
    os.mkfifo(str(tmp_path / "pipe.mp4"))
    os.symlink("/dev/zero", str(tmp_path / "zero.jpg"))
    os.symlink("gone", str(tmp_path / "broken.jpg"))
    for name in ("pipe.jpg", "pipe.mp4"):
        with pytest.raises(InputError, match=name + ": is a named pipe, not"): check_source(tmp_path / name)
    for name in ("pipe.jpg", "pipe.mp4", "zero.jpg", "/dev/zero", "file:///dev/zero", "/dev/tty", "/dev/null"):
        source = name if name.startswith(("/", "file:")) else str(tmp_path / name)
        for check in (check_source, open_source, lambda s: predict(middle_session(), s, tmp_path / "out")):
            with pytest.raises(InputError, match="not a regular file"): check(source)
    with pytest.raises(InputError, match="no such image"): check_source(tmp_path / "broken.jpg")
    put_image(tmp_path / "a.jpg")
    with pytest.warns(UserWarning, match="skipped"):
        done = predict(middle_session(), tmp_path, tmp_path.parent / "out" / tmp_path.name)
    assert done.frames == 1 and sorted(done.unreadable) == ["broken.jpg", "pipe.jpg", "zero.jpg"]
    assert str(done).endswith("; 3 images could not be read (skipped in predictions.json)") and done.is_complete
    written = json.loads((tmp_path.parent / "out" / tmp_path.name / "predictions.json").read_text())
    reasons = {row["name"]: row["why"] for row in written["skipped"]}
    assert sorted(reasons) == ["broken.jpg", "pipe.jpg", "zero.jpg"] and "named pipe" in reasons["pipe.jpg"]
    assert all(str(tmp_path) not in why and why for why in reasons.values())


def jpegs(count):
    rng = np.random.RandomState(0)
    frames = [rng.randint(0, 256, (60, 80, 3)).astype(np.uint8) for _ in range(count)]
    return [cv2.imencode(".jpg", frame)[1].tobytes() for frame in frames]


def archive(kind, files):
    "A ZIP or a TAR with stored files."
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as z:
            for k, data in enumerate(files): z.writestr("{}.jpg".format(k), data)
    else:
        with tarfile.open(fileobj=out, mode="w") as t:
            for k, data in enumerate(files):
                member = tarfile.TarInfo("{}.jpg".format(k))
                member.size = len(data)
                t.addfile(member, io.BytesIO(data))
    return out.getvalue()


def test_what_is_no_video_is_no_source(tmp_path):
    "FFmpeg draws a text as a film, and finds the images in an archive, a document, or anything else."
    images = jpegs(3)
    joined = b"".join(images)
    files = {
        "list.txt": b"images/00001.jpg\n" * 200, "names.ans": "größe.jpg\n".encode("utf-8") * 200,
        "latin": "größe.jpg\n".encode("latin-1") * 200, "wide.txt": "images/1.jpg\n".encode("utf-16") * 300,
        "page.nfo": b"<html>\x1b[31m\n" * 200, "a.zip": archive("zip", images), "b.tar": archive("tar", images),
        "film.mp4": archive("zip", images), "doc.pdf": b"%PDF-1.4\n\1\2" + joined,
        "array.npy": b"\x93NUMPY\1\0v\0" + bytes(3000) + joined, "own.dat": b"own\1\2\0" * 200 + joined,
        "sound.mp3": b"ID3\3\0\0\0\0\1\0APIC" + joined, "phone.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + joined,
        "empty": b"", "small.nfo": b"x",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=name + ": neither an image nor a video"): open_source(tmp_path / name)
    for name, kind in (("list.txt", "a text file"), ("a.zip", "a ZIP archive"), ("film.mp4", "a ZIP archive")):
        with pytest.raises(InputError, match="it is " + kind): check_source(tmp_path / name)


def test_an_image_under_another_name_is_an_image(tmp_path):
    image = np.full((24, 32, 3), 90, np.uint8)
    names = {"photo": ".jpg", "e.mp4": ".jpg", "f.avi": ".png", "g.txt": ".bmp", "h.webm": ".webp"}
    for name, suffix in sorted(names.items()):
        (tmp_path / name).write_bytes(cv2.imencode(suffix, image)[1].tobytes())
        source = open_source(tmp_path / name)
        frame, = list(source)
        assert frame.image.shape == image.shape and str(source) == "{}: an image".format(tmp_path / name)
        done = predict(middle_session(), tmp_path / name, tmp_path / "out" / name)
        assert str(done).split("\n")[1].startswith("1 frame, 1 box in ")
    for name in ("raw.mjpg", "raw.dat"): # of a camera, one JPEG after the other
        (tmp_path / name).write_bytes(b"".join(jpegs(3)))
        assert len(list(open_source(tmp_path / name))) == 3


def test_a_film_without_a_suffix_is_a_film(tmp_path):
    put_film(tmp_path / "film.mp4", 4)
    (tmp_path / "film.mp4").rename(tmp_path / "film")
    assert len(list(open_source(tmp_path / "film"))) == 4


def test_a_film_that_breaks_off_is_not_complete(tmp_path):
    path = tmp_path / "a.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    if not writer.isOpened(): pytest.skip("this OpenCV writes no MJPG")
    rng = np.random.RandomState(0)
    for k in range(20): writer.write(rng.randint(0, 256, (48, 64, 3)).astype(np.uint8))
    writer.release()
    def complete(): return json.loads((tmp_path / "out" / "predictions.json").read_text())["complete"]
    assert predict(middle_session(), path, tmp_path / "out").is_complete and complete() is True
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    with pytest.warns(UserWarning, match="the header says 20 frames"):
        done = predict(middle_session(), path, tmp_path / "out")
    assert 0 < done.frames < 18 and complete() is False
    # who asks for fewer frames than there are gets all of them
    predict(middle_session(), path, tmp_path / "out", most=3)
    assert complete() is True


def test_a_jpeg_that_is_damaged_inside_is_named(tmp_path):
    pytest.importorskip("simplejpeg")
    data, = jpegs(1)
    half = len(data) // 2
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "lost.jpg").write_bytes(data[:half] + data[half + 200:])
    (tmp_path / "in" / "soi.jpg").write_bytes(data[:half] + b"\xff\xd8" * 20 + data[half + 40:])
    (tmp_path / "in" / "whole.jpg").write_bytes(data)
    (tmp_path / "in" / "short.jpg").write_bytes(data[:-2])
    with pytest.warns(UserWarning) as caught: done = predict(middle_session(), tmp_path / "in", tmp_path / "out")
    lines = [str(w.message) for w in caught]
    assert [line for line in lines if "lost.jpg: is damaged inside: " in line and "boxes there may be wrong" in line]
    assert "damaged inside: lost.jpg, soi.jpg" in str(done) and done.frames == 3 and done.unreadable == ["short.jpg"]
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [row["name"] for row in written["damaged"]] == ["lost.jpg", "soi.jpg"]
    assert [row["name"] for row in written["skipped"]] == ["short.jpg"] and "breaks off" in written["skipped"][0]["why"]


def test_videos_among_images_are_called_videos(photos):
    put_film(photos / "day" / "w.MOV", 2)
    (photos / "notes.txt").write_text("mine")
    text = str(open_source(photos))
    assert "2 videos skipped (give one as the source, such as {})".format(photos / "day" / "w.MOV") in text
    assert text.endswith(", 1 other file skipped")


def test_a_folder_in_which_nothing_can_be_read(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"no image")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(InputError, match="no image can be read, such as a.jpg"):
            predict(middle_session(), tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_one_bad_image_among_others(tmp_path, bad):
    "An image on which the network fails is named, be it the first, and the others are predicted."
    for k in range(3): put_image(tmp_path / "src" / "{}.png".format(k), 50 * k)
    session = middle_session()
    detect = session.infer
    def infer(x):
        outputs = detect(x)
        if abs(x[0, 0, 20, 30] - 50 * bad) <= 1: outputs[0][:] = np.nan
        return outputs
    session.infer = infer
    name = "{}.png".format(bad)
    with pytest.warns(UserWarning, match=name + ": not written"):
        done = predict(session, tmp_path / "src", tmp_path / "out")
    assert done.failed == [name]
    assert list(boxes_of(tmp_path / "out")) == [n for n in ("0.png", "1.png", "2.png") if n != name]


def test_a_network_that_always_fails(tmp_path):
    "One line, not one for each image."
    for k in range(9): put_image(tmp_path / "src" / "{}.png".format(k))
    session = middle_session()
    session.infer = lambda x: [np.full((len(x), 84, 7), np.nan, np.float32)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for source in (tmp_path / "src", tmp_path / "src" / "1.png"):
            with pytest.raises(InputError, match="finite|NaN"): predict(session, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_our_own_images_as_a_source(photos, tmp_path):
    predict(middle_session(), photos, tmp_path / "out")
    with pytest.warns(UserWarning, match="out: results of jetson-det"):
        assert predict(middle_session(), tmp_path / "out", tmp_path / "again").frames == 3


def test_natural_order_of_odd_digits():
    assert sorted(["f²", "f10", "f2", "٣", "f①"], key=natural_key)[0].startswith("f")
    assert sorted(["b10", "b9", "B1"], key=natural_key) == ["B1", "b9", "b10"]
