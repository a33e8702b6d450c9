"""doctor on a board: the lines of the runtime's advice, in text and JSON."""
import json

import pytest
from board_files import NANO, make_board

from jetson_det import cli_doctor
from jetson_det.runtime.ops import board_advice as page


@pytest.fixture
def on_a_nano(tmp_path, monkeypatch):
    root = str(make_board(tmp_path / "nano", NANO))
    plain = page._rows
    monkeypatch.setattr(page, "_rows", lambda _, environment, python: plain(root, {}, "3.6"))


def test_a_board_is_told_what_to_do(on_a_nano, tmp_path, capsys):
    cli_doctor.doctor(tmp_path / "d.json")
    out = capsys.readouterr().out
    assert "ok JetPack: 4.6 (L4T R32.7.1)" in out and "!! driver: not usable; no NVIDIA driver here" in out
    assert "!! OPENBLAS_CORETYPE: not set; numpy 1.19.5" in out
    rows = {row["name"]: row for row in json.loads((tmp_path / "d.json").read_text())["board"]}
    assert rows["swap"]["ok"] is True and rows["driver"]["do"]


def test_elsewhere_it_says_nothing_of_boards(tmp_path, capsys):
    if page.board_advice(): pytest.skip("this is a board")
    cli_doctor.doctor(tmp_path / "d.json")
    assert "JetPack" not in capsys.readouterr().out.replace("comes with JetPack", "")
    assert json.loads((tmp_path / "d.json").read_text())["board"] == []
