"""What the tests of exports make again and again, made once: networks and their graphs.

Nine tenths of an export's time go into tracing and simplifying. Tests that are about something else take the graph of
the same weights and options again: `pytest.mark.usefixtures("kept_graphs")`. It is made in the same run by the
functions under test, and test_onnx_matrix.py compares it with its network; test_onnx.py and test_onnx_queries.py trace
anew.
"""
import copy
import os
from functools import lru_cache

import exported
import onnx
from train_helpers import small_detrs

from jetson_det.export.onnx import weights_sha256
from jetson_det.models import graph as graphs
from jetson_det.runtime.files import sha256_bytes


@lru_cache(None)
def _made(name, size, seed): return exported.network(name, seed=seed)


def network(name, put=None, seed=1):
    "As `exported.network`: a copy, to be changed at will."
    from jetson_det.models.detr.sizes import SIZES
    if put is not None: small_detrs(put)
    return copy.deepcopy(_made(name, repr(SIZES.get(name)), seed))


class Graphs:
    "`trace_onnx` and `simplify_onnx`, which read again what was made of the same weights and options."
    def __init__(self, folder): self.folder = folder

    def _kept(self, key, make):
        path = self.folder/sha256_bytes(repr(key).encode())
        if not path.exists():
            part = self.folder/f"{path.name}.{os.getpid()}" # another process may write the same
            part.write_bytes(make().SerializeToString())
            os.replace(part, path)
        return onnx.ModelProto.FromString(path.read_bytes())

    def trace_onnx(self, model, input_size, opset=13, dynamic_batch=False):
        key = str(model), weights_sha256(model), tuple(input_size), opset, dynamic_batch
        return self._kept(key, lambda: graphs.trace_onnx(model, input_size, opset, dynamic_batch))

    def simplify_onnx(self, graph):
        return self._kept(sha256_bytes(graph.SerializeToString()), lambda: graphs.simplify_onnx(graph))
