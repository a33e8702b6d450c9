"""Random boxes that the losses of YOLOv8, YOLO11 and YOLO26 are held against the package Ultralytics on."""
import oracles
import pytest

P3 = (8, 16, 32) # strides
P2 = (4, 8, 16)
P2_P5 = (4, 8, 16, 32)

# name -> images, boxes an image, (h, w), strides, classes, how many boxes of each image are real (None: all)
SCENES = {
    "ordinary": (3, 12, (160, 160), P3, 7, None),
    "wide": (2, 12, (96, 224), P3, 7, None),
    "tall, P2": (2, 12, (224, 96), P2, 7, None),
    "one class": (2, 12, (128, 160), P3, 1, None),
    "some images empty": (4, 10, (128, 160), P2_P5, 7, (10, 0, 3, 0)),
    "all images empty": (2, 4, (96, 128), P3, 7, (0, 0)),
    "100 boxes": (4, 100, (320, 448), P3, 80, None),
    "500 boxes": (2, 500, (320, 448), P2, 7, (500, 3)),
}


def scene(name, seed=0):
    "Boxes (B,n,4), labels (B,n) with -1 for padding, (h, w), strides, number of classes."
    batch, n, size, strides, n_classes, keep = SCENES[name]
    boxes, labels = oracles.random_scene(batch, n, size, n_classes, seed=seed)
    for i, k in enumerate(keep or ()): labels[i, k:] = -1
    return boxes, labels, size, strides, n_classes


def slow_but(sizes, names):
    "The names as parameters of a test; those of other sizes are marked slow."
    return [n if n.partition("-")[0][-1] in sizes else pytest.param(n, marks=pytest.mark.slow) for n in names]
