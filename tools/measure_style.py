"""How the code reads, in figures: python tools/measure_style.py [REPOSITORY]

Works on any checkout of an nbdev project of this shape, so that a commit can be compared with an earlier one:
    git worktree add /path/to/earlier COMMIT && python tools/measure_style.py /path/to/earlier

Figures are readers, not targets. What each one counts:
- circles: groups of modules that import each other (lazy imports count); upward: imports from a folder lower in the
  order of stages to a higher one, the two exceptions of tools/check_layout.py aside
- later numbers: exported imports between notebooks that point to a higher number
- wide: lines over 120 columns, of the exported code and of the tests
- chained: `a, b = x, y` with as many values as targets, share of all assignments
- comprehensions for each 1000 lines of code, docstrings and comments left out
- prose: words of Markdown for each exported line of code
- unshown: public functions and classes that appear in no code cell after the one that defines them (their notebook
  and all others), share of all
"""
import ast
import io
import re
import sys
import tokenize
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import check_layout  # noqa: E402

STAGES = {"core": 0, "yaml_file": 0, "config": 0, "config_tools": 0, "downloads": 0, "data": 1, "scenes": 1,
          "cutouts": 1, "synth": 1, "models": 2, "evaluate": 3, "train": 4, "export": 5, "experiments": 6}


def stage(module):
    "The height of a module's folder; the command line is above all, the runtime below."
    top = module.split(".")[0]
    if top == "runtime": return -1
    return STAGES.get(top, 9)


def code_lines(source):
    "Lines that hold code: neither blank nor only a comment or a docstring."
    numbers = set()
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    strings = {n.value.lineno: n.value.end_lineno for n in ast.walk(ast.parse(source))
               if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) and isinstance(n.value.value, str)}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in skipped: continue
        if token.type == tokenize.STRING and token.start[0] in strings: continue
        numbers.update(range(token.start[0], token.end[0] + 1))
    return len(numbers)


def assignments(tree):
    "(chained, all) of a syntax tree."
    chained = total = 0
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign): continue
        total += 1
        pair = isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
        if not pair or len(node.targets[0].elts) != len(node.value.elts): continue
        swapped = sorted(map(ast.unparse, node.targets[0].elts)) == sorted(map(ast.unparse, node.value.elts))
        if not swapped: chained += 1
    return chained, total


def comprehensions(tree):
    kinds = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    return sum(isinstance(node, kinds) for node in ast.walk(tree))


def wide_share(texts):
    "Per cent of lines over 120 columns."
    lines = [line for text in texts for line in text.splitlines()]
    return 100*sum(len(line) > 120 for line in lines)/max(len(lines), 1)


def is_exported(source):
    return re.search(r"^#\|\s*exporti?\b", source, re.M) is not None


def unshown(pages):
    "(public symbols that no later cell uses, all public symbols); `pages`: path -> cells."
    cells = [check_layout.source_of(c) for page in pages.values() for c in page if c["cell_type"] == "code"]
    missing = total = 0
    for number, source in enumerate(cells):
        if not is_exported(source): continue
        try: body = ast.parse(source).body
        except SyntaxError: continue
        for node in body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"): continue
            total += 1
            name = re.compile(rf"(?<!\w){node.name}(?!\w)")
            later = (text for text in cells[number + 1:] if not is_exported(text))
            missing += not any(name.search(text) for text in later)
    return missing, total


def measure(repo):
    "name -> figure."
    check_layout.REPO = repo
    pages = dict(check_layout.notebooks())
    graph = check_layout.package_imports()
    numbers = check_layout.module_numbers()
    between = [(a, b) for a, targets in graph.items() for b in targets if a in numbers and b in numbers]
    upward = {(stage(a), stage(b)) for a, b in between if stage(b) > stage(a)}
    exported = []
    words = 0
    for cells in pages.values():
        is_module = check_layout.module_of(cells) is not None
        for cell in cells:
            source = check_layout.source_of(cell)
            if cell["cell_type"] == "markdown" and is_module: words += len(source.split())
            if cell["cell_type"] == "code" and is_exported(source): exported.append(source)
    trees = [ast.parse(source) for source in exported]
    counts = [assignments(tree) for tree in trees]
    lines = sum(map(code_lines, exported))
    missing, public = unshown(pages)
    tests = [p.read_text(encoding="utf-8") for p in sorted((repo/"tests").rglob("*.py"))]
    return {
        "modules": len(graph),
        "circles of imports": len(check_layout.circles(graph)),
        "arrows up between folders": len(upward),
        "imports to a later number": f"{len(list(check_layout.order_faults(graph, numbers)))} of {len(between)}",
        "lines over 120 columns, %": f"{wide_share(exported):.1f} (tests {wide_share(tests):.1f})",
        "chained assignments, %": f"{100*sum(c for c, _ in counts)/sum(t for _, t in counts):.1f}",
        "comprehensions a kLOC": f"{1000*sum(map(comprehensions, trees))/lines:.0f}",
        "words of prose an exported line": f"{words/lines:.1f}",
        "public symbols": public,
        "public symbols in no later example, %": f"{100*missing/public:.0f}",
        "lines of exported code": lines,
    }


if __name__ == "__main__":
    where = Path(sys.argv[1] if len(sys.argv) > 1 else check_layout.REPO).resolve()
    for name, figure in measure(where).items(): print(f"{name:40} {figure}")
