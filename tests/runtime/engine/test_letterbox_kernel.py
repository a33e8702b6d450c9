"""The letterbox kernel's text: compiled by g++, where it must give our letterbox's numbers, and by NVRTC for every
Jetson. No GPU has run it."""
import ctypes

import fake_cuda
import numpy as np
import pytest

from jetson_det.runtime.contract import preset
from jetson_det.runtime.engine.letterbox import LETTERBOX_CU, LetterboxKernel
from jetson_det.runtime.files import InputError
from jetson_det.runtime.geometry import fit_image
from jetson_det.runtime.preprocess import Preprocessor, letterbox

KERNELS = ("letterbox_float", "letterbox_half", "letterbox_bytes")
FITS = ("letterbox-topleft", "letterbox-center", "stretch")


class OnCpu:
    "A context whose kernels g++ compiled: addresses are those of numpy arrays."
    compute_capability = 8, 7

    def __init__(self, library): self.library = ctypes.CDLL(str(library))

    def kernel(self, image, name): return Launch(getattr(self.library, name + "_on_cpu"))


class Launch:
    def __init__(self, function): self.function = function

    def launch(self, grid, block, arguments, stream):
        values = [np.array(a if isinstance(a, np.generic) else np.uint64(a)) for a in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        sides = (ctypes.c_uint * 6)(*grid, 1, *block, 1)
        self.function(None, pointers, sides)

    def free(self): pass


@pytest.fixture(scope="module")
def cpu(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    return OnCpu(fake_cuda.needs(fake_cuda.compile_for_cpu, folder, LETTERBOX_CU, KERNELS))


def contract_for(size, fit, **changes): return preset("yolox", input_size=size)._replace(fit=fit, **changes)


def run(context, contract, image, dtype=np.float32, behind=0, channels=3):
    "The input that the kernel writes, for an image whose rows have some bytes more behind them."
    h, w = image.shape[:2]
    rows = np.full((h, w * channels + behind), 77, np.uint8)
    pixels = np.full((h, w, channels), 99, np.uint8)
    pixels[..., :3] = image
    rows[:, :w * channels] = pixels.reshape(h, -1)
    # what lies around the input must stay as it is
    guarded = np.full(int(np.prod(contract.input_shape)) + 64, 123, dtype)
    kernel = LetterboxKernel(context, contract, dtype, image=b"g++")
    out = guarded.ctypes.data + 32 * guarded.itemsize
    place = kernel(rows.ctypes.data, (h, w), out, stride=rows.shape[1], channels=channels)
    assert place == fit_image((h, w), contract.input_size, contract.fit)
    assert (guarded[:32] == 123).all() and (guarded[-32:] == 123).all()
    return guarded[32:-32].reshape(contract.input_shape)


def noise(h, w, seed=0): return np.random.RandomState(seed).randint(0, 256, (h, w, 3)).astype(np.uint8)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [
    (1, 1), (1, 50), (50, 1), (31, 33), (64, 96), (128, 192), (63, 96), (300, 37), (3, 700)])
def test_levels_are_our_letterboxs(cpu, fit, size):
    contract = contract_for((64, 96), fit, extra={"layout": "hwc"})
    image = noise(*size)
    got = run(cpu, contract, image, np.uint8)
    expected, _ = letterbox(image, (64, 96), fit)
    assert np.abs(got.astype(int) - expected).max() <= 1
    if size in ((64, 96), (128, 192)): np.testing.assert_array_equal(got, expected) # a copy, and a mean of four


@pytest.mark.parametrize("size, input_size", [((1080, 1920), (640, 640)), ((480, 640), (416, 416)),
                                              ((720, 1280), (416, 416))])
def test_cameras(cpu, size, input_size):
    contract = contract_for(input_size, "letterbox-topleft", extra={"layout": "hwc"})
    image = noise(*size)
    got = run(cpu, contract, image, np.uint8)
    off = np.abs(got.astype(int) - letterbox(image, input_size)[0])
    assert off.max() <= 1 and (off > 0).mean() < .005


@pytest.mark.parametrize("color", ["bgr", "rgb"])
@pytest.mark.parametrize("layout", ["chw", "hwc"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("channels", [3, 4])
def test_the_input_is_the_preprocessors(cpu, color, layout, dtype, channels):
    contract = contract_for((96, 64), "letterbox-center", color=color, scale=1 / 255, mean=(.4, .5, .6),
                            std=(.2, .25, .3), pad=50, extra={"layout": layout})
    image = noise(96, 32) # nothing to resize: the very levels
    got = run(cpu, contract, image, dtype, behind=13, channels=channels)
    expected = Preprocessor(contract)([image])[0][0]
    np.testing.assert_array_equal(got, expected.astype(dtype)) # to the last bit
    image = noise(77, 51)
    got = run(cpu, contract, image, dtype, channels=channels)
    expected = Preprocessor(contract)([image])[0][0]
    level = contract.scale / np.min(contract.std)
    np.testing.assert_allclose(got, expected, atol=level * 1.01 + (dtype == np.float16) * .01)


def test_any_size_stride_and_aspect(cpu):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    sides = st.integers(1, 260)

    @hypothesis.settings(max_examples=150, deadline=None)
    @hypothesis.given(sides, sides, st.integers(1, 150), st.integers(1, 150), st.sampled_from(FITS), st.integers(0, 70),
                      st.sampled_from([3, 4]), st.booleans(), st.integers(0, 255), st.integers(0, 99))
    def check(h, w, input_h, input_w, fit, behind, channels, is_planar, pad, seed):
        layout = "chw" if is_planar else "hwc"
        contract = contract_for((64, 64), fit, pad=pad, extra={"layout": layout})
        contract = contract._replace(input_size=(input_h, input_w), output="yolox") # no multiples of 32
        image = noise(h, w, seed)
        got = run(cpu, contract, image, np.uint8, behind, channels)
        if is_planar: got = got.transpose(1, 2, 0)
        expected, place = letterbox(image, (input_h, input_w), fit, pad)
        assert np.abs(got.astype(int) - expected).max() <= 1
        x, y = place.offset
        new_h, new_w = place.resized
        got = got.copy()
        got[y:y + new_h, x:x + new_w] = pad
        assert (got == pad).all()

    check()


def test_one_kernel_for_changing_frames(cpu):
    contract = contract_for((64, 96), "letterbox-center", extra={"layout": "hwc"})
    kernel = LetterboxKernel(cpu, contract, np.uint8, image=b"")
    for image in (noise(40, 50), noise(40, 50, 1), noise(50, 40), noise(40, 50, 2)):
        out = np.zeros((64, 96, 3), np.uint8)
        place = kernel(image.ctypes.data, image.shape[:2], out.ctypes.data)
        expected, expected_place = letterbox(image, (64, 96), "letterbox-center")
        assert place == expected_place and np.abs(out.astype(int) - expected).max() <= 1


def test_what_is_refused(cpu):
    kernel = LetterboxKernel(cpu, contract_for((64, 64), "stretch"), image=b"")
    for wrong, words in ((dict(size=(4, 0)), "cannot be fitted"), (dict(channels=2), "2 bytes"),
                         (dict(stride=29), "29 bytes"), (dict(stride=2**31), "can't hold"),
                         (dict(size=(2, 2**25), stride=3 * 2**25), "too large")):
        with pytest.raises(InputError) as e: kernel(1, **dict(dict(size=(4, 10), out=2), **wrong))
        assert words in str(e.value)
    with pytest.raises(InputError) as e: LetterboxKernel(cpu, contract_for((64, 64), "stretch"), np.int8, image=b"")
    assert "int8" in str(e.value)


@pytest.mark.parametrize("capability, toolkit", [
    ((5, 3), 11), ((6, 2), 11), ((8, 7), 11), ((5, 3), 12), ((6, 2), 12), ((7, 2), 12), ((8, 7), 12), ((11, 0), 12),
    ((8, 7), 13), ((11, 0), 13)])
def test_nvrtc_compiles_it_for_every_jetson(capability, toolkit):
    from jetson_det.runtime.engine.compile import compile_kernel
    image = compile_kernel(LETTERBOX_CU, capability, library=nvrtc(toolkit))
    assert image[:4] == b"\x7fELF"
    for name in KERNELS: assert b".text." + name.encode() in image
    # e_flags of a cubin carry the architecture: its lowest byte, or the second from CUDA 13 on
    flags = int.from_bytes(image[48:52], "little")
    chips = {flags & 0xff, flags >> 8 & 0xff}
    expected = capability[0] * 10 + capability[1]
    assert chips & ({expected, 101} if expected == 110 else {expected})


def nvrtc(toolkit):
    "libnvrtc of a CUDA; the test is skipped where pip can't bring it."
    folder = fake_cuda.needs(fake_cuda.installed, fake_cuda.NVRTC[toolkit], for_any_python=True)
    return next(path for path in sorted(folder.rglob("libnvrtc.so.*")))


def test_an_nvrtc_of_the_nano_gives_ptx(monkeypatch):
    "NVRTC 10.2 has no machine code and no list of architectures; 12.9 plays it by hiding both."
    from jetson_det.runtime.engine import compile as module
    real, version = module.load_nvrtc(nvrtc(12))
    asked = []

    class Older:
        def nvrtcCompileProgram(self, program, count, options):
            asked.extend(options)
            return real.nvrtcCompileProgram(program, count, options)

        def __getattr__(self, name):
            if "CUBIN" in name or "SupportedArchs" in name: raise AttributeError(name)
            return getattr(real, name)

    monkeypatch.setattr(module, "load_nvrtc", lambda path: (Older(), (10, 2)))
    image = module.compile_kernel(LETTERBOX_CU, (5, 3))
    assert b".target sm_53" in image and b"--gpu-architecture=compute_53" in asked
    for name in KERNELS: assert b".entry " + name.encode() in image
    with pytest.raises(InputError) as e: module.compile_kernel(LETTERBOX_CU, (1, 1))
    assert "does not compile for compute capability 1.1 with NVRTC 10.2" in str(e.value)


def test_an_nvrtc_that_knows_nothing_of_the_board():
    from jetson_det.runtime.engine.compile import compile_kernel
    with pytest.raises(InputError) as e: compile_kernel(LETTERBOX_CU, (5, 3), library=nvrtc(13))
    assert "not for 5.3" in str(e.value) and "\n" not in str(e.value)


def test_an_error_in_the_text_is_one_line():
    from jetson_det.runtime.engine.compile import compile_kernel
    with pytest.raises(InputError) as e: compile_kernel("void f( {", (8, 7), "broken.cu", nvrtc(12))
    assert "broken.cu(1)" in str(e.value) and "\n" not in str(e.value)


def test_compiled_once(monkeypatch, tmp_path):
    "The kept image is used without the compiler; a refused one is compiled again."
    from jetson_det.runtime.engine import letterbox as module
    from jetson_det.runtime.engine.compile import cached_kernel
    from jetson_det.runtime.engine.cuda import CudaError
    monkeypatch.setenv("JETSON_DET_CACHE", str(tmp_path))
    library = nvrtc(12)
    image = cached_kernel(LETTERBOX_CU, (8, 7), "letterbox", library)
    assert cached_kernel(LETTERBOX_CU, (8, 7), "letterbox", "no such library") == image
    compiled = []

    class Refusing:
        compute_capability = 8, 7
        def kernel(self, given, name):
            if given == image: raise CudaError("device kernel image is invalid")
            return Launch(name)

    def compiler(source, capability, name, fresh):
        compiled.append(fresh)
        return b"newer" if fresh else image

    monkeypatch.setattr(module, "cached_kernel", lambda s, c, n, fresh=False: compiler(s, c, n, fresh))
    assert LetterboxKernel(Refusing(), contract_for((64, 64), "stretch"))._kernel.function == "letterbox_float"
    assert compiled == [False, True]
