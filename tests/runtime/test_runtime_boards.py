"""Which board this is, read from the small files that a Jetson has."""
import pytest

from jetson_det.runtime.boards import BOARDS, JETPACKS, board, device_model, this_board
from jetson_det.runtime.files import InputError


def machine(root, model, memory_kb=0, release=""):
    "A root folder with the files of a board."
    for folder in ("proc/device-tree", "etc"): (root / folder).mkdir(parents=True)
    (root / "proc/device-tree/model").write_bytes(model.encode("utf-8") + b"\0")
    if memory_kb: (root / "proc/meminfo").write_text("MemTotal: {:14} kB\nMemFree: 1 kB\n".format(memory_kb))
    if release: (root / "etc/nv_tegra_release").write_text(release)
    return root


def release(major, revision):
    return "# R{} (release), REVISION: {}, GCID: 1, BOARD: generic, EABI: aarch64, DATE: x\n".format(major, revision)


@pytest.mark.parametrize("model, memory_kb, name", [
    ("NVIDIA Jetson Nano Developer Kit", 4059272, "nano"),
    ("NVIDIA Jetson Nano 2GB Developer Kit", 2027012, "nano-2gb"),
    ("quill", 8047268, "tx2"),
    ("NVIDIA Jetson Xavier NX Developer Kit", 7764784, "xavier-nx"),
    ("Jetson-AGX", 32692948, "agx-xavier"),
    ("NVIDIA Orin Nano Developer Kit", 7800000, "orin-nano"),
    ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit", 3700000, "orin-nano-4gb"),
    ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", 7620000, "orin-nano-super"),
    ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", 15650000, "orin-nx"),
    ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", 7600000, "orin-nx-8gb"),
    ("NVIDIA Jetson AGX Orin Developer Kit", 64330000, "agx-orin"),
    ("NVIDIA Jetson AGX Orin Developer Kit", 31280000, "agx-orin-32gb"),
    ("NVIDIA Jetson AGX Thor Developer Kit", 128000000, "thor"),
])
def test_boards_by_their_model_and_memory(tmp_path, model, memory_kb, name):
    found = this_board(machine(tmp_path, model, memory_kb))
    assert (found.board.name, found.model, found.l4t, found.jetpack) == (name, model, "", None)


@pytest.mark.parametrize("major, revision, l4t, jetpack", [
    (32, "7.1", "R32.7.1", "4.6"), (35, "4.1", "R35.4.1", "5.1"), (36, "4.3", "R36.4.3", "6.2"),
    (38, "2.0", "R38.2.0", "7.0"), (39, "2.0", "R39.2.0", "7.2"), (32, "4.4", "R32.4.4", None),
])
def test_jetpack_by_its_l4t(tmp_path, major, revision, l4t, jetpack):
    root = machine(tmp_path, "NVIDIA Jetson AGX Orin Developer Kit", 64330000, release(major, revision))
    found = this_board(root)
    assert (found.l4t, found.jetpack) == (l4t, JETPACKS.get(jetpack))


def test_machines_that_are_no_board(tmp_path):
    assert this_board(tmp_path) is None and device_model(tmp_path) == ""
    root = machine(tmp_path / "pi", "Raspberry Pi 5 Model B Rev 1.0", 8245000)
    assert this_board(root) is None and device_model(root) == "Raspberry Pi 5 Model B Rev 1.0"
    broken = machine(tmp_path / "broken", "NVIDIA Jetson Nano Developer Kit", release="no release here")
    assert this_board(broken).board.name == "nano" and this_board(broken).jetpack is None


def test_the_table():
    for name, row in BOARDS.items():
        assert row.name == name and board(name) is row and board("Jetson " + name.replace("-", "_").upper()) is row
        assert row.releases and all(release in JETPACKS.values() for release in row.releases)
        assert row.compute_capability[0] >= 5 and row.memory_gb >= 2 and row.bandwidth_gbps > 20
        assert row.has_fast_int8 == (row.compute_capability >= (7, 0))
    assert BOARDS["nano"].releases[0].python == "3.6" and BOARDS["nano"].releases[0].tensorrt == "8.2"
    with pytest.raises(InputError) as e: board("orin-nanu")
    assert str(e.value) == "unknown board 'orin-nanu': did you mean 'orin-nano'?"
    with pytest.raises(InputError) as e: board("x")
    assert "it is one of nano, nano-2gb" in str(e.value)
