"""Every label format written by hand from one dataset, as the tools that own it write it: what the readers are
tested with. A new format needs a function here and its line in WRITERS."""
import csv
import json
from typing import NamedTuple
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from jetson_det.data.dataset import CROWD, IGNORE, DetDataset
from jetson_det.data.formats.registry import write_dataset


class Box(NamedTuple):
    "One box of an image."
    name: str  # of its class
    xyxy: list
    flags: int


class Image(NamedTuple):
    "One image and its boxes."
    name: str  # of its file
    height: int
    width: int
    boxes: list  # of Box

    @property
    def stem(self): return self.name.rsplit(".", 1)[0]


def images_of(ds):
    "Each image of a dataset with its boxes."
    for i in range(len(ds)):
        boxes = []
        for xyxy, label, flags in zip(*ds.boxes_of(i)):
            boxes.append(Box(ds.classes[label], xyxy.astype(float).tolist(), int(flags)))
        yield Image(ds.paths[i].rsplit("/", 1)[-1], *ds.sizes[i].tolist(), boxes)


def link_images(ds, folder):
    "The images, linked into a folder."
    folder.mkdir(parents=True)
    for i, im in enumerate(images_of(ds)): (folder / im.name).hardlink_to(ds.path_of(i))


def write_table(path, header, lines):
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([header, *lines] if header else lines)


def write_csv(ds, dst):
    link_images(ds, dst / "images")
    lines = [(im.name, im.width, im.height, b.name, *b.xyxy) for im in images_of(ds) for b in im.boxes]
    write_table(dst / "labels.csv", ("filename", "width", "height", "class", "xmin", "ymin", "xmax", "ymax"), lines)


def write_openimages(ds, dst):
    link_images(ds, dst / "images")
    header = ("ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,"
              "IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside").split(",")
    class_id = {name: f"/m/0{k}" for k, name in enumerate(ds.classes)}
    lines = []
    for im in images_of(ds):
        for b in im.boxes:
            x1, y1, x2, y2 = b.xyxy
            relative = (x1 / im.width, x2 / im.width, y1 / im.height, y2 / im.height)
            lines.append((im.stem, "xclick", class_id[b.name], 1, *relative, 0, 0, int(b.flags & CROWD > 0), 0, 0))
    write_table(dst / "train-annotations-bbox.csv", header, lines)
    write_table(dst / "class-descriptions-boxable.csv", None, [(i, name) for name, i in class_id.items()])


def write_plates(ds, dst):
    link_images(ds, dst / "photos")
    for im in images_of(ds):
        lines = []
        for k, b in enumerate(im.boxes):
            x1, y1, x2, y2 = b.xyxy
            lines.append(f"{im.name}\t{x1}\t{y1}\t{x2 - x1}\t{y2 - y1}\tM{k} XSX\n")
        (dst / "photos" / f"{im.stem}.txt").write_text("".join(lines), encoding="utf-8")


def write_labelme(ds, dst):
    link_images(ds, dst / "work")
    for im in images_of(ds):
        shapes = []
        for b in im.boxes:
            x1, y1, x2, y2 = b.xyxy
            shapes.append(dict(label=b.name, points=[[x2, y2], [x1, y1]], group_id=None, shape_type="rectangle",
                               flags={}))
        d = dict(version="5.4.1", flags={}, shapes=shapes, imagePath=im.name, imageData=None, imageHeight=im.height,
                 imageWidth=im.width)
        text = json.dumps(d, ensure_ascii=False, indent=1)
        (dst / "work" / f"{im.stem}.json").write_text(text, encoding="utf-8")


def write_cvat(ds, dst):
    link_images(ds, dst / "images")
    labels = "".join(f"<label><name>{escape(c)}</name><attributes></attributes></label>" for c in ds.classes)
    out = [
        '<?xml version="1.0" encoding="utf-8"?>',
        "<annotations>",
        "  <version>1.1</version>",
        f"  <meta><task><name>gate</name><size>{len(ds)}</size><mode>annotation</mode><labels>{labels}</labels>"
        "</task></meta>",
    ]
    for i, im in enumerate(images_of(ds)):
        out.append(f'  <image id="{i}" name={quoteattr(im.name)} width="{im.width}" height="{im.height}">')
        for b in im.boxes:
            x1, y1, x2, y2 = b.xyxy
            out.append(f'    <box label={quoteattr(b.name)} occluded="0" source="manual" xtl="{x1}" ytl="{y1}"'
                       f' xbr="{x2}" ybr="{y2}" z_order="0">\n    </box>')
        out.append("  </image>")
    out.append("</annotations>\n")
    (dst / "annotations.xml").write_text("\n".join(out), encoding="utf-8")


def write_kitti(ds, dst):
    link_images(ds, dst / "image_2")
    (dst / "label_2").mkdir()
    for im in images_of(ds):
        lines = []
        for b in im.boxes:
            name = "DontCare" if b.flags & IGNORE else b.name
            box = " ".join(map(repr, b.xyxy))
            lines.append(f"{name} 0.00 0 -1.57 {box} -1 -1 -1 -1000 -1000 -1000 -10\n")
        (dst / "label_2" / f"{im.stem}.txt").write_text("".join(lines), encoding="utf-8")


def write_darknet(ds, dst):
    data = dst / "data"
    link_images(ds, data / "obj")
    (data / "obj.names").write_text("".join(c + "\n" for c in ds.classes), encoding="utf-8")
    (data / "obj.data").write_text(
        f"classes = {len(ds.classes)}\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n")
    (data / "train.txt").write_text("".join(f"data/obj/{im.name}\n" for im in images_of(ds)), encoding="utf-8")
    for im in images_of(ds):
        lines = []
        for b in im.boxes:
            x1, y1, x2, y2 = b.xyxy
            row = (ds.classes.index(b.name), (x1 + x2)/2/im.width, (y1 + y2)/2/im.height, (x2 - x1)/im.width,
                   (y2 - y1)/im.height)
            lines.append(" ".join(map(repr, row)) + "\n")
        (data / "obj" / f"{im.stem}.txt").write_text("".join(lines), encoding="utf-8")


def write_ours(format):
    "The package's own writer."
    def write(ds, dst): write_dataset(ds, dst, format, images="hardlink")
    return write


WRITERS = {
    "coco": write_ours("coco"),
    "voc": write_ours("voc"),
    "yolo": write_ours("yolo"),
    "darknet": write_darknet,
    "csv": write_csv,
    "labelme": write_labelme,
    "cvat": write_cvat,
    "kitti": write_kitti,
    "openimages": write_openimages,
    "plates": write_plates,
}


def reader_of(writer):
    "The name of the format that reads what a writer wrote."
    return "yolo" if writer == "darknet" else writer


def with_one_class(ds):
    "The same boxes, all of the class `plate`."
    return DetDataset(ds.root, ("plate",), ds.paths, ds.sizes, ds.box_image, ds.boxes, np.zeros_like(ds.labels))


def labels_by_name(ds):
    "{image file name: sorted rows (class, x1, y1, x2, y2)}: what two datasets of other formats have in common."
    found = {}
    for im in images_of(ds):
        rows = sorted((ds.classes.index(b.name), *b.xyxy) for b in im.boxes)
        found[im.name] = np.array(rows).reshape(-1, 5)
    return found
