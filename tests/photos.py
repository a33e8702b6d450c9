"""Photos with an EXIF orientation: a bright object on dark ground, stored on its side, mirrored or upside down."""
import zlib

import numpy as np
from PIL import Image

ORIENTATIONS = range(1, 9)
STORED = 96, 160  # height, width as stored
# what Pillow, a third party, does to show the image
_TRANSPOSE = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
              7: "TRANSVERSE", 8: "ROTATE_90"}


def bright_box(image):
    "The box around the bright object; padding is darker."
    ys, xs = np.nonzero(np.asarray(image)[..., 0] > 190)
    return [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]


def shown(pixels, orientation):
    "What a viewer shows of stored pixels."
    image = Image.fromarray(pixels)
    if orientation > 1: image = image.transpose(Image.Transpose[_TRANSPOSE[orientation]])
    return np.asarray(image)


def write_photo(path, orientation, box, size=STORED, kind="JPEG"):
    "A photo whose object is at `box` of the stored pixels; where the object is on the upright image."
    # a texture of its own, so that no two photos look the same
    pixels = np.random.default_rng(zlib.crc32(path.name.encode())).integers(0, 60, (*size, 3), np.uint8)
    x1, y1, x2, y2 = box
    pixels[y1:y2, x1:x2] = 230
    exif = Image.Exif()
    if orientation > 1: exif[274] = orientation
    Image.fromarray(pixels).save(path, kind, exif=exif, quality=100)
    return bright_box(shown(pixels, orientation))
