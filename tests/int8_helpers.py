"""What fake INT8 asks of a network's graph, asked once."""
from contextlib import contextmanager

import pytest

from jetson_det.models import fake_quant
from jetson_det.models.int8 import int8_layers


@contextmanager
def layers_found_once():
    """Within it the layers that become INT8 are found once for each network and size: a trace and onnxslim take
    seconds, and the weights have no say."""
    found = {}
    def once(model, size):
        key = model.name, tuple(size), tuple(p.shape for p in model.parameters())
        if key not in found: found[key] = int8_layers(model, size)
        return found[key]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(fake_quant, "int8_layers", once)
        yield
