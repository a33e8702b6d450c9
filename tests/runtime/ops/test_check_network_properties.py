"""What is written by hand is read back by the reader of ONNX metadata; the checklist never calls nothing a pass."""
import pytest

pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import given
from hypothesis import strategies as st

from jetson_det.runtime.metadata import message_fields
from jetson_det.runtime.ops.check_network import _field
from jetson_det.runtime.ops.checklist import BOUNDS, checklist

NUMBERS = st.integers(1, 2**28)
VALUES = st.one_of(st.integers(0, 2**63 - 1), st.binary(max_size=300))


@given(st.lists(st.tuples(NUMBERS, VALUES), max_size=8))
def test_fields_are_read_back(rows):
    data = b"".join(_field(number, value) for number, value in rows)
    found = [(number, value if isinstance(value, int) else bytes(value)) for number, value in message_fields(data)]
    assert found == rows


@given(st.fixed_dictionaries({key: st.one_of(st.none(), st.floats(0, 100)) for key in BOUNDS}))
def test_a_verdict_needs_a_figure(values):
    for check, (key, bound) in zip(checklist(**values), BOUNDS.items()):
        assert (check.passed is None) == (values[key] is None)
        if values[key] is None: continue
        above = bound.least is None or values[key] >= bound.least
        assert check.passed == (above and (bound.most is None or values[key] <= bound.most))
