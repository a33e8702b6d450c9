"tools/check_layout.py finds each fault in a small project that has it, and none in one that is in order."
import importlib.util
import json
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "check_layout.py"


@pytest.fixture
def layout(tmp_path, monkeypatch):
    "The tool as a module, looking at an empty project."
    spec = importlib.util.spec_from_file_location("check_layout", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "REPO", tmp_path)
    for folder in ("nbs", "jetson_det/data", "jetson_det/runtime", "tests", "bench", "tools"):
        (tmp_path / folder).mkdir(parents=True)
    return module


def page(project, number, module, source, output=None):
    "A notebook that exports `source`, and its module."
    outputs = [] if output is None else [dict(output_type="stream", name="stdout", text=output)]
    cells = [dict(cell_type="code", source=f"#| default_exp {module}", outputs=[]),
             dict(cell_type="code", source=f"#| export\n{source}", outputs=outputs)]
    (project / "nbs" / f"{number}_{module}.ipynb").write_text(json.dumps(dict(cells=cells)))
    (project / "jetson_det" / (module.replace(".", "/") + ".py")).write_text(source)


def test_a_project_in_order_has_no_faults(layout, tmp_path):
    page(tmp_path, "60", "runtime.nms", "import numpy")
    page(tmp_path, "00", "core", "from jetson_det.runtime.nms import nms")
    page(tmp_path, "10", "data.split", "def f():\n    from ..core import InputError", "12 images\n")
    assert list(layout.faults()) == []


@pytest.mark.parametrize("lazy", ["from jetson_det.{0} import f", "def g():\n    from jetson_det.{0} import f",
                                  "import jetson_det.{0}", "def g():\n    import jetson_det.{0} as late"])
def test_an_import_of_a_higher_number_is_a_fault(layout, tmp_path, lazy):
    page(tmp_path, "10", "data.split", lazy.format("data.open"))
    page(tmp_path, "16", "data.open", "f = 1")
    assert list(layout.faults()) == ["10_data.split imports 16_data.open, which has a higher number"]


def test_a_circle_is_a_fault(layout, tmp_path):
    page(tmp_path, "10", "data.a", "from jetson_det.data.b import f")
    page(tmp_path, "10", "data.b", "def g():\n    from .c import f")
    page(tmp_path, "10", "data.c", "from . import a")
    assert list(layout.faults()) == ["3 modules import each other in a circle: data.a, data.b, data.c"]


def test_the_runtime_is_a_leaf(layout, tmp_path):
    page(tmp_path, "00", "core", "f = 1")
    page(tmp_path, "60", "runtime.nms", "from ..core import f")
    assert list(layout.faults()) == ["runtime.nms imports core: the runtime is a leaf"]


@pytest.mark.parametrize("output", [
    "saved /tmp/x/run", "/home/me/.cache", "a/site-packages/b.py", "UserWarning: no GPU"])
def test_outputs_that_show_the_machine_are_faults(layout, tmp_path, output):
    page(tmp_path, "00", "core", "f = 1", output)
    found, = layout.faults()
    assert found.startswith("nbs/00_core.ipynb: a stored output shows")


def test_wide_lines_are_faults_in_notebooks_and_tests(layout, tmp_path):
    page(tmp_path, "00", "core", "f = 1 # " + "x"*113)
    (tmp_path / "tests" / "test_a.py").write_text("a = 1\n" + "# " + "x"*119 + "\n")
    assert [found.split(":")[0] for found in layout.faults()] == ["nbs/00_core.ipynb", "tests/test_a.py, line 2"]


def test_a_link_to_a_page_that_was_renamed_is_a_fault(layout, tmp_path):
    path = tmp_path / "nbs" / "00_core.ipynb"
    page(tmp_path, "00", "core", "f = 1")
    notebook = json.loads(path.read_text())
    text = "[here](00_core.ipynb#top), [there](69_gone.ipynb), [far](https://a.org/b.ipynb)"
    notebook["cells"].append(dict(cell_type="markdown", source=[text]))
    path.write_text(json.dumps(notebook))
    assert list(layout.faults()) == ["nbs/00_core.ipynb: links to 69_gone.ipynb, which is not there"]
