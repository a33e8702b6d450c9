"""Pipelines: GStreamer itself parses each one, and runs those that need nothing of NVIDIA."""
import itertools
import json
import re
import subprocess
from pathlib import Path

import cv2
import numpy as np
import pytest
from rtsp_helpers import PYTHON, RtspServer, needs_rtsp_server

from jetson_det.runtime.files import InputError
from jetson_det.runtime.stream import gstreamer, sources
from jetson_det.runtime.stream.gstreamer import gstreamer_pipeline, has_gstreamer, nvidia_elements, usb_number
from jetson_det.runtime.stream.sources import open_source

# What may be told to NVIDIA's elements, by their documentation.
PROPERTIES = {"nvarguscamerasrc": {"sensor-id"}, "nvvidconv": {"flip-method"}, "nvvideoconvert": {"flip-method"},
              "nvv4l2decoder": {"enable-max-performance", "mjpeg"}}


def replaced(pipeline):
    "The pipeline with an end and a new beginning in place of NVIDIA's elements: what they give is not known."
    def empty(match):
        assert set(re.findall(r"([a-z0-9-]+)=", match.group(2))) <= PROPERTIES[match.group(1)]
        return "fakesrc" if match.group(1).endswith("src") else "fakesink fakesrc"
    return re.sub(r"(?:(?<= ! )|^)(nv\w+)((?: [a-z0-9-]+=\d+)*)(?= !)", empty, pipeline)


@pytest.fixture(scope="module")
def gst():
    "Ask GStreamer about one pipeline."
    needs_rtsp_server()
    program = Path(__file__).resolve().parents[2] / "gst_parse.py"
    process = subprocess.Popen([PYTHON, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, universal_newlines=True)
    def ask(pipeline, run=0):
        process.stdin.write(json.dumps({"pipeline": pipeline, "run": run}) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())
    yield ask
    process.stdin.close()
    process.wait()
    process.stdout.close()


SOURCES = ["csi://0", "csi://1", "usb:///dev/video0", "usb://2", "rtsp://u:p@10.0.0.7:554/gate?a=1&b=2", "a.mp4",
           "b.mkv", "c.avi", "d.ts"]
ELEMENTS = [("nvv4l2decoder", "nvvidconv"), ("nvv4l2decoder", "nvvideoconvert"), ("nvv4l2decoder",), ()]


def test_gstreamer_parses_every_pipeline(gst):
    count = 0
    for source, elements, size, fps in itertools.product(SOURCES, ELEMENTS, (None, (720, 1280)), (None, 29.97)):
        codecs = ("mjpg", "raw", "h264", "h265") if usb_number(source) is not None else ("h264", "h265")
        for codec in codecs:
            pipeline = gstreamer_pipeline(source, "6.2", size, fps, codec, elements=elements)
            got = gst(replaced(pipeline))
            assert "error" not in got and "appsink" in got["elements"], (pipeline, got)
            count += 1
    assert count == (7 * 2 + 2 * 4) * 4 * 4
    assert "no element" in gst("nosuchelement ! appsink")["error"] # it does tell


@pytest.mark.parametrize("source", [
    'rtsp://u:p"w@h/a ! fakesink', "rtsp://h/back\\slash", "rtsp://h/a b'c", "rtsp://h/ü",
    'dir with "quotes" ! x/film.mp4'
])
def test_an_address_is_one_value(gst, source):
    "Nothing in it becomes a part of the pipeline."
    got = gst(gstreamer_pipeline(source))
    assert got["location"] == source and "fakesink" not in got["elements"]


def test_the_pipeline_for_a_pc_reads_a_stream(gst):
    with RtspServer() as server:
        got = gst(gstreamer_pipeline(server.url, latency_ms=20), run=3)
    assert got["frames"] == [[48, 64, "BGR"]] * 3 and min(got["means"]) > 1


def test_the_pipeline_of_a_file_loses_no_frame(gst, tmp_path):
    path = tmp_path / "film.mp4"
    gst("videotestsrc num-buffers=40 ! video/x-raw,width=64,height=48 ! x264enc ! mp4mux ! tee name=t ! queue ! "
        "filesink location={} t. ! queue ! appsink".format(path), run=1000)
    bare = [frame.image for frame in open_source(path)]
    got = gst(gstreamer_pipeline(path), run=1000)
    assert got["frames"] == [[48, 64, "BGR"]] * 40 and len(bare) == 40
    assert np.abs(np.array(got["means"]) - [image.mean() for image in bare]).max() < 2


def test_what_a_release_has(monkeypatch):
    assert [nvidia_elements(release) for release in ("4.6", "5.1", "6.2")] == [("nvv4l2decoder", "nvvidconv")] * 3
    monkeypatch.setattr(gstreamer.shutil, "which", lambda name: None)
    assert nvidia_elements("7.0") == ()
    monkeypatch.setattr(gstreamer.shutil, "which", lambda name: "/bin/true")
    assert nvidia_elements("7.0") == ("nvv4l2decoder", "nvvidconv", "nvvideoconvert")
    monkeypatch.setattr(gstreamer.shutil, "which", lambda name: "/no/such/program")
    assert nvidia_elements("7.2") == ()


@pytest.mark.parametrize("call, line", [
    (lambda: gstreamer_pipeline("csi://x"), "csi://x: not a camera; write csi://0"),
    (lambda: gstreamer_pipeline("usb:///dev/sda"), "usb:///dev/sda: not a camera; write usb:///dev/video0"),
    (lambda: gstreamer_pipeline("rtsp://h/a", codec="av1"), "codec av1: one of h264, h265"),
    (lambda: gstreamer_pipeline("http://u:secret@h/a"), "no GStreamer pipeline for http://h/a: rtsp://, csi://"),
    (lambda: gstreamer_pipeline("a.txt"), "no GStreamer pipeline for a.txt"),
])
def test_errors(call, line):
    with pytest.raises(InputError) as e: call()
    assert str(e.value).startswith(line)


def test_sources_know_the_addresses(monkeypatch):
    "What is opened, and how; there is no camera here."
    opened = []
    class NoCapture:
        def __init__(self, *args): opened.append(args)
        def isOpened(self): return False
    monkeypatch.setattr(sources.cv2, "VideoCapture", NoCapture)
    monkeypatch.setattr(gstreamer, "has_gstreamer", lambda: True)
    asked = [("usb:///dev/video3", "", "camera3"), ("csi://1", "", "csi1"),
             ("rtsp://u:pw@h/a", "x ! appsink", "rtsp://h/a")]
    for source, pipeline, name in asked:
        with pytest.raises(InputError, match="^{}: the camera or stream cannot be opened".format(name)):
            open_source(source, pipeline)
    assert opened[0] == (3,)
    assert opened[1] == (gstreamer_pipeline("csi://1"), cv2.CAP_GSTREAMER)
    assert opened[2] == ("x ! appsink", cv2.CAP_GSTREAMER)
    monkeypatch.setattr(gstreamer, "has_gstreamer", lambda: False)
    for pipeline in ("", "x ! appsink"):
        with pytest.raises(InputError, match="1: needs an OpenCV with GStreamer"): open_source("csi://1", pipeline)


def test_the_build_tells():
    assert not has_gstreamer("    GStreamer:                   NO\n")
    assert has_gstreamer("x\n    GStreamer:                   YES (1.20.3)\ny")
    assert not has_gstreamer("")
    assert has_gstreamer() == bool(re.search("GStreamer: +YES", cv2.getBuildInformation()))
