"""Every label format written by hand from one dataset, as the tools that own it write it: what the readers are
tested with."""
import csv
import json
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from jetson_det.data.dataset import CROWD, IGNORE
from jetson_det.data.formats.registry import write_dataset

TOLERANCE = {"yolo": 1e-3, "openimages": 1e-3}  # pixels; the others 1e-3 too: what float32 leaves


def rows(ds):
    "(image, file name, (h, w), [(class name, box, flags)]) of each image."
    for i in range(len(ds)):
        boxes, labels, flags = ds.boxes_of(i)
        yield i, ds.paths[i].rsplit("/", 1)[-1], tuple(
            ds.sizes[i].tolist()), [(ds.classes[c], b, f) for c, b, f in zip(labels,
                                                                             boxes.astype(float).tolist(), flags)]


def place(ds, folder):
    "The images, linked into a folder."
    folder.mkdir(parents=True)
    for i, name, _, _ in rows(ds): (folder / name).hardlink_to(ds.path_of(i))


def table(path, header, lines, **kw):
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f, **kw).writerows([header, *lines] if header else lines)


def write_csv(ds, dst):
    place(ds, dst / "images")
    lines = [(n, w, h, c, *b) for _, n, (h, w), boxes in rows(ds) for c, b, _ in boxes]
    table(dst / "labels.csv", ("filename", "width", "height", "class", "xmin", "ymin", "xmax", "ymax"), lines)


def write_openimages(ds, dst):
    place(ds, dst / "images")
    header = (
        "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
        .split(",")
    )
    mid = {c: f"/m/0{k}" for k, c in enumerate(ds.classes)}
    lines = [(n.rsplit(".", 1)[0], "xclick", mid[c], 1, b[0]/w, b[2]/w, b[1]/h, b[3]/h, 0, 0, int(f & CROWD > 0), 0, 0)
             for _, n, (h, w), boxes in rows(ds)
             for c, b, f in boxes]
    table(dst / "train-annotations-bbox.csv", header, lines)
    table(dst / "class-descriptions-boxable.csv", None, [(m, c) for c, m in mid.items()])


def write_plates(ds, dst):
    place(ds, dst / "photos")
    for _, n, _, boxes in rows(ds):
        lines = [f"{n}\t{b[0]}\t{b[1]}\t{b[2] - b[0]}\t{b[3] - b[1]}\tM{k} XSX\n" for k, (_, b, _) in enumerate(boxes)]
        (dst / "photos" / (n.rsplit(".", 1)[0] + ".txt")).write_text("".join(lines), encoding="utf-8")


def write_labelme(ds, dst):
    place(ds, dst / "work")
    for _, n, (h, w), boxes in rows(ds):
        shapes = [
            dict(label=c, points=[[b[2], b[3]], [b[0], b[1]]], group_id=None, shape_type="rectangle", flags={})
            for c, b, _ in boxes
        ]
        d = dict(version="5.4.1", flags={}, shapes=shapes, imagePath=n, imageData=None, imageHeight=h, imageWidth=w)
        (dst/"work"/(n.rsplit(".", 1)[0] + ".json")).write_text(json.dumps(d, ensure_ascii=False, indent=1),
                                                                encoding="utf-8")


def write_cvat(ds, dst):
    place(ds, dst / "images")
    labels = "".join(f"<label><name>{escape(c)}</name><attributes></attributes></label>" for c in ds.classes)
    out = [
        '<?xml version="1.0" encoding="utf-8"?>',
        "<annotations>",
        "  <version>1.1</version>",
        (
            f"  <meta><task><name>gate</name><size>{len(ds)}</size><mode>annotation</mode><labels>{labels}</labels></task></meta>"
        ),
    ]
    for i, n, (h, w), boxes in rows(ds):
        out.append(f'  <image id="{i}" name={quoteattr(n)} width="{w}" height="{h}">')
        out += [
            f'    <box label={quoteattr(c)} occluded="0" source="manual" xtl="{b[0]}" ytl="{b[1]}" xbr="{b[2]}"'
            f' ybr="{b[3]}" z_order="0">\n    </box>'
            for c, b, _ in boxes
        ]
        out.append("  </image>")
    (dst / "annotations.xml").write_text("\n".join(out + ["</annotations>\n"]), encoding="utf-8")


def write_kitti(ds, dst):
    place(ds, dst / "image_2")
    (dst / "label_2").mkdir()
    for _, n, _, boxes in rows(ds):
        lines = [
            f"{'DontCare' if f & IGNORE else c} 0.00 0 -1.57 {' '.join(map(repr, b))} -1 -1 -1 -1000 -1000 -1000 -10\n"
            for c, b, f in boxes
        ]
        (dst / "label_2" / (n.rsplit(".", 1)[0] + ".txt")).write_text("".join(lines), encoding="utf-8")


def write_darknet(ds, dst):
    place(ds, dst / "data/obj")
    (dst / "data/obj.names").write_text("".join(c + "\n" for c in ds.classes), encoding="utf-8")
    (dst/"data/obj.data"
     ).write_text(f"classes = {len(ds.classes)}\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n")
    (dst / "data/train.txt").write_text("".join(f"data/obj/{n}\n" for _, n, _, _ in rows(ds)), encoding="utf-8")
    for _, n, (h, w), boxes in rows(ds):
        yolo = [(ds.classes.index(c), (b[0] + b[2])/2/w, (b[1] + b[3])/2/h, (b[2] - b[0])/w, (b[3] - b[1])/h)
                for c, b, _ in boxes]
        (dst/"data/obj"/(n.rsplit(".", 1)[0] + ".txt")).write_text("".join(" ".join(map(repr, r)) + "\n" for r in yolo),
                                                                   encoding="utf-8")


def write_ours(format): return lambda ds, dst: write_dataset(ds, dst, format, images="hardlink")


WRITERS = {
    "coco": write_ours("coco"), "voc": write_ours("voc"), "yolo": write_ours("yolo"), "darknet": write_darknet,
    "csv": write_csv, "labelme": write_labelme, "cvat": write_cvat, "kitti": write_kitti,
    "openimages": write_openimages, "plates": write_plates
}


def reader_of(writer):
    "The name of the format that reads what a writer wrote."
    return "yolo" if writer == "darknet" else writer


def labels_by_name(ds):
    "{image file name: sorted rows (class, x1, y1, x2, y2)}: what two datasets of other formats have in common."
    return {
        n: np.array(sorted((ds.classes.index(c), *b)
                           for c, b, _ in boxes)).reshape(-1, 5)
        for _, n, _, boxes in rows(ds)
    }
