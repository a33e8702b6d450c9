"""Labels drawn on an image as it is stored, or as a viewer shows it: each format is read onto the upright image, and
check, fix, training, evaluation and conversion agree about it."""
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from format_writers import WRITERS as FORMAT_WRITERS, reader_of
from photos import ORIENTATIONS, STORED, bright_box, write_photo

from jetson_det.config import AugmentConfig
from jetson_det.core import InputError
from jetson_det.data.dataset import DetDataset
from jetson_det.data.formats.registry import WRITERS, read_dataset, write_dataset
from jetson_det.data.loader import TrainLoader
from jetson_det.data.quality.check import check_dataset, prepare
from jetson_det.data.quality.fix import fix_dataset
from jetson_det.evaluate.coco import evaluate
from jetson_det.runtime.geometry import as_detections

FAR = 100, 12, 148, 44  # fits the stored image alone, where that lies on its side
NEAR = 24, 12, 72, 44  # fits both
WITH_SIZE = ["coco", "voc", "csv", "labelme", "cvat"]
IN_PIXELS = [*WITH_SIZE, "kitti", "plates"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv("JETSON_DET_CACHE", str(tmp_path / "cache"))


def photos(folder, box=FAR, orientations=ORIENTATIONS, square=()):
    "One image an orientation; labeled as stored, and labeled upright."
    folder.mkdir(parents=True)
    names = []
    sizes = []
    stored = []
    turned = []
    for k in [*orientations, *(f"{k} square" for k in square)]:
        orientation = int(str(k)[0])
        size = (160, 160) if "square" in str(k) else STORED
        names.append(f"{k}.jpg")
        sizes.append(size)
        stored.append(box)
        turned.append(write_photo(folder / f"{k}.jpg", orientation, box, size))
    upright_sizes = [s[::-1] if int(n[0]) >= 5 else s for n, s in zip(names, sizes)]
    n = len(names)
    as_stored = DetDataset(folder, ("plate",), names, sizes, np.arange(n), stored, [0] * n)
    as_shown = DetDataset(folder, ("plate",), names, upright_sizes, np.arange(n), turned, [0] * n)
    return as_stored, as_shown


def written(ds, folder, format):
    folder.mkdir()
    FORMAT_WRITERS[format](ds, folder)
    return folder


def on_their_objects(ds):
    "Whether each box is around the object of the image that the dataset itself decodes."
    return all(np.allclose(ds.boxes_of(i)[0], [bright_box(ds.image(i))], atol=.51) for i in range(len(ds)))


class BrightSession:
    "A session whose detector finds the bright object."
    contract = SimpleNamespace(classes=("plate",), name="bright")
    confidence = .5
    iou = .5
    max_detections = 100

    def __init__(self): self.timings = {}

    def __call__(self, frames):
        if isinstance(frames, list): return [self(f) for f in frames]
        return as_detections([bright_box(frames)], [.9], [0])


def agree(ds, folder):
    "Every stage takes the boxes of a dataset for those of its upright images."
    assert on_their_objects(ds)
    clean, _ = prepare(ds)
    assert len(clean) == len(ds)
    loader = TrainLoader(clean, (160, 160), AugmentConfig(multiscale=0), 2, workers=0)
    for batch in loader.epoch(0, augment=False):
        for image, boxes in zip(np.asarray(batch.images), np.asarray(batch.boxes, float)):
            found = bright_box(image.transpose(1, 2, 0))
            assert np.allclose(boxes[0], found, atol=1.6), (boxes[0], found)
    assert evaluate(BrightSession(), ds, progress=False).stats["AP"] == pytest.approx(1)
    for to in WRITERS:
        assert on_their_objects(write_dataset(ds, folder / f"as-{to}", to)), to


@pytest.mark.parametrize("format", FORMAT_WRITERS)
def test_labels_of_the_upright_image(tmp_path, format):
    folder = written(photos(tmp_path / "photos", square=(6, ))[1], tmp_path / "in", format)
    ds = read_dataset(folder, reader_of(format))
    agree(ds, tmp_path)
    report = check_dataset(folder, reader_of(format))
    assert not [f for f in report.flaws if f.severity != "note"], str(report)
    assert {f.kind for f in report.flaws} >= {"exif-rotation"}
    fix_dataset(report, tmp_path / "fixed")
    assert on_their_objects(read_dataset(tmp_path / "fixed"))


@pytest.mark.parametrize("box", [FAR, NEAR])
@pytest.mark.parametrize("format", WITH_SIZE)
def test_labels_that_state_the_stored_size_are_turned(tmp_path, format, box):
    "The size tells for orientations 5 to 8; those that are mirrored, upside down or square go with them."
    folder = written(photos(tmp_path / "photos", box, square=(6, 8))[0], tmp_path / "in", format)
    ds = read_dataset(folder, format)
    notes = [f for f in ds.flaws if f.kind == "rotated-image"]
    assert len(notes) == 9 and {f.action for f in notes} == {"noted"}
    agree(ds, tmp_path)
    report = check_dataset(folder, format)
    assert not [f for f in report.flaws if f.severity != "note"], str(report)
    fix_dataset(report, tmp_path / "fixed")
    fixed = read_dataset(tmp_path / "fixed")
    assert len(fixed) == 10 and on_their_objects(fixed)


@pytest.mark.parametrize("format", ["kitti", "plates", "csv"])
def test_labels_without_a_size_are_found_by_their_boxes(tmp_path, format):
    "Pixels of the stored image: the check refuses the images, all of them, and the fix stores them without EXIF."
    ds = photos(tmp_path / "photos", orientations=range(2, 9))[0]
    folder = written(ds, tmp_path / "in", format)
    if format == "csv":
        lines = [line.split(",") for line in (folder / "labels.csv").read_text().splitlines()]
        (folder / "labels.csv").write_text("\n".join(",".join([w[0], *w[3:]]) for w in lines))
    report = check_dataset(folder, format)
    turned = [Path(f.file).name for f in report.flaws if f.kind == "rotated-image"]
    assert sorted(turned) == [f"{k}.jpg" for k in range(2, 9)]
    assert report.flaws[0].kind == "too-many-flaws" and "rotated" not in str(report.ds.flaws)
    with pytest.raises(InputError, match="have flaws"): prepare(report.ds)
    fix_dataset(report, tmp_path / "fixed")
    fixed = read_dataset(tmp_path / "fixed")
    assert len(fixed) == 7
    agree(fixed, tmp_path)


@pytest.mark.parametrize("format", ["coco", "voc", "labelme", "cvat"])
def test_sizes_that_say_upright_of_boxes_that_are_stored(tmp_path, format):
    "A contradiction in every file: the images are left out and named, and the fix mends all of them."
    as_stored, as_shown = photos(tmp_path / "photos", orientations=range(2, 9))
    ds = DetDataset(as_shown.root, ("plate", ), as_shown.paths, as_shown.sizes, np.arange(7), as_stored.boxes, [0] * 7)
    folder = tmp_path / "in"
    folder.mkdir()
    FORMAT_WRITERS[format](ds, folder)
    report = check_dataset(folder, format)
    assert sum(f.kind == "rotated-image" and f.action == "dropped" for f in report.flaws) == 7
    changes = fix_dataset(report, tmp_path / "fixed")
    assert [c.kind for c in changes] == ["rotated-image"] * 7
    fixed = read_dataset(tmp_path / "fixed")
    assert len(fixed) == 7 and on_their_objects(fixed)


def test_boxes_outrank_the_size(tmp_path):
    "A script asked for the stored size and the tool drew on the upright image: some boxes show it, for all of them."
    _, as_shown = photos(tmp_path / "photos", NEAR, orientations=(5, 6, 8))
    swapped = as_shown.sizes[:, ::-1].copy()
    wide = write_photo(tmp_path / "photos/7.jpg", 7, FAR)
    ds = DetDataset(as_shown.root, ("plate", ), [*as_shown.paths, "7.jpg"], [*swapped, STORED], np.arange(4),
                    [*as_shown.boxes, wide], [0] * 4)
    folder = written(ds, tmp_path / "in", "csv")
    ds = read_dataset(folder)
    assert on_their_objects(ds) and all("they are kept" in f.message for f in ds.flaws)


def test_labels_of_both_kinds(tmp_path):
    "Where some sizes are stored and some upright, each image follows its own; what no size tells is upright."
    as_stored, as_shown = photos(tmp_path / "photos", NEAR, orientations=(3, 6, 8))
    rows = [as_shown.subset([0]), as_stored.subset([1]), as_shown.subset([2])]
    ds = DetDataset(as_shown.root, ("plate", ), as_shown.paths, [r.sizes[0] for r in rows], np.arange(3),
                    [r.boxes[0] for r in rows], [0] * 3)
    assert on_their_objects(read_dataset(written(ds, tmp_path / "in", "voc")))


def test_shares_of_the_stored_image(tmp_path):
    "A table of relative coordinates that states the stored size."
    as_stored, _ = photos(tmp_path / "photos")
    folder = written(as_stored, tmp_path / "in", "csv")
    lines = ["filename,width,height,class,xmin,ymin,xmax,ymax"]
    for name, (h, w), box in zip(as_stored.paths, as_stored.sizes, as_stored.boxes):
        shares = (box / [w, h, w, h]).tolist()
        lines.append(",".join(map(str, [name, w, h, "plate", *shares])))
    (folder / "labels.csv").write_text("\n".join(lines))
    ds = read_dataset(folder)
    assert len(ds) == 8 and on_their_objects(ds)


@pytest.mark.parametrize("format", ["coco", "voc", "csv", "labelme"])
@pytest.mark.parametrize("orientations,square,is_said", [
    ((3,), (), True), ((2, 4), (), True), ((), (6,), True), ((6,), (), False)
])
def test_where_no_size_tells_the_note_says_so(tmp_path, format, orientations, square, is_said):
    "Mirrored, upside-down and square images have the same size before and after the turn."
    stored, _ = photos(tmp_path / "photos", NEAR, orientations, square)
    folder = written(stored, tmp_path / "labels", format)
    notes = [f for f in check_dataset(folder).flaws if f.kind in ("exif-rotation", "rotated-image")]
    assert notes and any("look at some" in str(f) for f in notes) == is_said, notes
