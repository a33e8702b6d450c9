"""Images, films and a session without a network, for tests of predictions. Python 3.6, as the runtime."""
import hashlib
import os

import cv2
import numpy as np

from jetson_det.runtime.contract import preset
from jetson_det.runtime.sessions import Session


def middle_session():
    "A session that finds one box in the middle of every image."
    def infer(x):
        rows = np.zeros((len(x), 84, 7), np.float32)
        rows[:, 0] = 32, 24, 20, 16, 1, .1, .9
        return [rows]
    return Session(preset("yolox", classes=("Sack", "Person"), input_size=(64, 64))._replace(output="yolox"), infer)


def put_image(path, value=90, size=(24, 32)):
    "A gray image at a path of text or bytes; the folders on the way are made."
    path = os.fsencode(str(path)) if not isinstance(path, bytes) else path
    os.makedirs(os.path.dirname(path), exist_ok=True)
    suffix = os.path.splitext(path)[1].decode().lower()
    with open(path, "wb") as f: f.write(cv2.imencode(suffix, np.full(size + (3,), value, np.uint8))[1].tobytes())


def put_film(path, frames=20, size=(48, 64), fps=10, noise=False):
    "A film of gray frames, or of noise, which compresses badly."
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, size[::-1])
    rng = np.random.RandomState(0)
    for k in range(frames):
        frame = rng.randint(0, 256, size + (3,)) if noise else np.full(size + (3,), k % 250)
        writer.write(frame.astype(np.uint8))
    writer.release()


def count_frames(path):
    "How many frames of a film can be read."
    capture = cv2.VideoCapture(str(path))
    count = 0
    while capture.read()[0]: count += 1
    capture.release()
    return count


def digests(folder):
    "Each file below a folder and the digest of its content; links are not followed."
    found = {}
    for root, _, files in os.walk(str(folder)):
        for name in files:
            path = os.path.join(root, name)
            if os.path.islink(path) or not os.path.isfile(path): continue
            with open(path, "rb") as f: found[os.path.relpath(path, str(folder))] = hashlib.sha256(f.read()).hexdigest()
    return found


def visible(folder):
    "The visible files below a folder, relative to it, sorted."
    return sorted(name for name in digests(folder) if not os.path.basename(name).startswith("."))
