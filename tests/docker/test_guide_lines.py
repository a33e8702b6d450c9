"""The lines of the guide `On the Nano, Orin and Thor`: what they set stays set, what they call is there, and what the
program takes is installed. None of them is run here: they are for a board."""
import contextlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
DOCKER = REPO/"docker"


def sections():
    "Title of a section of the guide -> lines of its blocks for a shell."
    cells = json.loads((REPO/"nbs/guides/on_board.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    found = {}
    for part in re.split(r"^## ", text, flags=re.M)[1:]:
        blocks = re.findall(r"^```bash\n(.*?)^```", part, re.M | re.S)
        found[part.partition("\n")[0]] = "".join(blocks).splitlines()
    return found


BLOCKS = sections()


def of_jetpack(number): return next(lines for title, lines in BLOCKS.items() if title.startswith(f"JetPack {number}"))


@pytest.mark.parametrize("title", sorted(BLOCKS))
def test_a_shell_reads_the_lines(title):
    done = subprocess.run(["sh", "-n"], input="\n".join(BLOCKS[title]), text=True, capture_output=True)
    assert done.returncode == 0 and done.stderr == ""


def test_what_is_exported_outlives_the_shell():
    exports = [line for lines in BLOCKS.values() for line in lines if re.search(r"\bexport\b", line)]
    assert len(exports) == 3 and all(">>~/.bashrc && . ~/.bashrc" in line for line in exports), exports


@pytest.mark.parametrize("number", [4, 5, 6, 7])
def test_a_pipeline_in_yaml_can_be_read(number):
    assert any("pip" in line and "install" in line and "PyYAML" in line for line in of_jetpack(number))


@pytest.mark.parametrize("number", [5, 7])
def test_a_pipeline_in_yaml_can_be_read_in_a_container(number):
    "The images for JetPack 4 and 6 begin with one that has many packages; these two install theirs."
    assert "python3-yaml" in (DOCKER/f"Dockerfile.jetpack{number}").read_text()


def test_the_program_knows_the_verbs_of_the_guide(tmp_path, capsys):
    from jetson_det.runtime.program import main
    with contextlib.suppress(SystemExit): main(["--help"], tmp_path)
    verbs = re.findall("^    ([a-z-]+)", capsys.readouterr().out, re.M)
    named = re.findall(r"detector\.pyz ([a-z-]+)", "\n".join(line for lines in BLOCKS.values() for line in lines))
    assert set(named) <= set(verbs) and {"build", "check", "watch", "run", "board-check"} <= set(named)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say():
    "Of the scripts of the containers, notes included."
    done = subprocess.run(["shellcheck", *map(str, sorted(DOCKER.glob("*.sh")))], capture_output=True, text=True)
    assert done.stdout == "" and done.returncode == 0
