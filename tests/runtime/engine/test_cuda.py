"""The module of device memory, with unmodified PyCUDA and cuda-python, on a driver made of malloc. No GPU has run it.

Each test is a process: what is said of an exit, of threads and of a missing library needs a fresh one."""
import os
import re
import subprocess
import sys
from pathlib import Path

import fake_cuda
import pytest

REPO = Path(__file__).resolve().parents[3]
BACKENDS = ("pycuda", "cuda-python", "older cuda-python")
PRELUDE = """
import ctypes, gc, os, sys, threading
import numpy as np
from jetson_det.runtime.engine.cuda import CudaError, init_driver, open_context
from jetson_det.runtime.files import InputError

driver = ctypes.CDLL("libcuda.so.1")
DEVICE, HOST, MAPPED, MANAGED, STREAMS, EVENTS, MODULES, CONTEXTS = range(8)
count = driver.fake_count

def fails(error, words, function, *arguments, **options):
    "Raises this, in one line with these words?"
    try: function(*arguments, **options)
    except error as e:
        assert words in str(e) and "\\n" not in str(e), str(e)
        return
    raise AssertionError("nothing was raised: " + words)

def in_thread(function):
    "What a thread of its own gives; its error is raised here."
    result = []
    def run():
        try: result.append((function(), None))
        except BaseException as e: result.append((None, e))
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    value, error = result[0]
    if error is not None: raise error
    return value
"""


class Machine:
    "A machine with the driver made of malloc, and with one of the packages."
    def __init__(self, folder, packages, name=""):
        self.folder = folder
        self.packages = packages
        self.name = name

    def run(self, script, *arguments, code=0, **variables):
        "What the script prints, on both streams."
        paths = [str(REPO)] + [str(p) for p in self.packages]
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(paths), LD_LIBRARY_PATH=str(self.folder))
        environment.update(variables)
        result = subprocess.run([sys.executable, "-c", PRELUDE + script, *map(str, arguments)], env=environment,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=100)
        text = result.stdout.decode()
        assert result.returncode == code, "exit code {}: {}".format(result.returncode, text)
        return text.strip()


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    "The driver, and no package."
    folder = tmp_path_factory.mktemp("driver")
    fake_cuda.needs(fake_cuda.make_driver, folder)
    return Machine(folder, [])


@pytest.fixture(scope="module", params=BACKENDS)
def machine(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("driver")
    wanted = ()
    if request.param == "pycuda":
        packages = fake_cuda.needs_pycuda(request.config)
        wanted = fake_cuda.needs(fake_cuda.undefined_symbols, next((packages / "pycuda").glob("_driver*.so")))
    elif request.param == "cuda-python": packages = fake_cuda.needs(fake_cuda.installed, *fake_cuda.CUDA_PYTHON)
    else: packages = fake_cuda.needs(fake_cuda.installed, *fake_cuda.OLDER_CUDA_PYTHON)
    fake_cuda.needs(fake_cuda.make_driver, folder, wanted)
    return Machine(folder, [packages], request.param)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    "The letterbox kernel for the CPU, as an image that the driver made of malloc loads."
    from jetson_det.runtime.engine.letterbox import LETTERBOX_CU
    folder = tmp_path_factory.mktemp("kernels")
    names = ("letterbox_float", "letterbox_half", "letterbox_bytes")
    return fake_cuda.needs(fake_cuda.compile_for_cpu, folder, LETTERBOX_CU, names)


def test_copies_both_ways(machine):
    said = machine.run("""
context = open_context()
print(context)
numbers = np.arange(1000, dtype=np.float32)
buffer = context.buffer(numbers.nbytes + 8)
assert buffer.pointer and buffer.nbytes == 4008
context.copy_in(buffer, numbers)
back = np.zeros(1000, np.float32)
context.copy_out(back, buffer)
assert (back == numbers).all()

# on a stream: nothing is there before it was synchronized
stream = context.stream()
assert stream.handle
pinned, result = context.host(1000), context.host((10, 100), np.float32)
pinned.array[:] = 7
context.copy_in(buffer, pinned.array, stream)
pinned.array[:] = 8 # too early: the copy has not begun
result.array[:] = 0
context.copy_out(result.array, buffer, stream)
assert (result.array == 0).all()
stream.synchronize()
assert (result.array == 8).all() and result.array.shape == (10, 100)

fails(InputError, "does not fit", context.copy_in, buffer, np.zeros(1003, np.float32))
fails(InputError, "in one piece", context.copy_in, buffer, numbers[::2])
fails(InputError, "read-only", context.copy_out, np.frombuffer(b"1234", np.uint8), buffer)
fails(InputError, "at least 1", context.buffer, 0)
fails(CudaError, "out of memory", context.buffer, 10**12)
context.copy_in(buffer, np.zeros(0, np.float32)) # nothing to do
free, total = context.memory()
assert 0 < free < total == 2**32
assert context.compute_capability == (8, 7) and context.integrated is True
assert driver.fake_depth() == 0
""")
    name = {"pycuda": "PyCUDA 202", "cuda-python": "cuda-python 13", "older cuda-python": "cuda-python"}[machine.name]
    assert said.startswith("CudaContext: Made of malloc, compute capability 8.7, " + name)


def test_mapped_and_managed_memory(machine):
    machine.run("""
context = open_context()
mapped = context.host((3, 4), np.int16, mapped=True)
mapped.array[:] = np.arange(12).reshape(3, 4)
back = np.zeros((3, 4), np.int16)
context.copy_out(back, mapped) # the device's address is the array's memory
assert (back == mapped.array).all() and mapped.pointer
plain = context.host((3, 4), np.int16)
assert plain.pointer is None
fails(InputError, "no address on the device", context.copy_out, back, plain)
managed = context.managed(5, np.float64)
managed.array[:] = 3
assert managed.array.shape == (5,) and managed.pointer == managed.array.ctypes.data
assert [count(kind) for kind in (DEVICE, HOST, MAPPED, MANAGED)] == [0, 1, 1, 1]
# an array keeps its memory, though nobody holds the buffer
array = context.host(4, np.uint8).array
array[:] = 9
gc.collect()
assert count(HOST) == 2 and array.sum() == 36
del array
gc.collect()
assert count(HOST) == 1
for memory in (mapped, plain, managed): memory.free()
assert [count(kind) for kind in (DEVICE, HOST, MAPPED, MANAGED)] == [0, 0, 0, 0]
fails(InputError, "was freed", lambda: plain.array)
""")
    machine.run('fails(InputError, "has no managed memory", open_context().managed, 4)', FAKE_CUDA_INTEGRATED="0")


def test_events(machine):
    machine.run("""
context = open_context()
stream = context.stream()
first, last = context.event(), context.event()
fails(CudaError, "the time between two events", last.milliseconds_since, first)
first.record(stream)
last.record(stream)
last.synchronize()
assert 0 <= last.milliseconds_since(first) < 1000
""")


def test_everything_is_freed_once(machine):
    machine.run("""
context = open_context()
kept = [context.buffer(64), context.host(64), context.host(64, mapped=True), context.managed(64), context.stream(),
        context.event()]
context.buffer(64) # collected at once
assert [count(k) for k in range(8)] == [1, 1, 1, 1, 1, 1, 0, 1]
for thing in kept[:3] + kept[:3]: thing.free()
assert kept[0].pointer is None
assert [count(k) for k in range(8)] == [0, 0, 0, 1, 1, 1, 0, 1]
context.close()
assert [count(k) for k in range(8)] == [0] * 8, [count(k) for k in range(8)]
context.close()
for thing in kept: thing.free()
fails(InputError, "is closed", context.buffer, 4)
assert driver.fake_depth() == 0
assert str(context).endswith("closed")
# a second context after the first, and two at a time
one, two = open_context(), open_context()
buffer = two.buffer(16)
one.close()
two.copy_in(buffer, np.zeros(16, np.uint8))
two.close()
assert count(CONTEXTS) == count(DEVICE) == 0 and driver.fake_depth() == 0
# what nobody holds any more is closed, in a circle too, while another keeps the device's context alive
one, two = open_context(), open_context()
class Session: pass
session = Session()
session.itself, session.things = session, [two, two.buffer(8), two.stream(), two.host(8), two.event()]
del two, session
gc.collect()
assert [count(k) for k in range(8)] == [0] * 7 + [1], [count(k) for k in range(8)]
stream = one.stream()
stream.free()
fails(InputError, "this Stream was freed", stream.synchronize)
fails(InputError, "this Stream was freed", one.copy_in, one.buffer(4), np.zeros(4, np.uint8), stream)
# closed while its things are still held: they are freed all the same
other = open_context()
things = other.buffer(8), other.stream(), other.host(8), other.event()
other.close()
assert [count(k) for k in range(8)] == [0] * 7 + [1], [count(k) for k in range(8)]
fails(InputError, "is closed", things[1].synchronize)
""")


def test_a_thread_has_no_context_of_its_own(machine):
    "The classic fault, and its cure."
    machine.run("""
context = open_context()
backend = context._backend
context.__enter__() # as pycuda.autoinit leaves it: current in the main thread, and nowhere else
assert in_thread(driver.fake_depth) == 0
fails(backend.errors, "invalid device context", in_thread, lambda: backend.alloc(64))
assert in_thread(lambda: context.buffer(64).nbytes) == 64
context.__exit__()
assert in_thread(driver.fake_depth) == 0
""")


def test_many_threads_at_once(machine):
    machine.run("""
context = open_context()
shared = context.buffer(4 * 256)
faults = []

def work(number):
    try:
        mine = np.full(256, number, np.float32)
        back = np.zeros(256, np.float32)
        stream = context.stream()
        for turn in range(60):
            buffer = context.buffer(mine.nbytes)
            with context:
                context.copy_in(buffer, mine, stream)
                context.copy_out(back, buffer, stream)
                stream.synchronize()
            assert (back == number).all()
            back[:] = -1
            if turn % 2: buffer.free()
            context.memory()
        assert driver.fake_depth() == 0
    except BaseException as e: faults.append(repr(e))

threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not faults, faults
gc.collect()
assert count(DEVICE) == 1 and count(STREAMS) == 0
in_thread(context.close) # from a thread that did not open it
assert [count(k) for k in range(8)] == [0] * 8 and driver.fake_depth() == 0
""")


def test_close_waits_for_who_is_inside(machine):
    machine.run("""
context = open_context()
buffer = context.buffer(64)
inside, go = threading.Event(), threading.Event()

def work():
    with context:
        inside.set()
        go.wait(20)
        context._backend.copy_in(buffer._pointer, np.zeros(64, np.uint8), None) # still there

thread = threading.Thread(target=work)
thread.start()
inside.wait(20)
context.close()
assert count(CONTEXTS) == 1 and count(DEVICE) == 1
fails(InputError, "is closed", context.memory)
go.set()
thread.join()
assert count(CONTEXTS) == count(DEVICE) == 0
""")


def test_what_a_board_will_measure(machine, kernels):
    machine.run("""
from jetson_det.runtime.contract import preset
from jetson_det.runtime.engine.letterbox import check_letterbox
context = open_context()
image = b"cpu:" + sys.argv[1].encode()
for family, dtype in (("yolox", np.float32), ("ultralytics", np.float16), ("ultralytics", np.float32)):
    found = check_letterbox(context, preset(family, input_size=(96, 160)), (130, 220), dtype, 2, image)
    assert found["levels"] < 1.2 and found["share"] < .01, found
    assert min(found[name] for name in ("copied_ms", "mapped_ms", "cpu_ms")) > 0
    assert [count(k) for k in range(8)] == [0] * 7 + [1]
""", kernels)


@pytest.mark.parametrize("end, code", [("", 0), ("sys.exit(3)", 3), ("raise SystemExit(4)", 4), ("1 / 0", 1)])
def test_exit_without_a_word(machine, end, code):
    "Whatever is open, inside a `with` or not, and whoever holds what."
    said = machine.run("""
context = open_context()
kept = context.buffer(64), context.stream(), context.host(8), context.event()
array = kept[2].array
threading.Thread(target=lambda: (context.__enter__(), threading.Event().wait(30)), daemon=True).start()
with context:
    other = open_context().buffer(64)
    {}
""".format(end or "pass"), code=code)
    assert "CUDA" not in said, said
    assert ("ZeroDivisionError" in said) == (end == "1 / 0")


def test_exit_from_inside(machine):
    "A generator that waits in its `with`, and a context that somebody entered for good."
    assert not machine.run("""
context = open_context()
def frames():
    with context:
        while True: yield context.buffer(64)
source = frames()
next(source)
context.__enter__()
other = open_context()
other.__enter__()
""")


def test_what_pycuda_does_without_us(machine):
    "The abort that the module is there to avoid."
    if machine.name != "pycuda": pytest.skip("PyCUDA's own")
    said = machine.run("""
import pycuda.driver as cuda
cuda.init()
context = cuda.Device(0).make_context()
""", code=-6)
    assert "context stack was not empty" in said


def test_fork(machine):
    machine.run("""
context = open_context()
buffer = context.buffer(64)
child = os.fork()
if not child:
    try:
        fails(InputError, "forked process", context.memory)
        buffer.free() # not the child's: nothing happens
        context.close()
        assert count(CONTEXTS) == count(DEVICE) == 1
        os._exit(0)
    except BaseException as e: print(repr(e), flush=True)
    os._exit(9)
assert os.waitpid(child, 0)[1] == 0
context.copy_in(buffer, np.zeros(64, np.uint8))
context.close()
""")


def test_a_kernel_of_the_letterbox(machine, kernels, tmp_path):
    "A frame in mapped memory, as a camera's; the input comes back equal to the preprocessor's, through the launch."
    log = tmp_path / "log.txt"
    machine.run("""
from jetson_det.runtime.contract import preset
from jetson_det.runtime.engine.letterbox import LetterboxKernel
from jetson_det.runtime.preprocess import Preprocessor

context = open_context()
image = b"cpu:" + sys.argv[1].encode()
contract = preset("ultralytics", input_size=(64, 96))
frame = np.random.RandomState(0).randint(0, 256, (64, 48, 3)).astype(np.uint8)
source = context.host(frame.shape, np.uint8, mapped=True)
source.array[:] = frame
stream = context.stream()
for dtype in (np.float32, np.float16):
    kernel = LetterboxKernel(context, contract, dtype, image)
    out = context.buffer(kernel.nbytes)
    place = kernel(source, frame.shape[:2], out, stream=stream)
    result = np.zeros(contract.input_shape, dtype)
    context.copy_out(result, out, stream)
    stream.synchronize()
    expected = Preprocessor(contract)([frame])[0][0]
    assert (result == expected.astype(dtype)).all() and place.offset == (24, 0)
small = context.buffer(100)
fails(InputError, "buffer has 100", kernel, source, frame.shape[:2], small)
fails(InputError, "needs 12288 bytes", kernel, source, (64, 64), out)
fails(CudaError, "image is invalid", context.kernel, b"no image", "letterbox_float")
before = count(MODULES)
in_thread(lambda: fails(CudaError, "not found", context.kernel, image, "nothing"))
assert count(MODULES) == before
fails(CudaError, "starting the kernel", kernel._kernel.launch, (1,), (2048,), [1])
fails(InputError, "can't be a kernel's argument", kernel._kernel.launch, (1,), (1,), [.5])
kernel.free()
context.close()
assert [count(k) for k in range(8)] == [0] * 8, [count(k) for k in range(8)]
""", kernels, FAKE_CUDA_LOG=str(log))
    launches = [line for line in log.read_text().splitlines() if line.startswith("launch")]
    assert launches == ["launch letterbox_float 3 8 1 32 8 1", "launch letterbox_half 3 8 1 32 8 1"]


def test_no_such_device(machine):
    machine.run('fails(InputError, "this machine has 1", open_context, 1)')


def test_without_a_driver(tmp_path):
    "`libcuda.so.1` is asked before any package, which would end in a loader's words."
    script = """
from jetson_det.runtime.engine.cuda import open_context
from jetson_det.runtime.files import InputError
try: open_context()
except InputError as e: print(e)
"""
    environment = dict(os.environ, PYTHONPATH=str(REPO), LD_LIBRARY_PATH=str(tmp_path))
    (tmp_path / "libcuda.so.1").write_bytes(b"no library")
    said = subprocess.run([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, check=True).stdout
    said = said.decode()
    assert "no NVIDIA driver here" in said and "--runtime nvidia" in said and said.count("\n") == 1


@pytest.mark.parametrize("code, words", [
    (100, "--runtime nvidia"), (999, "group video"), (34, "stub"), (3, "cuInit: 3")])
def test_a_driver_that_does_not_work(empty, code, words):
    said = empty.run("""
try: open_context()
except InputError as e: print(e)
""", FAKE_CUDA_INIT=str(code))
    assert "driver does not work" in said and words in said and "\n" not in said


def test_without_both_packages(empty):
    said = empty.run("""
sys.modules["pycuda"] = sys.modules["cuda"] = None # whatever this Python has
try: open_context()
except InputError as e: print(e)
""")
    for words in ("PyCUDA", "cuda-python", "pip3 install pycuda", "pip3 install cuda-python"): assert words in said
    assert "\n" not in said


def test_a_device_that_fails_on_entering(machine):
    machine.run("""
context = open_context()
buffer = context.buffer(8)
push = context._backend.push
def fail(): raise context._backend.errors[0]("fell off the bus")
context._backend.push = fail
fails(CudaError, "entering the CUDA context", context.memory)
fails(CudaError, "entering the CUDA context", buffer.free)
context._backend.push = push
assert context.memory()
context.close() # nobody is counted as inside
assert count(CONTEXTS) == 0
""")


def test_importing_it_starts_nothing():
    source = (REPO / "jetson_det/runtime/engine/cuda.py").read_text()
    assert not re.search(r"^(import|from) (pycuda|cuda)", source, re.M) and "import pycuda.autoinit" not in source
