"""One rule for the size of a network's input, and the same words for it, wherever a size can be given."""
import pytest

from jetson_det.cli import main
from jetson_det.cli_args import parse_input_size
from jetson_det.config import AugmentConfig, load_config
from jetson_det.config_tools import known_keys
from jetson_det.data.index import read_indexed
from jetson_det.runtime.contract import preset
from jetson_det.runtime.files import InputError
from jetson_det.runtime.geometry import INPUT_STEP, check_input_size
from jetson_det.scenes.docks import write_scenes

WORDS = "400x416 (height x width); both must be multiples of 32"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("size") / "dock", 4, (96, 160))


def test_the_rule():
    assert check_input_size([32, 1920]) == (32, 1920) and check_input_size((416.0, "384")) == (416, 384)
    for wrong in [(400, 416), (416, 400), (0, 32), (-32, 32), (31, 32)]:
        with pytest.raises(InputError, match="both must be multiples of 32"): check_input_size(wrong)
    for wrong in [416, (416,), (416, 416, 3), "big", (None, 32)]:
        with pytest.raises(InputError, match="two numbers, height and width"): check_input_size(wrong)
    with pytest.raises(InputError, match="input_size is needed"): check_input_size(None)


def test_settings_contract_and_schema():
    assert load_config(None, ["data.input_size=384x672"]).data.input_size == [384, 672]
    for call in [lambda: load_config(None, ["data.input_size=[400,416]"]),
                 lambda: load_config(None, ["data.input_size=400x416"]),
                 lambda: preset("yolox", input_size=(400, 416)),
                 lambda: parse_input_size("400x416")]:
        with pytest.raises(InputError) as e: call()
        assert WORDS in str(e.value) and "\n" not in str(e.value)
    items = known_keys()["data.input_size"]["items"]
    assert items["multipleOf"] == items["minimum"] == INPUT_STEP


def test_loader_session_and_export(scenes, tmp_path):
    pytest.importorskip("torch")
    from jetson_det.data.loader import BatchMaker
    from jetson_det.export.onnx import export_onnx
    from jetson_det.models.session import torch_session
    from jetson_det.models.zoo import create_model
    model = create_model("yolox-nano", ("Sack", "Person"))
    for call in [lambda: BatchMaker(read_indexed(scenes), (400, 416), AugmentConfig(), 2),
                 lambda: torch_session(model, (400, 416)),
                 lambda: export_onnx(model, tmp_path / "m.onnx", (400, 416))]:
        with pytest.raises(InputError) as e: call()
        assert WORDS in str(e.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", [("data", "check", "DIR"), ("data", "stats", "DIR"), ("data", "view", "DIR"),
                                  ("export", "DIR")])
def test_the_command_line(scenes, verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([word.replace("DIR", str(scenes)) for word in verb] + ["--size", "400x416"]) == 2
    assert f"--size is {WORDS}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_tile_may_have_any_size(scenes, tmp_path):
    assert main(["data", "tile", str(scenes), str(tmp_path / "tiles"), "--size", "50x70"]) == 0
