"""The documentation from the notebooks, with packages from PyPI alone.

    python tools/build_site.py [--out site]  every notebook a page; stages, search, no request to other hosts
    python tools/build_site.py --readme      README.md from nbs/index.ipynb
    python tools/build_site.py --sidebar     nbs/sidebar.yml, for those who render the notebooks with Quarto
    python tools/build_site.py --check       exit code 1 when README.md or nbs/sidebar.yml are out of date

Notebooks are not executed: their stored outputs are part of the page. A public symbol gets a heading of its own above
the cell that exports it, so that it stands in the table of contents and backticked names elsewhere can link to it.
"""
import argparse
import ast
import base64
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import reference  # noqa: E402

REPO = Path(__file__).resolve().parent.parent
NBS = REPO / "nbs"
SETTINGS = "Settings and command line"
STAGES = {"0": SETTINGS, "1": "Data", "2": "Models", "3": "Training", "4": "Evaluation", "5": "Export", "6": "Runtime",
          "7": "Experiments", "8": SETTINGS, "9": SETTINGS, "families": "Families", "jobs": "Jobs",
          "tutorials": "Start", "guides": "Start"}
ORDER = [
    "Start", "Families", "Data", "Models", "Training", "Evaluation", "Export", "Runtime", "Experiments", "Jobs",
    SETTINGS
]
# the order of what a newcomer reads; a name that ends in .md is a page made from the code
START = ["index", "install", "quickstart", "own_data", "board", "commands.md", "settings.md", "troubleshooting",
         "benchmarks"]
# what the offline plugin would fetch; tools/search_worker.js stands in for it
SHIM = "https://unpkg.com/iframe-worker/shim"
FIRST = {"train", "yolox"}
HIDDEN = {"hide", "default_exp"}  # cells that are no part of the page
DIRECTIVE = re.compile(r"^#\|\s*([\w-]+):?[ \t]*(.*)$")


# ---- notebooks as pages

def notebooks():
    """Every notebook below nbs/: what a newcomer reads first, then by name, but the training job and YOLOX come before
    their neighbors."""
    found = (f for f in NBS.rglob("*.ipynb") if not any(p.startswith((".", "_")) for p in f.relative_to(NBS).parts))
    def place(f): return START.index(f.stem) if f.stem in START else len(START)
    return sorted(found, key=lambda f: (place(f), f.parent, f.stem not in FIRST, f.name))


def page_of(notebook):
    """The page's name, as nbdev names it: `jobs/train.ipynb` -> `jobs/train.md`, `31_train.loop.ipynb` ->
    `train.loop.md`."""
    rel = notebook.relative_to(NBS) if notebook.is_absolute() else notebook
    return rel.with_name(re.sub(r"^\d+[a-zA-Z0-9]*_", "", rel.stem) + ".md").as_posix()


def stage_of(notebook):
    "Which section of the navigation a notebook belongs to."
    rel = notebook.relative_to(NBS)
    return STAGES.get(rel.parts[0] if len(rel.parts) > 1 else rel.name[0], "Start")  # the index


def cells_of(notebook):
    "(kind, source, directives, outputs) of each cell."
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        lines = "".join(cell["source"]).splitlines()
        directives = dict(m.groups() for m in map(DIRECTIVE.match, lines) if m) if cell["cell_type"] == "code" else {}
        if directives: lines = [line for line in lines if not DIRECTIVE.match(line)]
        yield cell["cell_type"], "\n".join(lines).strip("\n"), directives, cell.get("outputs", [])


def title_of(notebook):
    "The text of the first `# ` heading."
    for kind, source, _, _ in cells_of(notebook):
        found = re.match(r"#\s+(.+)", source) if kind == "markdown" else None
        if found: return found[1].strip().replace("`", "")
    return notebook.stem


def public_names(source):
    "What an exported cell defines for others: functions and classes without a leading underscore, and CONSTANTS."
    try: body = ast.parse(source).body
    except SyntaxError: return []
    names = [n.name for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef))]
    names += [
        t.id for n in body if isinstance(n, ast.Assign) for t in n.targets
        if isinstance(t, ast.Name) and t.id.isupper()
    ]
    return [n for n in names if not n.startswith("_")]


def symbols():
    """What a backticked word may link to: public name -> `page.md#anchor` (not where two pages define it),
    notebook's name -> page."""
    found = {nb.stem: {page_of(nb)} for nb in notebooks() if nb.stem[0].isdigit()}
    for nb in notebooks():
        for kind, source, directives, _ in cells_of(nb):
            if "export" in directives:
                for name in public_names(source): found.setdefault(name, set()).add(page_of(nb) + "#" + name.lower())
    return {name: pages.pop() for name, pages in found.items() if len(pages) == 1}


# ---- cells as Markdown

def fenced(text, language):
    "A code block whose fence is longer than any inside."
    longest = max([2] + [len(run) for run in re.findall(r"`+", text)])
    return "{0}{1}\n{2}\n{0}".format("`" * (longest + 1), language, text.rstrip("\n"))


def spaced_lists(text):
    "A blank line before each list: Jupyter and GitHub do without, Python-Markdown does not."
    out = []
    fence = False
    before = ""
    for line in text.splitlines():
        if line.lstrip().startswith("```"): fence = not fence
        starts = re.match(r"([-*+]|\d+\.)\s", line) and not fence
        if starts and before.strip() and not re.match(r"(\s|[-*+]\s|\d+\.\s)", before): out.append("")
        out.append(line)
        before = line
    return "\n".join(out)


def linked(text, page, names):
    "Backticked public names become links to where they are defined, outside code blocks and headings."
    def link(found):
        target = names.get(found[1])
        if target is None or target.split("#")[0] == page: return found[0]
        return "[{}]({})".format(found[0], os.path.relpath(target, os.path.dirname(page) or "."))
    parts = re.split(r"(^```.*?^```|^#.*?$|\[[^\]]*\]\([^)]*\))", text, flags=re.M | re.S)
    return "".join(p if i % 2 else re.sub(r"`([\w.]+)(?:\(\))?`", link, p) for i, p in enumerate(parts))


def relinked(text, notebook):
    "Links to notebooks become links to their pages."
    def link(found):
        target = (notebook.parent / found[1]).resolve()
        if not target.is_file(): return found[0]  # MkDocs names it as broken
        return "](" + os.path.relpath(page_of(target),
                                      os.path.dirname(page_of(notebook)) or ".") + (found[2] or "") + ")"
    return re.sub(r"\]\(([^):#]+\.ipynb)(#[^)]*)?\)", link, text)


def merged(outputs):
    "Neighboring pieces of printed text as one output: a program prints line by line."
    whole = []
    for o in outputs:
        if whole and o["output_type"] == "stream" == whole[-1]["output_type"]:
            whole[-1] = {**o, "text": "".join(whole[-1]["text"]) + "".join(o["text"])}
        else: whole.append(o)
    return whole


def alt_text(prose):
    "What stands for a figure where it is not seen: the last sentence or two of the prose above it, without markup."
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"[`*#>|$\[\]\\]", "", prose))
    words = " ".join(plain.split())
    sentences = re.findall(r"[^.:?!]+[.:?!]?", words)
    return "Figure: " + ("".join(sentences[-2:]).strip().rstrip(":.") or "the output of the code above")


def shown(output, save_image, alt):
    "One stored output as Markdown, or None."
    data = output.get("data", {})
    text = lambda key: "".join(data[key])
    if output["output_type"] == "stream": return fenced("".join(output["text"]), " { .text .output }")
    if output["output_type"] == "error":
        return fenced(re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(output["traceback"])), " { .text .output }")
    for kind in ("image/png", "image/jpeg"):
        if kind in data:
            saved = save_image(base64.b64decode(text(kind)), kind[6:].replace("jpeg", "jpg"))
            return "![{}]({})".format(alt, saved)
    if "image/svg+xml" in data:
        return "![{}]({})".format(alt, save_image(text("image/svg+xml").encode("utf-8"), "svg"))
    if "text/markdown" in data: return text("text/markdown")
    if "text/html" in data:
        return '<div class="output">\n{}\n</div>'.format(re.sub(r"\n\s*\n", "\n", text("text/html").strip()))
    if "text/plain" in data: return fenced(text("text/plain"), " { .text .output }")
    return None


def formulas(text):
    "`$...$` as MathML, which browsers show by themselves; code is left alone."
    from latex2mathml.converter import convert
    parts = re.split(r"(^```.*?^```|`[^`\n]*`)", text, flags=re.M | re.S)
    block = lambda m: convert(m[1].strip(), display="block")
    inline = lambda m: "<span>" + convert(m[1]) + "</span>"  # a line that starts with <math> would be taken for a block
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"\$\$(.+?)\$\$", block, parts[i], flags=re.S)
        parts[i] = re.sub(r"(?<![\w\\$])\$(?=\S)([^$\n]+?)(?<=\S)\$(?![\w$])", inline, parts[i])
    return "".join(parts)


def is_imports(source):
    "Does a cell import and do nothing else?"
    try: body = ast.parse(source).body
    except SyntaxError: return False
    return bool(body) and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body)


def folded_imports(sources):
    "The imports of a page, behind a line that opens them."
    code = fenced("\n".join(sources), "python")
    return '??? note "Imports"\n' + "\n".join("    " + line if line else "" for line in code.splitlines())


def page(notebook, docs, names):
    "Write one notebook as a Markdown page with its images below `docs`."
    target = docs / page_of(notebook)
    blocks = []
    pictures = []
    target.parent.mkdir(parents=True, exist_ok=True)

    def save_image(data, kind):
        folder = target.with_suffix("").name + "_files"
        (target.parent / folder).mkdir(exist_ok=True)
        pictures.append("{}/{}.{}".format(folder, len(pictures), kind))
        (target.parent / pictures[-1]).write_bytes(data)
        return pictures[-1]

    prose = ""  # the latest paragraph
    held = []  # the imports above the first prose: shown folded, below it
    for kind, source, directives, outputs in cells_of(notebook):
        if kind == "markdown":
            blocks.append(formulas(linked(spaced_lists(relinked(source, notebook)), page_of(notebook), names)))
            prose = source.strip().split("\n\n")[-1]
            if held and not source.startswith("# "): blocks.append(folded_imports(held))
            if not source.startswith("# "): held = []
        if kind != "code" or HIDDEN & set(directives): continue
        if is_imports(source) and len(blocks) == 1:
            held.append(source)
            continue
        exported = public_names(source) if "export" in directives else []
        if exported:
            blocks.append("### {} {{ #{} }}".format(", ".join("`%s`" % n for n in exported), exported[0].lower()))
        blocks += ['<a id="{}"></a>'.format(n.lower()) for n in exported[1:]]
        if source and directives.get("echo") != "false": blocks.append(fenced(source, "python"))
        alt = directives.get("fig-alt", "").strip("\"' ") or alt_text(prose)
        blocks += [s for s in (shown(o, save_image, alt) for o in merged(outputs)) if s]
    if held: blocks.append(folded_imports(held))
    target.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


# ---- the site

def navigation():
    "Stage -> [(title, notebook)], in reading order."
    stages = {name: [] for name in ORDER}
    for nb in notebooks(): stages[stage_of(nb)].append((title_of(nb), nb))
    return {name: pages for name, pages in stages.items() if pages}


def menu():
    "Stage -> [(title, page)]: the navigation with the pages that are made from the code."
    stages = {stage: [(title, page_of(nb)) for title, nb in pages] for stage, pages in navigation().items()}
    stages["Start"][0] = ("Home", "index.md")
    for place, name in enumerate(START):
        if name in reference.PAGES: stages["Start"].insert(place, (reference.PAGES[name][0], name))
    return stages


def settings(docs, out):
    "What MkDocs is told. `font: false` and the offline plugin keep every request at home."
    nav = [{stage: [{title: name} for title, name in pages]} for stage, pages in menu().items()]
    return dict(site_name="jetson_det",
                docs_dir=str(docs),
                site_dir=str(out),
                use_directory_urls=False,
                nav=nav,
                theme=dict(name="material",
                           font=False,
                           language="en",
                           features=[
                               "navigation.sections", "navigation.footer", "navigation.top", "content.code.copy",
                               "search.highlight", "toc.follow"
                           ],
                           palette=[
                               dict(media="(prefers-color-scheme: light)",
                                    scheme="default",
                                    primary="teal",
                                    accent="teal",
                                    toggle=dict(icon="material/weather-night", name="dark")),
                               dict(media="(prefers-color-scheme: dark)",
                                    scheme="slate",
                                    primary="teal",
                                    accent="teal",
                                    toggle=dict(icon="material/weather-sunny", name="light"))
                           ]),
                plugins=["search", "offline"],
                extra=dict(generator=False),
                extra_css=["styles.css"],
                markdown_extensions=[
                    "tables", "attr_list", "md_in_html", "admonition", {"toc": dict(permalink=True, toc_depth="2-3")},
                    "pymdownx.betterem", "pymdownx.details", {"pymdownx.highlight": dict(use_pygments=True)},
                    "pymdownx.superfences",
                    "pymdownx.tilde"
                ],
                validation=dict(links=dict(not_found="warn", anchors="warn", unrecognized_links="warn")))


# a tag that opens; a value in quotes may hold a ">". No browser fetches anything for a span or a hyperlink, and nearly
# all tags are spans of code.
TAG = re.compile(r"""<(?!(?:span|a)\b)[a-zA-Z](?:[^"'>]+|"[^"]*"|'[^']*')*>""")


class Requests(HTMLParser):
    "Collects what a browser would fetch from another host to show a page (hyperlinks are not fetched)."
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "link" and attrs.get("rel") in ("canonical", "next", "prev", "edit"): return
        for key in ("src", "data", "poster") + (("href",) if tag in ("link", "use", "image") else ()):
            if re.match(r"(https?:)?//", attrs.get(key) or ""): self.found.append("<{}> {}".format(tag, attrs[key]))


def _requests(text):
    "What a page would fetch. The parser is slow: it reads the tags with an address."
    found = []
    for tag in TAG.finditer(text):
        if "//" not in tag[0]: continue
        parser = Requests()  # each tag its own: after <script> a parser takes all for its text
        parser.feed(tag[0])
        found += parser.found
    return found


def external_requests(site):
    "Every request to another host that the pages and style sheets below `site` would make: a list of 'file: what'."
    found = []
    for f in sorted(Path(site).rglob("*.html")):
        text = f.read_text(encoding="utf-8")
        found += ["{}: {}".format(f.name, r) for r in _requests(text)]
        found += [
            "{}: {}".format(f.name, r) for s in re.findall(r"<style.*?</style>", text, re.S) for r in _css_requests(s)
        ]
    for f in sorted(Path(site).rglob("*.css")):
        found += ["{}: {}".format(f.name, r) for r in _css_requests(f.read_text(encoding="utf-8"))]
    return found


def _css_requests(text):
    return re.findall(r"(?:url\(|@import\s+)['\"]?((?:https?:)?//[^'\")\s;]+)", text)


def build(out):
    "Build the site into the folder `out`; exit when a link is broken or a page would ask another host for something."
    os.environ.setdefault("NO_MKDOCS_2_WARNING", "1")
    from mkdocs.commands.build import build as mkdocs_build
    from mkdocs.config import load_config
    out = Path(out).resolve()
    with tempfile.TemporaryDirectory() as tmp:
        docs = Path(tmp) / "docs"
        config = Path(tmp) / "mkdocs.yml"
        docs.mkdir()
        names = symbols()
        for nb in notebooks(): page(nb, docs, names)
        for name, (_, make) in reference.PAGES.items(): (docs / name).write_text(make(), encoding="utf-8")
        if (NBS / "images").is_dir(): shutil.copytree(NBS / "images", docs / "images")
        shutil.copy2(NBS / "styles.css", docs / "styles.css")
        config.write_text("site_name: jetson_det\n", encoding="utf-8")
        counter = _Warnings()
        logging.getLogger("mkdocs").addHandler(counter)
        loaded = load_config(config_file=str(config), **settings(docs, out))
        loaded.plugins["plain_code"] = _plain_code()
        mkdocs_build(loaded)
    _search_from_disk(out)
    problems = counter.lines + external_requests(out)
    for line in problems: print("error: " + line, file=sys.stderr)
    if problems: raise SystemExit(1)
    print("{} pages: {}".format(len(notebooks()) + len(reference.PAGES), out / "index.html"))


def _plain_code():
    """An extension of MkDocs: the search takes code without its colors. Half of the tags that it would read, slowly,
    are the spans of highlighted code, of which it keeps nothing."""
    from mkdocs.plugins import BasePlugin, CombinedEvent, event_priority

    class PlainCode(BasePlugin):
        @event_priority(100)
        def _before_the_search(self, context, page, **_):
            self.colored = page.content
            page.content = re.sub(r"<pre\b.*?</pre>", lambda m: re.sub(r"</?span\b[^>]*>", "", m[0]), page.content,
                                  flags=re.S)

        @event_priority(-100)
        def _after_the_search(self, context, page, **_): page.content = self.colored

        on_page_context = CombinedEvent(_before_the_search, _after_the_search)

    return PlainCode()


def _search_from_disk(out):
    "Put our own script where the offline plugin would load one from another host."
    shutil.copy2(REPO / "tools" / "search_worker.js", out / "assets" / "search_worker.js")
    for f in out.rglob("*.html"):
        ours = os.path.relpath(out / "assets" / "search_worker.js", f.parent)
        f.write_text(f.read_text(encoding="utf-8").replace(SHIM, ours), encoding="utf-8")


class _Warnings(logging.Handler):
    "Keeps the warnings of MkDocs: a broken link is an error here."
    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record): self.lines.append(record.getMessage())


# ---- README and the Quarto sidebar

def readme():
    "The text of README.md: the index notebook, its links and images seen from the top of the repository."
    blocks = ["<!-- Made from nbs/index.ipynb by `make readme`: edit that. -->"]
    for kind, source, directives, outputs in cells_of(NBS / "index.ipynb"):
        if kind == "markdown": blocks.append(source)
        if kind != "code" or HIDDEN & set(directives): continue
        if source and directives.get("echo") != "false": blocks.append(fenced(source, "python"))
        for o in outputs:
            text = "".join(o.get("text") or o.get("data", {}).get("text/plain", ""))
            if text: blocks.append(fenced(text, "text"))
    return re.sub(r"\]\((?=[^)#:]+\.(ipynb|png|jpg)[)#])", "](nbs/", "\n\n".join(blocks)).replace("](nbs/../",
                                                                                                  "](") + "\n"


def sidebar():
    "nbs/sidebar.yml for Quarto: the same stages in the same order."
    lines = ["# Made by `python tools/build_site.py --sidebar`.", "website:", "  sidebar:", "    contents:"]
    for stage, pages in navigation().items():
        lines += ['      - section: "{}"'.format(stage), "        contents:"]
        lines += ["          - " + nb.relative_to(NBS).as_posix() for _, nb in pages]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="site", help="folder of the site")
    for name in ("readme", "sidebar", "check"): parser.add_argument("--" + name, action="store_true")
    args = parser.parse_args()
    made = {REPO / "README.md": (readme, args.readme), NBS / "sidebar.yml": (sidebar, args.sidebar)}
    if args.check:
        stale = [f for f, (make, _) in made.items() if not f.is_file() or f.read_text(encoding="utf-8") != make()]
        for f in stale:
            print("error: {} is not what the notebooks give: make readme".format(f.relative_to(REPO)), file=sys.stderr)
        raise SystemExit(1 if stale else 0)
    for f, (make, wanted) in made.items():
        if wanted: f.write_text(make(), encoding="utf-8")
    if not (args.readme or args.sidebar): build(args.out)


if __name__ == "__main__":
    main()
