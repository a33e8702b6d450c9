"""How output files relate to input files: one rule, asked before the work."""
import json
import os
import random
import string
import subprocess
import sys

import pytest
from predict_sources import put_image

from jetson_det.runtime import outputs
from jetson_det.runtime.files import InputError, open_atomic, read_json, write_bytes_atomic, write_json_atomic
from jetson_det.runtime.folders import walk_files
from jetson_det.runtime.outputs import (MARKER, OutputFolder, check_new_folder, check_output, is_inside, is_own_output,
                                        mark_output, output_names, work_folder)


@pytest.fixture
def photos(tmp_path):
    "A folder of images and labels, and a link to it."
    for name in ("a.jpg", "b.png", "day/a.jpg"): put_image(tmp_path / "photos" / name)
    (tmp_path / "photos" / "labels.json").write_text("{}")
    os.symlink(str(tmp_path / "photos"), str(tmp_path / "link"))
    return tmp_path / "photos"


@pytest.mark.parametrize("name", ["photos", "photos/", "./photos", "photos/day/..", "link", "link/day/..", "photos/day",
                                  "photos/new", "link/new/newer", "photos/../link"])
def test_inside_by_any_name(photos, name, monkeypatch):
    monkeypatch.chdir(str(photos.parent))
    assert is_inside(name, "photos") and is_inside(os.path.abspath(name), photos.parent / "link")
    assert not is_inside(photos.parent, photos) and not is_inside("photos2", "photos")


def test_an_output_is_no_input(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(str(tmp_path))
    os.link(str(photos / "labels.json"), str(tmp_path / "hard.json"))
    os.symlink(str(photos / "labels.json"), str(tmp_path / "soft.json"))
    for name in ("photos/labels.json", "link/labels.json", "./photos/day/../labels.json", "hard.json", "soft.json"):
        with pytest.raises(InputError, match="would be replaced"): check_output(name, ["photos/labels.json"])
    for name in ("photos/labels.json", "link/day/../labels.json", "soft.json"):
        with pytest.raises(InputError, match="is a file of"): check_output(name, [None, "", 0, "photos"])
    with pytest.raises(InputError, match="would be read as data"): check_output("link/plot.PNG", [photos])
    assert check_output("photos/report.json", [photos]).name == "report.json"
    (photos / "report.json").write_text(json.dumps({"AP": [.5] * 3000, "written_by": "jetson-det"}))
    check_output("photos/report.json", [photos])  # of a run before
    assert check_output("other.json", ["rtsp://10.0.0.7/gate", 3]).name == "other.json"


def test_what_can_be_known_before_the_work(photos, tmp_path):
    for path, why in ((photos, "is a folder"), (photos / "a.jpg" / "x.json", "is not a folder"),
                      (photos / "a.jpg" / "deep" / "x.json", "is not a folder"),
                      (tmp_path / ("x" * 256), "name too long")):
        with pytest.raises(InputError, match="(?i)" + why): check_output(path)
    with pytest.raises(InputError, match="must end in .png or .svg"):
        check_output(tmp_path / "a.pgn", (), (".png", ".svg"))
    assert check_output(tmp_path / "new" / "newer" / "x.json") and not (tmp_path / "new").exists()
    assert check_output("/dev/stdout") and check_output("/dev/null")


def test_devices_and_folders_that_take_nothing(tmp_path):
    "Known before the work, whoever asks: root passes every check of permissions."
    if not os.path.isdir("/sys") or not os.path.exists("/dev/full"): pytest.skip("not a Linux")
    os.symlink("/dev/full", str(tmp_path / "full.json"))
    for path in ("/dev/full", tmp_path / "full.json", "/dev/fd/999999", "/proc/x.json", "/sys/x.json"):
        with pytest.raises(InputError, match="^{}: cannot be written".format(path)): check_output(path)
    for check in (check_new_folder, lambda path: OutputFolder(path, "predict")):
        with pytest.raises(InputError, match="^/sys/new: cannot be written"): check("/sys/new")
    os.mkfifo(str(tmp_path / "pipe"))
    assert check_output(tmp_path / "pipe") == tmp_path / "pipe"  # nobody reads it yet, and nothing waits here
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty" / "x.json")
    assert os.listdir(str(tmp_path / "empty")) == []


def test_no_permission(photos, tmp_path):
    "Root may write anywhere but where the disk is read-only."
    if hasattr(os, "geteuid") and os.geteuid() == 0: pytest.skip("root may write everywhere")
    photos.chmod(0o500)
    try:
        for check in (check_output, check_new_folder):
            with pytest.raises(InputError, match="no permission"): check(photos / "new")
    finally: photos.chmod(0o700)


def test_a_disk_that_is_full_or_read_only(tmp_path):
    code = """
import sys
from jetson_det.runtime.files import InputError
from jetson_det.runtime.outputs import OutputFolder, check_new_folder, check_output
for check in (check_output, check_new_folder, lambda path: OutputFolder(path, "predict")):
    try: check(sys.argv[1] + "/new")
    except InputError as e: print(str(e).split(": ", 1)[1])
"""
    if not sys.platform.startswith("linux") or os.geteuid() != 0: pytest.skip("only root mounts a small disk")
    (tmp_path / "disk").mkdir()
    words = ["unshare", "-m", "sh", "-c",
             'mount -t tmpfs -o size=16k t "$1" && dd if=/dev/zero of="$1/x" bs=4k 2>/dev/null; "$2" -c "$3" "$1";'
             ' mount -o remount,ro "$1" && "$2" -c "$3" "$1"', "sh", str(tmp_path / "disk"), sys.executable, code]
    try: done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    except OSError: pytest.skip("no unshare here")
    lines = done.stdout.splitlines()
    if not lines and "denied" in done.stderr + done.stdout: pytest.skip("mounting is not allowed here")
    assert len(lines) == 6, (done.stdout, done.stderr)
    assert all("the disk is full" in line for line in lines[:3])
    assert all("read-only" in line for line in lines[3:])


def test_a_new_folder(photos, tmp_path):
    (tmp_path / "empty").mkdir()
    assert check_new_folder(tmp_path / "empty", photos) == tmp_path / "empty"
    for path in (photos, tmp_path / "link", photos / "a.jpg"):
        with pytest.raises(InputError, match="there already"): check_new_folder(path)
    for path in (photos / "x", tmp_path / "link" / "x" / "y"):
        with pytest.raises(InputError, match="lies in the dataset"): check_new_folder(path, photos)


def test_own_results_are_walked_past(photos):
    (photos / "predictions").mkdir()
    put_image(photos / "predictions" / "a.jpg")
    before = walk_files(photos)
    mark_output(photos / "predictions", "predict")
    own = []
    assert walk_files(photos, own) == [f for f in before if not f.startswith("predictions")]
    assert own == ["predictions"] and walk_files(photos / "predictions") == ["a.jpg"]
    (photos / "day" / MARKER).mkdir()  # a folder of that name marks nothing
    assert not is_own_output(photos / "day")


def test_lists_of_a_split_hide_nothing(photos):
    "They are part of a dataset, wherever they were written first."
    (photos / "splits").mkdir()
    (photos / "splits" / "train.txt").write_text("a.jpg")
    mark_output(photos / "splits", "data split")
    own = []
    assert "splits/train.txt" in walk_files(photos, own) and own == [] and not is_own_output(photos / "splits")
    for content in (b"", b"\xff\n", b'{"written_by": "jetson-det data splits"}\n'):
        (photos / "splits" / MARKER).write_bytes(content)
        assert is_own_output(photos / "splits")


def test_a_folder_that_is_shared(tmp_path):
    "What lies there under other names stays, and is in nobody's way."
    (tmp_path / "images").mkdir()
    for text in (b"1", b"2"):
        folder = OutputFolder(tmp_path, "data split", names=["train.txt"], is_shared=True)
        folder.begin()
        with folder.open("train.txt") as f: f.write(text)
        folder.close()
        assert (tmp_path / "train.txt").read_bytes() == text and (tmp_path / "images").is_dir()
    (tmp_path / "val.txt").write_text("mine")
    with pytest.raises(InputError, match="val.txt is there already, and data split did not write it: move it away"):
        OutputFolder(tmp_path, "data split", names=["train.txt", "val.txt"], is_shared=True)
    with pytest.raises(InputError, match="data split did not write"): # it is another verb's
        mark_output(tmp_path, "predict")
        OutputFolder(tmp_path, "data split", is_shared=True)


def test_walk_follows_links_once(tmp_path):
    put_image(tmp_path / "real" / "a.jpg")
    put_image(tmp_path / "src" / "own.jpg")
    os.symlink(str(tmp_path / "real"), str(tmp_path / "src" / "linked"))
    os.symlink("..", str(tmp_path / "src" / "up"))
    os.symlink("gone", str(tmp_path / "src" / "broken"))
    files = walk_files(tmp_path / "src")
    assert len([f for f in files if f.endswith("own.jpg")]) == 1
    assert len([f for f in files if f.endswith("a.jpg")]) == 1


def test_a_work_folder_is_removed(tmp_path):
    "With what processes left that are no more, of the same folder only."
    host = outputs._host()
    gone = ["out.{}-{}".format(host, number) for number in ("99999999", os.getpid(), "9" * 31)]
    stay = ["{}-{}".format(name, end) for name, end in (
        ("out." + host, "1"), ("out." + host, "x"), ("out." + host, "99999999.more"), ("other." + host, "99999999"),
        ("xout." + host, "99999999"), ("out.0000beef", "99999999"))] + ["out.99999999"]
    for name in gone + stay: (tmp_path / ".{}.part".format(name)).mkdir()
    with pytest.raises(KeyError):
        with work_folder(tmp_path / "out") as work:
            assert work.is_dir() and not list(work.iterdir()) and len(list(tmp_path.iterdir())) == len(stay) + 1
            (work / "a").write_text("")
            raise KeyError
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(".{}.part".format(name) for name in stay)
    with work_folder(tmp_path / "new" / "out") as work: work.rename(tmp_path / "new" / "out")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out"]


def test_names_stay_apart():
    names = ["a.jpg", "a.png", "x/y.jpg", "x_y.jpg"]
    assert output_names(names, ".jpg") == ["a.jpg", "a.png.jpg", "x/y.jpg", "x_y.jpg"]
    assert output_names(["a.png", "b.png"], ".jpg") == ["a.jpg", "b.jpg"]
    # what has the suffix keeps its name, however the others are called
    assert output_names(["a.png", "a.bmp", "a.jpg", "a.png.jpg"], ".jpg")[2:] == ["a.jpg", "a.png.jpg"]


def test_names_of_every_kind():
    "Random names from few letters: all different in any case, none too long, the tree kept, the same again."
    rng = random.Random(0)
    letters = ["a", "A", ".", "ü", "\udce9", "\n", "\u2028", "é", "_", "png", "jpg", ".png", ".jpg", "x" * 120]
    for _ in range(200):
        names = {"/".join("".join(rng.choice(letters) for _ in range(rng.randint(1, 3))) + "q"
                          for _ in range(rng.randint(1, 2))) + rng.choice([".jpg", ".png", ".JPG", ".tif"])
                 for _ in range(rng.randint(1, 12))}
        names = sorted(name for name in names if all(len(os.fsencode(p)) <= 255 for p in name.split("/")))
        found = output_names(names, ".jpg")
        assert len({name.lower() for name in found}) == len(names) and output_names(names, ".jpg") == found
        for name, new in zip(names, found):
            assert os.path.dirname(new) == os.path.dirname(name) and new.lower().endswith(".jpg")
            assert len(os.fsencode(os.path.basename(new))) <= 255


def fill(folder, names, sources=()):
    out = OutputFolder(folder, "predict", sources, names)
    out.begin()
    for name in names: out.add(name).write_bytes(os.fsencode(name))
    out.close()


def test_a_second_run_replaces_the_first(tmp_path):
    fill(tmp_path / "out", ["a.jpg", "day/b.jpg", "day/deep/c.jpg", "odd\n\u2028\udce9.jpg"])
    (tmp_path / "out" / "day" / "mine.txt").write_text("mine")
    fill(tmp_path / "out", ["z.jpg"])
    found = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert found == [MARKER, "day/mine.txt", "z.jpg"] and not (tmp_path / "out" / "day" / "deep").exists()


def put_another(path, how, photo):
    "What a person may do to a file of results."
    size = path.stat().st_size
    if how != "as long": path.unlink()
    if how == "as long":
        path.write_bytes(b"?" * size)
        os.utime(str(path), (2e9, 2e9))  # clocks of files tick slowly
    elif how == "longer": path.write_bytes(b"?" * size * 2)
    elif how == "link": os.symlink(str(photo), str(path))
    elif how == "hard link": os.link(str(photo), str(path))
    else: path.mkdir()


@pytest.mark.parametrize("how", ["as long", "longer", "link", "hard link", "folder"])
@pytest.mark.parametrize("grows", [False, True])
def test_what_was_changed_since_is_somebodys(tmp_path, how, grows):
    "The same name, another file: it stays, and a run that needs the name is refused."
    (tmp_path / "photo.jpg").write_bytes(b"only copy")
    out = OutputFolder(tmp_path / "out", "predict")
    out.begin()
    for name in ("a.jpg", "b.jpg"):
        if grows: out.add(name).write_bytes(b"boxes")
        else:
            with out.open(name) as f: f.write(b"boxes")
    out.close()
    file = tmp_path / "out" / "a.jpg"
    put_another(file, how, tmp_path / "photo.jpg")
    with pytest.raises(InputError, match="a.jpg was changed since predict wrote it"):
        OutputFolder(tmp_path / "out", "predict", (), ["a.jpg"])
    before = os.lstat(str(file))
    for _ in range(2):  # for the run after the next it is a file of somebody from the start
        again = OutputFolder(tmp_path / "out", "predict", (), ["c.jpg"])
        again.begin()
        with pytest.raises(OSError, match="another file has that name"): again.add("a.jpg")
        with pytest.raises(OSError, match="another file has that name"):
            with again.open("a.jpg"): pass
        again.close()
    after = os.lstat(str(file))
    assert (before.st_ino, before.st_size, before.st_mtime_ns) == (after.st_ino, after.st_size, after.st_mtime_ns)
    assert (tmp_path / "photo.jpg").read_bytes() == b"only copy" and not (tmp_path / "out" / "b.jpg").exists()


def test_a_copy_of_the_results_is_still_theirs(tmp_path):
    "Other times, the same content: as after a copy, or on a disk with a coarse clock."
    fill(tmp_path / "out", ["a.jpg", "day/b.jpg"])
    for name in ("a.jpg", "day/b.jpg"): os.utime(str(tmp_path / "out" / name), (1, 1))
    fill(tmp_path / "out", ["a.jpg"])
    assert sorted(os.listdir(str(tmp_path / "out"))) == [MARKER, "a.jpg"]


def test_a_run_that_was_killed(tmp_path):
    "What grew is replaced, unless somebody changed it afterwards."
    for changed in (False, True):
        out = OutputFolder(tmp_path / "out", "predict")
        out.begin()
        path = out.add("lines.jsonl")
        path.write_bytes(b"{}\n")
        out.touch()
        out._marker.close()  # without `close`, as after SIGKILL
        if changed: os.utime(str(path), (path.stat().st_mtime + 60,) * 2)
        again = OutputFolder(tmp_path / "out", "predict")
        again.begin()
        again.close()
        assert path.exists() == changed and again.kept == ["lines.jsonl"] * changed


def test_a_folder_of_somebody_else(photos, tmp_path):
    for path, why in ((photos / "day", "did not write, such as a.jpg"), (photos / "a.jpg", "is a file")):
        with pytest.raises(InputError, match=why): OutputFolder(path, "predict")
    for path in (photos, tmp_path, tmp_path / "link"):
        with pytest.raises(InputError, match="holds what is read here"): OutputFolder(path, "predict", [photos])
    (tmp_path / "run").mkdir()
    mark_output(tmp_path / "run", "train")
    with pytest.raises(InputError, match="predict did not write"): OutputFolder(tmp_path / "run", "predict")
    fill(tmp_path / "out", ["a.jpg"])
    (tmp_path / "out" / "b.jpg").write_text("mine")
    with pytest.raises(InputError, match="such as b.jpg"): OutputFolder(tmp_path / "out", "predict", (), ["b.jpg"])


def test_links_into_the_results(tmp_path):
    "An image of the source may be a link to what an earlier run wrote."
    fill(tmp_path / "out", ["a.jpg"])
    for make in (os.symlink, os.link):
        (tmp_path / make.__name__).mkdir()
        make(str(tmp_path / "out" / "a.jpg"), str(tmp_path / make.__name__ / "x.jpg"))
        with pytest.raises(InputError, match="holds what is read here"):
            OutputFolder(tmp_path / "out", "predict", [tmp_path / make.__name__], ["x.jpg"],
                         [tmp_path / make.__name__ / "x.jpg"])


@pytest.mark.parametrize("name", [
    "../keep.txt", "/etc/hostname", "day/../../keep.txt", "", ".", "x\0y", "link/keep.txt", 7,
])
def test_a_marker_that_was_tampered_with(tmp_path, name):
    fill(tmp_path / "out", ["a.jpg"])
    (tmp_path / "keep.txt").write_text("mine")
    os.symlink("..", str(tmp_path / "out" / "link"))
    with open(str(tmp_path / "out" / MARKER), "a") as f: f.write(json.dumps(name) + "\n[1,\n\n")
    fill(tmp_path / "out", ["b.jpg"])
    assert (tmp_path / "keep.txt").read_text() == "mine" and os.path.exists("/etc/hostname")
    assert not (tmp_path / "out" / "a.jpg").exists()


def test_one_at_a_time(tmp_path):
    first = OutputFolder(tmp_path / "out", "predict")
    first.begin()
    first.add("a.jpg").write_bytes(b"x")
    with pytest.raises(InputError, match="another predict is writing"):
        OutputFolder(tmp_path / "out", "predict").begin()
    assert (tmp_path / "out" / "a.jpg").exists()
    first.close()
    OutputFolder(tmp_path / "out", "predict").begin()


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127, "\udce9" * 255, "line\u2028break\n.json"])
def test_any_name_is_written_whole(tmp_path, name):
    write_bytes_atomic(tmp_path / name, b"content")
    assert os.listdir(os.fsencode(str(tmp_path))) == [os.fsencode(name)]


def test_an_error_names_the_file(tmp_path):
    for path in (tmp_path / "gone" / "x.json", "/dev/full"):
        with pytest.raises(OSError) as e: write_bytes_atomic(path, b"x")
        assert e.value.filename == str(path)
    write_bytes_atomic("/dev/null", b"x")
    assert not os.path.isfile("/dev/null")
    with pytest.raises(ZeroDivisionError):
        with open_atomic(tmp_path / "x") as f: f.write(b"half" + bytes(1 // 0))
    assert os.listdir(str(tmp_path)) == []


def test_json_of_any_name(tmp_path):
    names = [os.fsdecode(b"caf\xe9"), "\u2028\x85\x0b\r\n", "ü", "\U0001f600", string.printable]
    write_json_atomic(tmp_path / "x.json", names)
    assert read_json(tmp_path / "x.json") == names
    (tmp_path / "x.json").read_bytes().decode("utf-8")


@pytest.mark.skipif(not os.path.exists("/dev/stdout"), reason="no /dev/stdout here")
def test_standard_output_is_written_to_and_stays(tmp_path):
    "Also where it leads to a file; renaming would put a file in the place of the device."
    code = """
from jetson_det.runtime.files import write_bytes_atomic
print("before")
write_bytes_atomic("/dev/stdout", b"content\\n")
print("after", flush=True)
"""
    before = os.readlink("/dev/stdout")
    with open(str(tmp_path / "out.txt"), "wb") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert (tmp_path / "out.txt").read_bytes() == b"before\ncontent\nafter\n"
    piped = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout
    assert piped == b"before\ncontent\nafter\n" and os.readlink("/dev/stdout") == before


def test_a_way_back_through_a_missing_folder_is_no_other_place(tmp_path):
    "`photos/new/..` is `photos` as soon as `new` is made."
    photos = tmp_path/"photos"
    photos.mkdir()
    (photos/"a.jpg").write_bytes(b"a photograph")
    for out in (photos/"new"/"..", tmp_path/"new"/".."/"photos", tmp_path/"x"/"y"/".."/".."/"photos"):
        with pytest.raises(InputError, match="holds what is read"): OutputFolder(out, "predict", [photos])
        with pytest.raises(InputError, match="is there already"): check_new_folder(out, photos)
        with pytest.raises(InputError, match="would be replaced"): check_output(out/"a.jpg", [photos/"a.jpg"])
        with pytest.raises(InputError, match="is a file of"): check_output(out/"a.jpg", [photos])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos"]


def test_an_exported_file_of_any_suffix_is_our_own(tmp_path):
    padding = bytes(20_000)
    for name, content, is_ours in (("a.onnx", b"jetson_det.contract", True), ("a.pt2", b"jetson_det.contract", True),
                                   ("b.pt2", b"another's", False), ("empty.pt2", b"", False),
                                   ("notes.txt", b"jetson_det.contract", False)):
        (tmp_path/name).write_bytes(padding + content + padding if content else b"")
        assert is_own_output(tmp_path/name) == is_ours, name
