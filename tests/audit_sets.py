"""Images that tests/fixtures/colors.onnx finds something in, with their labels. Python 3.6 too."""
import json
from pathlib import Path

import cv2
import numpy as np

CLASSES = ("Blue", "Green", "Red") # of colors.onnx, which says how blue, green or red each cell of 32 px is
CELL = 32


def write_set(folder, images=12, seed=0, names=CLASSES, shift=2, noise=60):
    "Images with cells of a color, more or less clear, and a COCO file of their labels."
    random = np.random.RandomState(seed)
    Path(str(folder)).mkdir(parents=True, exist_ok=True)
    rows = dict(images=[], annotations=[], categories=[dict(id=3 * k + 1, name=n) for k, n in enumerate(names)])
    for number in range(images):
        frame = random.randint(0, noise, (256, 320, 3)).astype(np.uint8)
        for place in random.permutation(80)[:5]:
            x, y = place % 10 * CELL, place // 10 * CELL
            label = int(random.randint(3))
            frame[y:y + CELL, x:x + CELL, label] = random.randint(100, 255)
            moved = random.randint(-shift, shift + 1, 2)
            left, top = np.clip([x, y] + moved, 0, [320 - CELL, 256 - CELL]) # the dataset's reader cuts boxes off
            box = [int(left), int(top), CELL, CELL]
            flag = random.uniform()
            rows["annotations"].append(dict(id=len(rows["annotations"]) + 1, image_id=number * 7, bbox=box,
                                            category_id=3 * label + 1, area=CELL * CELL,
                                            iscrowd=int(.05 < flag < .2), ignore=int(flag < .1)))
        name = "{}-{}.png".format(seed, number)
        cv2.imwrite(str(Path(str(folder)) / name), frame)
        rows["images"].append(dict(id=number * 7, file_name=name, width=320, height=256))
    path = Path(str(folder)) / "audit.json"
    path.write_text(json.dumps(rows))
    return path
