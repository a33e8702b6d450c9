"""What an input costs on a board: the file's own size by the file, another by the network's name, else not known."""
from pathlib import Path

import pytest

from jetson_det.core import InputError
from jetson_det.export.board_cost import board_cost
from jetson_det.export.estimate import estimate
from jetson_det.runtime.contract import preset

COLORS = Path(__file__).parents[1] / "fixtures" / "colors.onnx"


def contract(name, size): return preset("yolox", ("sack",), size)._replace(name=name)


def test_it_says_what_the_estimate_says():
    cost = board_cost(None, contract("yolox-nano", (160, 224)), "orin-nano", "fp32")
    for size in ((160, 224), (416, 416)):
        found = estimate("yolox-nano", "orin-nano", "fp32", input_size=size)
        assert tuple(cost.of(size)) == (found.ms, found.low, found.high)
    assert cost.board == "orin-nano, fp32" and cost.how == "predicted"


def test_a_file_is_asked_for_its_own_size_alone():
    cost = board_cost(COLORS, contract("colors", (256, 320)), "nano")
    assert cost.of((256, 320)).value == pytest.approx(estimate(str(COLORS), "nano").ms)
    assert cost.of((512, 640)) is None # no network of that name is known


def test_what_is_not_known_stays_open_and_an_unknown_board_is_refused():
    assert board_cost(None, contract("unheard", (640, 640)), "nano").of((640, 640)) is None
    with pytest.raises(InputError, match="orin-nano"): board_cost(None, contract("yolox-nano", (160, 224)), "orin-nono")
