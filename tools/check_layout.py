"""The order of the house: python tools/check_layout.py

Fails, a line for each fault, when
- an exported import (lazy ones too) points to a notebook with a higher number, but for two exceptions: the runtime
  (60 to 69), on which all stand, and evaluation (40 to 49), which training calls between its epochs;
- modules of the package import each other in a circle;
- the runtime imports anything of the package that is not runtime;
- a line of code is longer than 120 columns, in notebooks, tests, benchmarks and tools;
- a stored output shows a path of the machine it was made on, or a warning;
- a page links to a notebook that is not there.
"""
import ast
import json
import re
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
WIDEST = 120
LINK = re.compile(r"\]\(([^)#\s:]+\.ipynb)[#)]")
LEAKS = re.compile(r"/tmp/|/root/|/home/|/Users/|site-packages|\w*Warning:")


def notebooks():
    "(path, cells) of every notebook."
    for path in sorted((REPO / "nbs").rglob("*.ipynb")):
        if not any(part.startswith((".", "_")) for part in path.relative_to(REPO).parts):
            yield path, json.loads(path.read_text(encoding="utf-8"))["cells"]


def source_of(cell):
    return "".join(cell["source"])


def module_of(cells):
    "The module that a notebook exports to, or None."
    for cell in cells:
        found = re.search(r"^#\|\s*default_exp\s+(\S+)", source_of(cell), re.M)
        if found: return found[1]
    return None


def imports(source, module, known):
    "The modules of the package that a source text imports anywhere in it; `module` is its own name."
    package = module.split(".")
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = ["jetson_det", *package[:len(package) - node.level]]
                base = ".".join(above + [node.module] if node.module else above)
            names = [f"{base}.{alias.name}" for alias in node.names] + [base]
        else: continue
        for name in names:
            if name.removeprefix("jetson_det.") in known and name.startswith("jetson_det."):
                found.add(name.removeprefix("jetson_det."))
    return found - {module}


def package_imports():
    "module -> the modules of the package that it imports, of the exported files."
    files = {}
    for path in sorted((REPO / "jetson_det").rglob("*.py")):
        if path.stem in ("__init__", "_modidx"): continue
        files[".".join(path.relative_to(REPO / "jetson_det").with_suffix("").parts)] = path.read_text(encoding="utf-8")
    return {name: imports(source, name, files) for name, source in files.items()}


def order_faults(graph, numbers):
    "Imports that point to a higher number."
    for module, targets in sorted(graph.items()):
        for target in sorted(targets):
            here, there = numbers.get(module), numbers.get(target)
            if here is None or there is None: continue
            is_exception = 60 <= there <= 69 or (30 <= here <= 39 and 40 <= there <= 49)
            if there > here and not is_exception:
                yield f"{here}_{module} imports {there}_{target}, which has a higher number"


def circles(graph):
    "Groups of modules that import each other (Tarjan's strongly connected components)."
    index, low, stack, found = {}, {}, [], []

    def visit(name):
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in graph[name]:
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack: low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            group = []
            while not group or group[-1] != name: group.append(stack.pop())
            if len(group) > 1: found.append(sorted(group))

    for name in graph:
        if name not in index: visit(name)
    return [f"{len(group)} modules import each other in a circle: {', '.join(group)}" for group in found]


def leaf_faults(graph):
    "What the runtime imports from above it."
    for module, targets in sorted(graph.items()):
        if not module.startswith("runtime."): continue
        for target in sorted(targets):
            if not target.startswith("runtime."): yield f"{module} imports {target}: the runtime is a leaf"


def wide_lines():
    "Lines over the limit; generated modules are left out, their notebooks are looked at."
    for path, cells in notebooks():
        for cell in cells:
            if cell["cell_type"] != "code": continue
            for line in source_of(cell).splitlines():
                if len(line) > WIDEST: yield f"{path.relative_to(REPO)}: {len(line)} columns: {line.strip()[:80]}"
    for folder in ("tests", "bench", "tools"):
        for path in sorted((REPO / folder).rglob("*.py")):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                if len(line) > WIDEST: yield f"{path.relative_to(REPO)}, line {number}: {len(line)} columns"


def leaking_outputs():
    "Stored outputs that show a path of the machine or a warning."
    for path, cells in notebooks():
        for cell in cells:
            for output in cell.get("outputs", []):
                data = output.get("data", {})
                texts = [output.get("text", "")] + [data[kind] for kind in data if kind.startswith("text/")]
                for text in map("".join, texts):
                    found = LEAKS.search(text)
                    if not found: continue
                    yield f"{path.relative_to(REPO)}: a stored output shows {text[found.start():][:60]!r}"


def broken_links():
    "Links to notebooks that are not there: of a page that was renamed, say."
    for path, cells in notebooks():
        for cell in cells:
            if cell["cell_type"] != "markdown": continue
            for link in LINK.findall(source_of(cell)):
                if (path.parent / link).is_file(): continue
                yield f"{path.relative_to(REPO)}: links to {link}, which is not there"


def module_numbers():
    "module -> the number of its notebook."
    numbers = {}
    for path, cells in notebooks():
        module = module_of(cells)
        if module: numbers[module] = int(re.match(r"\d+", path.name)[0])
    return numbers


def faults():
    graph = package_imports()
    numbers = module_numbers()
    yield from order_faults(graph, numbers)
    yield from circles(graph)
    yield from leaf_faults(graph)
    yield from wide_lines()
    yield from leaking_outputs()
    yield from broken_links()


if __name__ == "__main__":
    found = list(faults())
    for fault in found: print(f"error: {fault}", file=sys.stderr)
    if found: sys.exit(f"{len(found)} faults in the layout")
    print("layout in order")
