"""Graphs that are made once."""
import os

import pytest


@pytest.fixture(scope="session")
def graphs(tmp_path_factory):
    "`kept.Graphs` of this run; the processes of pytest-xdist share them."
    pytest.importorskip("onnx")
    from kept import Graphs
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    base = tmp_path_factory.getbasetemp()
    folder = base/"graphs" if run is None else base.parent/f"graphs-{run}"
    folder.mkdir(exist_ok=True)
    return Graphs(folder)


@pytest.fixture(scope="module")
def kept_graphs(graphs):
    "Exports take the graphs that are there already."
    from jetson_det.export import onnx as export
    from jetson_det.models import int8
    with pytest.MonkeyPatch.context() as patch:
        for module in (export, int8):
            for name in ("trace_onnx", "simplify_onnx"): patch.setattr(module, name, getattr(graphs, name))
        yield graphs
