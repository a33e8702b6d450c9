"export.targets: the table, and the command that looks its targets up in it."
import importlib

import pytest

from jetson_det.cli import main
from jetson_det.core import InputError
from jetson_det.export.targets import TARGETS, Target, export_target


def test_each_target_has_its_function():
    for name, target in TARGETS.items():
        assert callable(getattr(importlib.import_module(target.module), target.function)), name
        assert target.suffix.startswith("."), name


def test_an_unknown_target_is_one_line(tmp_path, capsys):
    with pytest.raises(InputError, match="--to onx: no such target: did you mean 'onnx'?"): export_target("onx")
    assert main(["export", str(tmp_path), "--to", "onx"]) == 2
    assert "no such target" in capsys.readouterr().err


def test_a_new_target_is_one_line_in_the_table(tmp_path, monkeypatch, capsys):
    from jetson_det.models.zoo import create_model
    contract = create_model("yolox-nano", ["Sack"]).contract((64, 96))
    def export_toy(source, path, **options):
        path.write_text(f"{source} {options['input_size']}")
        return contract
    monkeypatch.setattr("jetson_det.export.onnx.export_toy", export_toy, raising=False)
    monkeypatch.setitem(TARGETS, "toy", Target("jetson_det.export.onnx", "export_toy", ".toy"))
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "manifest.json").write_text("{}")
    assert main(["export", str(tmp_path / "best"), "--to", "toy", "--size", "64x96"]) == 0
    assert (tmp_path / "best.toy").read_text() == f"{tmp_path / 'best'} (64, 96)"
    assert "wrote" in capsys.readouterr().out
