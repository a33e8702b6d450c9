"""Random boxes that the losses of YOLOv8, YOLO11 and YOLO26 are held against the package Ultralytics on."""
import oracles
import pytest
import torch

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


def padded_batch(ds):
    "All of a small dataset: images (B,3,h,w) 0..255, boxes (B,n,4), labels (B,n) with -1 for padding."
    import cv2
    n_images = len(ds)
    images = torch.stack([torch.from_numpy(cv2.imread(str(ds.path_of(i)))).permute(2, 0, 1) for i in range(n_images)])
    n = max((ds.box_image == i).sum() for i in range(n_images))
    boxes = torch.zeros(n_images, n, 4)
    labels = torch.full((n_images, n), -1)
    for i in range(n_images):
        mine = torch.from_numpy(ds.box_image == i)
        boxes[i, :mine.sum()] = torch.from_numpy(ds.boxes)[mine]
        labels[i, :mine.sum()] = torch.from_numpy(ds.labels)[mine].long()
    return images, boxes, labels


def overfit(model, images, boxes, labels, steps=300, before_step=None):
    "Trains on one batch by AdamW: 10 steps of warm-up, then linearly down. The last loss."
    optimizer = torch.optim.AdamW(model.param_groups(.01), lr=2e-3)
    for step in range(steps):
        if before_step is not None: before_step(step/steps)
        for g in optimizer.param_groups: g["lr"] = 2e-3*min(1, (step + 1)/10)*max(.02, 1 - step/steps)
        optimizer.zero_grad()
        loss = model.loss(model(model.normalize(images)), boxes, labels).total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.)
        optimizer.step()
    return loss.item()
