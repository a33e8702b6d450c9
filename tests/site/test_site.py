"""The site, the README and the Quarto files are what the notebooks give, and ask no other host for anything."""
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
TOOL = REPO / "tools" / "build_site.py"
spec = importlib.util.spec_from_file_location("build_site", TOOL)
build_site = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build_site)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="the docs extra is not installed")
    out = tmp_path_factory.mktemp("site")
    p = subprocess.run([sys.executable, str(TOOL), "--out", str(out)], capture_output=True, text=True)
    assert p.returncode == 0, p.stderr[-3000:]
    return out


def test_a_page_for_each_notebook_in_the_navigation(site):
    home = (site / "index.html").read_text(encoding="utf-8")
    for nb in build_site.notebooks():
        page = build_site.page_of(nb).replace(".md", ".html")
        assert (site / page).is_file(), page
        assert 'href="{}"'.format("index.html" if page == "index.html" else page) in home, page
    stages = re.findall(r'md-nav__link[^>]*>\s*(?:<span[^>]*>\s*)?([A-Z]\w+(?: \w+)*)\s*<', home)
    order = [s for s in build_site.ORDER if s in build_site.navigation()]
    assert [s for s in dict.fromkeys(stages) if s in order] == order


def test_no_request_to_other_hosts(site):
    assert build_site.external_requests(site) == []


def test_the_check_for_requests_sees_them(tmp_path):
    (tmp_path/"a.html").write_text(
        '<script src="https://cdn.example/x.js"></script><link rel="stylesheet" href="//fonts.example/f.css">'
        '<a href="https://example.org">fine</a><style>@import "https://fonts.example/g.css";</style>')
    (tmp_path/
     "b.css").write_text("body { background: url(https://cdn.example/x.png) } p { background: url(local.png) }")
    assert len(build_site.external_requests(tmp_path)) == 4


def test_pages_show_code_output_and_pictures(site):
    core = (site / "core.html").read_text(encoding="utf-8")
    assert 'id="rng_for"' in core and "SeedSequence" in core and "#|" not in core and "default_exp" not in core
    assert (site / "images" / "detections.jpg").is_file()
    pictures = [f for f in site.rglob("*_files/*.png")]
    assert pictures, "no notebook's figure reached the site"


def test_search_knows_the_symbols(site):
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    assert any(d["location"].endswith("#rng_for") for d in index["docs"])
    assert (site / "assets" / "search_worker.js").is_file()


@pytest.mark.parametrize("words,page", [
    ("install", "guides/install.html"),
    ("out of memory", "guides/troubleshooting.html#out-of-memory"),
    ("int8", "guides/troubleshooting.html#int8-tensorrt-engines"),
    ("train.lr", "settings.html#train"),
    ("jetson-det predict", "commands.html#jetson-det-predict"),
])
def test_search_finds_what_people_type(site, words, page):
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    found = {d["location"]: (d["title"] + " " + d["text"]).lower() for d in index["docs"]}
    wanted = words.split(".")[-1]
    assert wanted in found[page], page


def test_reference_pages_have_every_verb_and_setting(site):
    from jetson_det.config_tools import explain
    commands = (site / "commands.html").read_text(encoding="utf-8")
    for verb in ("train", "evaluate", "predict", "data check", "config explain"):
        assert f'id="jetson-det-{verb.replace(" ", "-")}"' in commands, verb
    settings = (site / "settings.html").read_text(encoding="utf-8")
    missing = [s.key for s in explain() if f"<code>{s.key.split('.')[1]}</code>" not in settings]
    assert not missing


def test_prose_comes_before_the_imports(site):
    core = (site / "core.html").read_text(encoding="utf-8")
    assert core.index("<p>This page holds") < core.index("<details")
    assert "import" in core[core.index("<details"):core.index("</details>")]


def test_every_image_has_a_text(site):
    for page in site.rglob("*.html"):
        for image in re.findall(r"<img[^>]*>", page.read_text(encoding="utf-8")):
            alt = re.search(r'alt="([^"]*)"', image)
            assert alt and len(alt[1]) > 8, (page.name, image[:120])


@pytest.mark.parametrize("prose,expected", [
    ("The loss falls:", "Figure: The loss falls"),
    ("See [the loop](a.ipynb). Two curves of `AP`. One is *ours*.", "Figure: Two curves of AP. One is ours"),
    ("", "Figure: the output of the code above"),
])
def test_figures_are_described_by_the_prose_above(prose, expected):
    assert build_site.alt_text(prose) == expected


def test_readme_and_sidebar_are_in_sync():
    p = subprocess.run([sys.executable, str(TOOL), "--check"], capture_output=True, text=True)
    assert p.returncode == 0, p.stderr


def test_readme_works_on_github():
    text = (REPO / "README.md").read_text(encoding="utf-8")
    assert text == build_site.readme() == build_site.readme()
    assert "data:image" not in text and "<style" not in text and "#|" not in text
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", text): assert (REPO / target).exists(), target
    for picture in (REPO / "nbs" / "images").iterdir(): assert picture.stat().st_size < 150_000, picture


def test_quarto_finds_its_files():
    link = REPO / "nbs" / "_quarto.yml"
    assert link.is_symlink() and link.resolve() == REPO / "_quarto.yml"
    assert (REPO / "_quarto.yml").read_text().rstrip().endswith("metadata-files: [nbdev.yml, sidebar.yml]")
    listed = set(re.findall(r"^ +- (\S+\.ipynb)$", (REPO / "nbs" / "sidebar.yml").read_text(), re.M))
    assert listed == {n.relative_to(REPO / "nbs").as_posix() for n in build_site.notebooks()}


@pytest.mark.parametrize("text,expected", [
    ("Intro:\n- a\n- b", "Intro:\n\n- a\n- b"),
    ("- a\n  more\n- b", "- a\n  more\n- b"),
    ("```\nx\n- y\n```", "```\nx\n- y\n```"),
])
def test_lists_get_the_blank_line_they_need(text, expected):
    assert build_site.spaced_lists(text) == expected


def test_formulas_become_mathml_and_code_does_not():
    out = build_site.formulas("at $w/2$ and `$HOME`, $5 and 6$ each\n```bash\necho $A $B\n```")
    assert "<math" in out and "`$HOME`" in out and "echo $A $B" in out


def test_names_link_to_where_they_are_defined():
    names = {"evaluate": "evaluate.coco.md#evaluate", "38_train.loop": "train.loop.md"}
    assert build_site.linked("see `38_train.loop`.", "core.md", names) == "see [`38_train.loop`](train.loop.md)."
    assert build_site.linked("use `evaluate()` here", "jobs/train.md",
                             names) == "use [`evaluate()`](../evaluate.coco.md#evaluate) here"
    assert build_site.linked("`evaluate`", "evaluate.coco.md", names) == "`evaluate`"
    assert build_site.linked("```\n`evaluate`\n```\n# `evaluate`", "core.md",
                             names) == "```\n`evaluate`\n```\n# `evaluate`"
