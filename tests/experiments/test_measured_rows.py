"""What `bench` measured on a board goes back into `estimate`."""
import numpy as np
import pytest
from board_files import NANO, make_board

from jetson_det.export.estimate import calibrate, estimate
from jetson_det.runtime.contract import anchor_count, preset
from jetson_det.runtime.ops.sustained import bench_device, write_measured
from jetson_det.runtime.session import Session


@pytest.fixture
def found(tmp_path):
    size = (416, 416)
    contract = preset("yolox", ("Sack", ), size)
    answer = np.zeros((1, anchor_count(size), 6), np.float32)
    session = Session(contract, lambda x: [answer])
    session.engine = "TensorRT 8.2.1.8"
    return bench_device(lambda: session, [np.zeros((48, 64, 3), np.uint8)], tegrastats=None, repeats=1,
                        root=make_board(tmp_path / "board", NANO))


def with_ms(found, ms, size=(416, 416)):
    stages = dict(found.bench.stages, inference=dict(found.bench.stages["inference"], p50=ms))
    return found._replace(bench=found.bench._replace(stages=stages, input_size=size))


@pytest.mark.parametrize("factor", [.8, 1.5])
def test_measured_rows_move_the_estimate(found, tmp_path, factor):
    path = tmp_path / "measured.json"
    sizes = {"yolox-nano": (416, 416), "yolox-tiny": (416, 416), "yolox-s": (640, 640)}
    for name, size in sizes.items():
        predicted = estimate(name, "nano", "fp16", "MAXN", input_size=size)
        write_measured(path, with_ms(found, factor * predicted.ms, size), name, "fp16")
    calibration = calibrate(path)
    assert (calibration.board, calibration.mode, len(calibration.rows)) == ("nano", "MAXN", 3)
    assert calibration.shift == pytest.approx(factor, rel=.02) and calibration.warnings == ()
    before = estimate("yolox-m", "nano", "fp16", "MAXN", input_size=(640, 640))
    after = estimate("yolox-m", "nano", "fp16", "MAXN", calibration=calibration, input_size=(640, 640))
    assert abs(after.ms / before.ms - factor) < abs(1 - factor) and "3 rows of your own" in after.evidence


def test_an_estimate_stands_beside_what_was_measured(found):
    predicted = estimate("yolox-nano", "nano", "fp16", "MAXN", input_size=(416, 416))
    row = {key: getattr(predicted, key) for key in ("ms", "low", "high", "evidence")}
    text = str(with_ms(found, predicted.ms)._replace(predicted=row))
    assert "inside" in text and predicted.evidence in text
