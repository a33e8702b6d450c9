"""Images damaged inside, of several pages, very thin or of a rare kind: the check names them and no stage dies."""
import io

import cv2
import numpy as np
import pytest
from PIL import Image, features
from photos import ORIENTATIONS, bright_box, write_photo

from jetson_det.config import AugmentConfig
from jetson_det.data.augment.on_device import DevicePixels, pack_plans, render_batch
from jetson_det.data.augment.plan import epoch_order, plan_sample
from jetson_det.data.dataset import DetDataset
from jetson_det.data.formats.registry import WRITERS, read_dataset, write_dataset
from jetson_det.data.images.facts import inspect_image
from jetson_det.data.images.header import image_header, image_size
from jetson_det.data.loader import TrainLoader
from jetson_det.data.quality import check
from jetson_det.data.quality.check import check_dataset
from jetson_det.data.tiles import tile_dataset
from jetson_det.runtime.files import InputError
from jetson_det.runtime.images import decode_image, exif_orientation, read_image


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch): monkeypatch.setenv("JETSON_DET_CACHE", str(tmp_path / "cache"))


def noise(h, w, seed=0):
    small = np.random.default_rng(seed).integers(0, 255, (h // 16 + 2, w // 16 + 2, 3), np.uint8)
    return cv2.resize(small, (w, h), interpolation=cv2.INTER_CUBIC)


def encoded(image, suffix=".jpg", *params): return cv2.imencode(suffix, image, params)[1].tobytes()


def cmyk(image):
    out = io.BytesIO()
    Image.fromarray(image).convert("CMYK").save(out, "JPEG")
    return out.getvalue()


def cut_out(data, length=300):
    "The file without a block in its middle; its end is there."
    middle = len(data) // 2
    return data[:middle] + data[middle + length:]


def overwritten(data, block):
    middle = len(data) // 2
    return data[:middle] + block + data[middle + len(block):]


RANDOM = np.random.default_rng(1).integers(0, 255, 400, np.uint8).tobytes()
SCENE = noise(240, 320)
PROGRESSIVE = encoded(SCENE, ".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
RESTARTS = encoded(SCENE, ".jpg", cv2.IMWRITE_JPEG_RST_INTERVAL, 4)


@pytest.mark.parametrize("whole", [encoded(SCENE), encoded(SCENE[..., 0]), PROGRESSIVE, RESTARTS, cmyk(SCENE),
                                   encoded(noise(1000, 1400))])
def test_damage_inside_a_jpeg(tmp_path, whole):
    "What libjpeg fills with gray or noise, and a viewer shows without a word."
    file = tmp_path / "a.jpg"
    harmless = [whole, whole + b"more", whole[:-2] + b"\0\0" + whole[-2:]]
    for data in harmless:
        file.write_bytes(data)
        assert inspect_image(file).problem == ""
    end = len(whole) // 2
    zeros = bytes(len(whole) // 8)
    for data in (cut_out(whole), whole[:end] + b"\xff\xd9", overwritten(whole, RANDOM), overwritten(whole, zeros)):
        file.write_bytes(data)
        info = inspect_image(file)
        assert info.problem == "damaged-image" and info.message.startswith("is damaged inside: "), info


@pytest.mark.parametrize("whole", [encoded(SCENE), PROGRESSIVE, RESTARTS])
def test_every_marker_inside_the_scan_is_damage(tmp_path, whole):
    "Whatever libjpeg calls it. A marker that changes no pixel may go unnoticed."
    file = tmp_path / "a.jpg"
    for marker in [m for m in range(0xc0, 0xff) if m != 0xd9]:
        data = overwritten(whole, bytes([0xff, marker]) * 20)
        file.write_bytes(data)
        info = inspect_image(file)
        assert info.problem == "damaged-image" and info.message.startswith("is damaged inside: "), (hex(marker), info)


def test_odd_segments_are_no_damage(tmp_path):
    "A broken color profile, an unknown revision, another version of Adobe's: the pixels are whole."
    whole = encoded(SCENE)
    profile = b"\xff\xe2\0\x12ICC_PROFILE\0\5\2xx"
    adobe = b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\7"
    file = tmp_path / "a.jpg"
    revision = whole.replace(b"JFIF\0\1\1", b"JFIF\0\7\1")
    for data in (whole[:2] + profile + whole[2:], revision, whole[:2] + adobe + whole[2:]):
        assert data != whole
        file.write_bytes(data)
        assert inspect_image(file).problem == ""
    frame = whole.index(b"\xff\xc0")
    for data in (whole[:frame] + b"\xff\xc3" + whole[frame + 2:], whole[:frame + 4] + b"\x0c" + whole[frame + 5:]):
        file.write_bytes(data) # lossless, 12 bits: another kind of JPEG, which is not damaged
        assert inspect_image(file).problem == "unreadable-image"


def test_what_reading_says_of_a_damaged_jpeg(tmp_path):
    "Nothing where it is whole, a line where a part was filled in, an error where the end is missing, even two bytes."
    whole = encoded(SCENE)
    file = tmp_path / "a.jpg"
    lines = []
    file.write_bytes(whole)
    read_image(file, lines.append)
    assert lines == []
    file.write_bytes(overwritten(whole, b"\xff\xd8" * 20))
    assert read_image(file, lines.append).shape == SCENE.shape
    assert lines == ["is damaged inside: Invalid JPEG file structure: two SOI markers"]
    for cut in (2, 100, len(whole) // 2):
        file.write_bytes(whole[:-cut])
        with pytest.raises(InputError, match=f"a.jpg: breaks off after {len(whole) - cut} bytes"): read_image(file)
    file.write_bytes(overwritten(PROGRESSIVE, b"\xff\xd8" * 20))
    with pytest.raises(InputError, match="a.jpg: is damaged inside: Invalid JPEG"): read_image(file)


def test_damage_inside_a_png(tmp_path):
    "OpenCV ignores the checksums; a wrong one of a text chunk is no damage to the image."
    file = tmp_path / "a.png"
    whole = encoded(SCENE, ".png")
    at = len(whole) // 2
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
    assert inspect_image(file).problem == "damaged-image"
    text = b"\0\0\0\4tEXta\0bcWRNG"
    file.write_bytes(whole[:33] + text + whole[33:])
    assert inspect_image(file).problem == ""


def test_a_damaged_image_is_a_warning_and_left_out(tmp_path, capfd):
    (tmp_path / "d").mkdir()
    lines = ["file,xmin,ymin,xmax,ymax,class"]
    for k in range(4):
        data = encoded(noise(120, 160, k))
        (tmp_path / f"d/{k}.jpg").write_bytes(cut_out(data, 200) if k == 2 else data)
        lines.append(f"{k}.jpg,5,5,90,90,cat")
    (tmp_path / "d/labels.csv").write_text("\n".join(lines))
    report = check_dataset(tmp_path / "d", max_flawed=.5)
    found, = [f for f in report.flaws if f.severity == "warning"]
    assert (found.kind, found.file, found.action) == ("damaged-image", "2.jpg", "dropped")
    assert "Corrupt" not in capfd.readouterr().err
    assert [i.file for i in check.broken_images(report.ds, report.facts)] == ["2.jpg"]


def test_without_the_library_that_tells(tmp_path, monkeypatch):
    write_dataset(dataset(tmp_path / "in", {"a.png": SCENE}), tmp_path / "d", "coco")
    monkeypatch.setattr(check, "decode_jpeg", None)
    assert "unknown-damage" in {f.kind for f in check_dataset(tmp_path / "d").flaws}


def dataset(root, images):
    "A box around most of each image."
    root.mkdir(parents=True)
    sizes = []
    for name, image in images.items():
        (root / name).write_bytes(image if isinstance(image, bytes) else encoded(image, name[name.rindex("."):]))
        sizes.append(image_size(root / name))
    boxes = [(0, 0, w, h) for h, w in sizes]
    return DetDataset(root, ("strip", ), list(images), sizes, np.arange(len(sizes)), boxes, [0] * len(sizes))


def pages(*images, **options):
    out = io.BytesIO()
    first, *others = [Image.fromarray(image) for image in images]
    first.save(out, "TIFF", save_all=True, append_images=others, **options)
    return out.getvalue()


def test_pages_of_a_tiff():
    scenes = [noise(60, 80, k) for k in range(3)]
    assert image_header(pages(*scenes)).animated and image_header(pages(*scenes[:2], compression="tiff_lzw")).animated
    assert not image_header(pages(scenes[0])).animated
    # a thumbnail beside the image is no page
    thumb = io.BytesIO()
    Image.fromarray(scenes[1]).save(thumb, "TIFF", tiffinfo={254: 1})
    first = pages(scenes[0])
    second = thumb.getvalue()
    joined = first + second # its tags hold their values themselves, so nothing else in it has to be moved
    at = next_directory(joined)
    joined = joined[:at] + (int.from_bytes(second[4:8], "little") + len(first)).to_bytes(4, "little") + joined[at + 4:]
    assert not image_header(joined).animated and image_header(joined).size == (60, 80)
    # a directory that names itself as the next ends the search
    loop = joined[:at] + joined[4:8] + joined[at + 4:]
    assert not image_header(loop).animated


@pytest.mark.parametrize("order", ["little", "big"])
def test_pages_of_a_bigtiff(order):
    "Offsets of 64 bits, in both byte orders; a thumbnail, a loop and a file that is cut are no further page."
    def number(value, width): return value.to_bytes(width, order)
    def entry(tag, kind, value, width): return number(tag, 2) + number(kind, 2) + number(1, 8) + (
        number(value, width) + bytes(8 - width))
    def directory(following, subfile=0):
        entries = [entry(254, 4, subfile, 4), entry(256, 16, 80, 8), entry(257, 4, 60, 4), entry(274, 3, 6, 2)]
        return number(len(entries), 8) + b"".join(entries) + number(following, 8)
    head = {"little": b"II", "big": b"MM"}[order] + number(43, 2) + number(8, 2) + number(0, 2) + number(16, 8)
    second = 16 + len(directory(0))
    assert image_header(head + directory(second) + directory(0)).animated
    for data in (head + directory(0), head + directory(second, 0) + directory(0, 1), head + directory(16)):
        header = image_header(data)
        assert (header.kind, header.size, header.orientation, header.animated) == ("tiff", (60, 80), 6, False)
    for cut in range(len(head), len(head + directory(0))): image_header((head + directory(0))[:cut])
    assert image_header(head[:8] + number(2**63 + 5, 8)).size == (0, 0)


def test_a_bigtiff_as_a_library_writes_it():
    first, second = Image.fromarray(noise(60, 80, 0)), Image.fromarray(noise(60, 80, 1))
    out = io.BytesIO()
    first.save(out, "TIFF", big_tiff=True, save_all=True, append_images=[second])
    if out.getvalue()[2] != 43: pytest.skip("this Pillow writes no BigTIFF")
    assert image_header(out.getvalue()).animated and image_header(out.getvalue()).size == (60, 80)


def next_directory(tiff):
    "Where the number of the second directory stands."
    first = int.from_bytes(tiff[4:8], "little")
    return first + 2 + 12 * int.from_bytes(tiff[first:first + 2], "little")


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_avif_is_upright(tmp_path, orientation):
    if not features.check("avif") or not cv2.haveImageWriter("x.avif"): pytest.skip("no AVIF here")
    box = write_photo(tmp_path / "a.avif", orientation, (100, 12, 148, 44), kind="AVIF")
    data = (tmp_path / "a.avif").read_bytes()
    image = read_image(tmp_path / "a.avif")
    assert exif_orientation(data) == orientation and image_size(tmp_path / "a.avif") == image.shape[:2]
    assert np.allclose(bright_box(image), box, atol=1)
    info = inspect_image(tmp_path / "a.avif")
    assert info.problem == "" and info.size == image.shape[:2]
    assert image_header(data[:60]).size == (0, 0) and image_header(data[:4096]) == image_header(data)


def test_kinds_and_suffixes_in_one_folder(tmp_path):
    "What a file is, its content says; the suffix only says that it is an image."
    deep = noise(60, 80, 1).astype(np.uint16) * 200
    gray_16 = deep[..., 0]
    images = {"a.jfif": encoded(noise(60, 80, 2)), "b.JPG": encoded(noise(60, 80, 3)), "c.Jpeg": encoded(SCENE),
              "d.jpg": encoded(noise(60, 80, 4), ".png"), "e.png": encoded(noise(60, 80, 5), ".webp"), "f.png": deep,
              "g.tif": gray_16, "h.jpg": cmyk(noise(60, 80, 6)), "i.tiff": pages(noise(60, 80, 7), noise(60, 80, 8)),
              "j.bmp": noise(60, 80, 9)}
    if cv2.haveImageWriter("x.avif"): images["k.avif"] = encoded(noise(60, 80, 10), ".avif")
    ds = dataset(tmp_path / "in", images)
    for to in WRITERS:
        folder = tmp_path / to
        copy = write_dataset(ds, folder, to)
        assert len(copy) == len(ds) and sorted(map(tuple, copy.sizes)) == sorted(map(tuple, ds.sizes))
        report = check_dataset(folder)
        assert not [f for f in report.flaws if f.severity != "note"], str(report)
    kinds = {f.file.rsplit("/", 1)[-1]: f.kind for f in report.flaws if f.kind.endswith("-image")}
    assert kinds["f.png"] == "deep-image" and kinds["h.jpg"] == "alpha-image" and kinds["i.tiff"] == "animated-image"
    for batch in TrainLoader(read_dataset(folder), (64, 64), AugmentConfig(multiscale=0), 4, workers=0).epoch(0): pass


THIN = [(2, 3000), (3000, 2), (1, 500), (500, 1), (1, 1), (3, 4000)]


@pytest.mark.parametrize("settings", [dict(mosaic=0), dict(mosaic=1.), dict(mosaic=0, crop=1.),
                                      dict(mosaic=.5, mixup=1., copy_paste=1., degrees=10)])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_thin_images_are_trained_on(tmp_path, suffix, settings):
    "A side of less than a pixel at the input has one all the same; on the device path too."
    images = {f"{h}x{w}{suffix}": np.full((h, w, 3), 200, np.uint8) for h, w in [*THIN, (60, 80)]}
    ds = dataset(tmp_path / "in", images)
    augment = AugmentConfig(multiscale=0, **settings)
    loader = TrainLoader(ds, (64, 64), augment, 4, workers=0)
    for epoch in range(2):
        for batch in loader.epoch(epoch): assert np.isfinite(np.asarray(batch.boxes)).all()
    for batch in loader.epoch(0, augment=False): pass
    order = epoch_order(len(ds), 0, 0)
    plans = [plan_sample(ds, order, k, (64, 64), augment, 0, 0, True) for k in range(len(ds))]
    pixels = DevicePixels(ds, (64, 64), "cpu", lambda line: None)
    assert render_batch(pixels, pack_plans(plans, pixels.table), (64, 64)).shape == (len(ds), 3, 64, 64)
    assert decode_image((tmp_path / f"in/3000x2{suffix}").read_bytes(), 8).shape[:2] == (375, 1)


def test_thin_images_elsewhere(tmp_path):
    ds = dataset(tmp_path / "in", {f"{h}x{w}.png": noise(h, w, h) for h, w in [*THIN, (60, 80)]})
    write_dataset(ds, tmp_path / "d", "coco")
    note, = [f for f in check_dataset(tmp_path / "d", input_size=(64, 64)).flaws if f.kind == "thin-image"]
    assert note.severity == "note" and "5 of 7 images are under 8 px" in note.message
    assert len(tile_dataset(ds, tmp_path / "tiles", (64, 64)))
