"""Label files and images written by hand for the tests of the readers, and the one line of an error."""
import json

import cv2
import numpy as np
import pytest

from jetson_det.core import InputError


def picture(h=48, w=64, suffix=".jpg"):
    return cv2.imencode(suffix, np.full((h, w, 3), 127, np.uint8))[1].tobytes()


def put(root, files):
    "Write {path: bytes, text or JSON}."
    for path, data in files.items():
        p = root / path
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_bytes(data if isinstance(data, bytes) else (
            data if isinstance(data, str) else json.dumps(data)).encode())
    return root


def refused(call, *parts):
    "The one line of the InputError."
    with pytest.raises(InputError) as e: call()
    line = str(e.value)
    assert "\n" not in line
    for p in parts: assert p in line, line
    return line
