"""CUDA without a GPU: a driver made of malloc (fixtures/cuda/libcuda.c), PyCUDA and cuda-python on it, and NVRTC.

What PyPI has is installed once, into the user's cache folder. Where that can't be done, the tests are skipped with the
reason. PyCUDA has no wheel: it is compiled, which takes minutes, so only a run with --run-slow does it, or
`python tests/fake_cuda.py [PYTHON]`. That is the way to PyCUDA for Python 3.6, as on a Nano, whose own pip is too old
for the task: PYTHON=.venv-py36/bin/python.
"""
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

PIP = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "--retries", "1", "--timeout", "20")
CUDA = Path(__file__).resolve().parent / "fixtures" / "cuda"
# PyCUDA of a Python, and the headers of CUDA that it is compiled with: nothing else of the toolkit is needed
PYCUDA = {"py36": ("pycuda==2022.1", ("nvidia-cuda-runtime-cu11==11.8.89", "nvidia-cuda-profiler-api-cu11==11.8.86"))}
PYCUDA_NOW = ("pycuda==2026.1", ("nvidia-cuda-runtime==13.0.96", "nvidia-cuda-profiler-api==13.0.85"))
CUDA_PYTHON = ("cuda-bindings==13.0.3", "cuda-pathfinder==1.4.2")
OLDER_CUDA_PYTHON = ("cuda-python==12.3.0",) # before `cuda.bindings`
NVRTC = {11: "nvidia-cuda-nvrtc-cu11==11.8.89", 12: "nvidia-cuda-nvrtc-cu12==12.9.86", 13: "nvidia-cuda-nvrtc==13.0.88"}


class NotHere(Exception):
    "Something can't be had on this machine; the text is the reason."


def cache():
    "Where wheels stay from run to run; the tests' own cache folder does not."
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(base) / "jetson_det" / "test-wheels"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def python_name(python=sys.executable):
    "The version of a Python, such as py311."
    if python == sys.executable: return "py{}{}".format(*sys.version_info[:2])
    script = "import sys; print('py{}{}'.format(*sys.version_info[:2]))"
    return subprocess.run([python, "-c", script], stdout=subprocess.PIPE, check=True).stdout.decode().strip()


def _run(command, what, **options):
    "Run something that this machine may not be able to do. Raises `NotHere`."
    result = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    if result.returncode:
        lines = result.stdout.decode("utf-8", "replace").strip().splitlines() or ["no word"]
        raise NotHere("{} failed: {}".format(what, lines[-1][:200]))


def _compile(command):
    "Compile text of ours: where that fails, the text is wrong."
    result = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert not result.returncode, result.stdout.decode("utf-8", "replace")


def installed(*requirements, name=None, for_any_python=False):
    "A folder with these packages, without what they depend on. Raises `NotHere`."
    name = name or "-".join(re.sub("[^A-Za-z0-9.]+", "-", r) for r in requirements)
    folder = cache() / (name if for_any_python else "{}-{}".format(name, python_name()))
    if folder.is_dir(): return folder
    part = Path(tempfile.mkdtemp(dir=str(cache()), prefix=".part-"))
    try:
        _run([*PIP, "install", "--no-deps", "--only-binary", ":all:", "--target", part, *requirements],
             "pip install " + " ".join(requirements))
        try: part.rename(folder)
        except OSError: pass # another process was faster
    finally: shutil.rmtree(str(part), ignore_errors=True)
    return folder


def compiler(name="gcc"):
    "The path of a compiler. Raises `NotHere`."
    found = shutil.which(name)
    if found is None: raise NotHere("no {} here".format(name))
    return found


def undefined_symbols(library):
    "The driver's functions that a library wants."
    nm = compiler("nm")
    text = subprocess.run([nm, "-D", "--undefined-only", str(library)], stdout=subprocess.PIPE, check=True).stdout
    return sorted(set(re.findall(r" U (cu[A-Z]\w*)", text.decode())))


def make_driver(folder, wanted=()):
    """Compile libcuda.so.1 into the folder; functions of `wanted` that it does not have answer "not supported" (801).
    Raises `NotHere`."""
    source = (CUDA / "libcuda.c").read_text()
    own = set(re.findall(r"^CUresult (cu\w+)\(", source, re.M))
    extra = Path(folder) / "not_supported.c"
    extra.write_text("\n".join("int {}(void) {{ return 801; }}".format(n) for n in wanted if n not in own) + "\n")
    library = Path(folder) / "libcuda.so.1"
    _compile([compiler(), "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", "-o", library, CUDA / "libcuda.c",
              extra, "-ldl", "-lpthread"])
    return library


def compile_for_cpu(folder, source, kernels):
    "A kernel's text compiled by g++ as C++14: the path of the shared library. Raises `NotHere`."
    text = '#include "cuda_on_cpu.h"\n{}\n{}\n'.format(source, "\n".join("ON_CPU({})".format(k) for k in kernels))
    path = Path(folder) / "kernels.cpp"
    path.write_text(text)
    library = Path(folder) / "kernels.so"
    # -ffp-contract=off is NVRTC's --fmad=false: a product is rounded before it is added
    command = [compiler("g++"), "-std=c++14", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-I", CUDA]
    probe = ["-fsyntax-only", "-x", "c++", CUDA / "cuda_on_cpu.h"]
    _run(command + probe, "g++ without half precision (_Float16)")
    _compile(command + ["-shared", "-fPIC", "-o", library, path])
    return library


def build_pycuda(python=sys.executable):
    "Compile PyCUDA for a Python, minutes: the folder that it lies in. Raises `NotHere`."
    version = python_name(python)
    requirement, headers = PYCUDA.get(version, PYCUDA_NOW)
    folder = pycuda_folder(version)
    if folder.is_dir(): return folder
    includes = sorted(str(path.parent) for path in installed(*headers, for_any_python=True).glob("nvidia/**/cuda*.h")
                      if path.name in ("cuda.h", "cudaProfiler.h"))
    work = Path(tempfile.mkdtemp(dir=str(cache()), prefix=".build-"))
    try:
        # no isolation: pip would fetch what the build needs, to read the name of an archive that is known
        _run([*PIP, "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "-d", work, requirement],
             "pip download " + requirement)
        archive = next(work.glob("pycuda-*.tar.gz"))
        with tarfile.open(str(archive)) as tar: tar.extractall(str(work))
        source = work / archive.name[:-len(".tar.gz")]
        make_driver(work)
        (work / "libcuda.so").symlink_to("libcuda.so.1")
        (source / "siteconf.py").write_text("\n".join([
            "USE_SHIPPED_BOOST = True",
            "CUDA_INC_DIR = {!r}".format(includes),
            "CUDA_ENABLE_GL = False",
            "CUDA_ENABLE_CURAND = False",
            "CUDADRV_LIB_DIR = [{!r}]".format(str(work)),
            "CUDADRV_LIBNAME = ['cuda']",
            "CXXFLAGS = ['-O1']",
            "LDFLAGS = []",
        ]) + "\n")
        part = work / "part"
        _run([python, "setup.py", "-q", "build", "--build-lib", part], "compiling PyCUDA", cwd=str(source))
        part.rename(folder)
    finally: shutil.rmtree(str(work), ignore_errors=True)
    return folder


def pycuda_folder(version):
    return cache() / "{}-{}".format(PYCUDA.get(version, PYCUDA_NOW)[0].replace("==", "-"), version)


def needs(make, *arguments, **options):
    "What `make` gives; the test is skipped, with the reason, where it can't be had."
    try: return make(*arguments, **options)
    except NotHere as e: pytest.skip(str(e))


def needs_pycuda(config):
    "The folder of PyCUDA; the test is skipped where it was never compiled, unless the run may be slow."
    folder = pycuda_folder(python_name())
    if folder.is_dir(): return folder
    if not config.getoption("--run-slow"):
        pytest.skip("PyCUDA is not compiled here (minutes): python tests/fake_cuda.py, or --run-slow")
    return needs(build_pycuda)


if __name__ == "__main__":
    for name in sys.argv[1:] or [sys.executable]: print(build_pycuda(os.path.abspath(name)))
