"""Parse and run GStreamer pipelines: `/usr/bin/python3 gst_parse.py` reads one JSON object a line, and answers each.

{"pipeline": TEXT} is parsed: {"error": ...} or {"elements": [...], "location": ...}. With "run": N up to N frames are
taken out of its appsink too: {"frames": [[height, width, format], ...], "means": [...]}.
"""
import json
import sys

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstApp", "1.0")
from gi.repository import GLib, Gst, GstApp # noqa: E402, F401


def elements_of(pipeline):
    iterator = pipeline.iterate_elements()
    result, element = iterator.next()
    while result == Gst.IteratorResult.OK:
        yield element
        result, element = iterator.next()


def run(pipeline, sink, most):
    frames = []
    means = []
    pipeline.set_state(Gst.State.PLAYING)
    while len(frames) < most:
        sample = sink.emit("try-pull-sample", 5 * Gst.SECOND)
        if sample is None: break
        shape = sample.get_caps().get_structure(0)
        data = sample.get_buffer().extract_dup(0, sample.get_buffer().get_size())
        frames.append([shape.get_value("height"), shape.get_value("width"), shape.get_value("format")])
        means.append(sum(data) / len(data))
    pipeline.set_state(Gst.State.NULL)
    return {"frames": frames, "means": means}


def answer(text, most):
    try: pipeline = Gst.parse_launch(text)
    except GLib.Error as e: return {"error": e.message}
    elements = list(elements_of(pipeline))
    names = [e.get_factory().get_name() for e in elements]
    if most: return run(pipeline, elements[names.index("appsink")], most)
    locations = [e.get_property("location") for e in elements if e.find_property("location")]
    return {"elements": sorted(names), "location": (locations + [None])[0]}


Gst.init(None)
for line in sys.stdin:
    asked = json.loads(line)
    print(json.dumps(answer(asked["pipeline"], asked.get("run", 0))), flush=True)
