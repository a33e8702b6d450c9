"""Label files and images written by hand for the tests of the readers, and the one line of an error."""
import json

import cv2
import numpy as np
import pytest

from jetson_det.core import InputError


def image_bytes(h=48, w=64, suffix=".jpg"):
    "A gray image as a file's content."
    return cv2.imencode(suffix, np.full((h, w, 3), 127, np.uint8))[1].tobytes()


def put(root, files):
    "Write {path: bytes, text, or what JSON can hold}."
    for path, data in files.items():
        p = root / path
        p.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(data, (bytes, str)): data = json.dumps(data)
        if isinstance(data, str): data = data.encode("utf-8", "surrogatepass")
        p.write_bytes(data)
    return root


def refused(call, *parts):
    "The one line of the InputError; it holds all the parts."
    with pytest.raises(InputError) as e: call()
    line = str(e.value)
    assert "\n" not in line and len(line) < 1000
    for p in parts: assert p in line, line
    return line


def attributes_of(ds):
    "{name: values} of a dataset's boxes."
    return {name: values.tolist() for name, values in ds.attributes.items()}
