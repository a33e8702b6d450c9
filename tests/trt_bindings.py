"""NVIDIA's own Python bindings of TensorRT, without TensorRT: wheels of about 1 MB over libraries that do nothing.

Every class and every enum is the real one, so `hasattr` answers as on a board. The wheels lie in the user's cache;
where pip can't bring them, the test is skipped with the reason.
"""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

PACKAGES = {  # version -> package; 8.6.1 has a wheel for Python 3.6 too
    "8.6.1": "tensorrt-bindings", "10.3.0": "tensorrt-cu12-bindings", "10.7.0": "tensorrt-cu12-bindings",
    "10.13.3.9": "tensorrt-cu12-bindings", "10.16.1.11": "tensorrt-cu12-bindings",
    "11.4.0.106": "tensorrt-cu13-bindings",
}
MAJORS = sorted({version.split(".")[0] for version in PACKAGES})
# Older ones are 8.6.1 minus what NVIDIA/TensorRT's python/src of their tag does not name: class -> members, "": classes
_NOT_IN_85 = {
    "": "HardwareCompatibilityLevel OnnxParserFlag TempfileControlFlag",
    "IBuilderConfig": "builder_optimization_level hardware_compatibility_level max_aux_streams plugins_to_serialize",
    "INetworkDefinition": "add_cast add_normalization add_reverse_sequence builder",
    "OnnxParser": "get_used_vc_plugin_libraries",
    "Runtime": "engine_host_code_allowed load_runtime tempfile_control_flags temporary_directory",
    "ICudaEngine": "hardware_compatibility_level num_aux_streams",
    "IExecutionContext": "set_aux_streams",
    "BuilderFlag": "EXCLUDE_LEAN_RUNTIME FP8 VERSION_COMPATIBLE",
    "DataType": "FP8",
}
_NOT_IN_84 = { # nor in 8.2
    "": "TensorIOMode IOutputAllocator PreviewFeature",
    "IBuilderConfig": "get_preview_feature set_preview_feature",
    "INetworkDefinition": "add_grid_sample add_nms add_non_zero add_one_hot",
    "ICudaEngine": "get_tensor_bytes_per_component get_tensor_components_per_element get_tensor_dtype get_tensor_format"
                   " get_tensor_format_desc get_tensor_location get_tensor_mode get_tensor_name"
                   " get_tensor_profile_shape"
                   " get_tensor_shape get_tensor_vectorized_dim is_shape_inference_io num_io_tensors",
    "IExecutionContext": "execute_async_v3 get_input_consumed_event get_max_output_size get_output_allocator"
                         " get_tensor_address get_tensor_shape get_tensor_strides infer_shapes nvtx_verbosity"
                         " persistent_cache_limit set_input_consumed_event set_input_shape set_output_allocator"
                         " set_tensor_address temporary_allocator",
    "BuilderFlag": "ENABLE_TACTIC_HEURISTIC",
    "DataType": "UINT8",
    "ITensor": "get_dimension_name set_dimension_name",
}
_NOT_IN_82 = {
    "": "MemoryPoolType", "Builder": "max_threads", "Runtime": "max_threads",
    "IBuilderConfig": "get_memory_pool_limit set_memory_pool_limit",
}


def _together(*tables):
    found = {}
    for table in tables:
        for name, members in table.items(): found.setdefault(name, []).extend(members.split())
    return found


OLDER = { # version -> what it calls itself, what 8.6.1 has and it has not
    "8.2": ("8.2.1.8", _together(_NOT_IN_85, _NOT_IN_84, _NOT_IN_82)),
    "8.4": ("8.4.1.5", _together(_NOT_IN_85, _NOT_IN_84)),
    "8.5": ("8.5.2.2", _together(_NOT_IN_85)),
}

_STUB = "#define R(name) void *name(void) { return 0; }\n" + " ".join("R({})".format(name) for name in """
createInferBuilder_INTERNAL createInferRuntime_INTERNAL createInferRefitter_INTERNAL createNvOnnxParser_INTERNAL
createNvOnnxParserRefitter_INTERNAL getPluginRegistry getBuilderPluginRegistry getInferLibVersion
getInferLibMajorVersion getInferLibMinorVersion getInferLibPatchVersion getInferLibBuildVersion getNvOnnxParserVersion
initLibNvInferPlugins getLogger setInternalLibraryPath _ZN11nvuffparser15createUffParserEv
_ZN11nvuffparser8FieldMapC1EPKcPKvNS_9FieldTypeEi _ZN14nvcaffeparser117createCaffeParserEv
_ZN14nvcaffeparser123shutdownProtobufLibraryEv""".split()) + "\n"


def _cache():
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "jetson_det" / "tensorrt-bindings"


def stub_libraries(folder):
    "Libraries named as TensorRT's, each function of which returns 0; compiled once a folder."
    source = folder / "stub.c"
    source.write_text(_STUB)
    for name in ("nvinfer", "nvonnxparser", "nvinfer_plugin", "nvparsers"):
        for major in MAJORS:
            target = folder / "lib{}.so.{}".format(name, major)
            if name == "nvparsers" and major != "8": continue
            try: done = subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(target), str(source)],
                                       stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            except OSError: pytest.skip("no gcc to make TensorRT's libraries with")
            assert not done.returncode, done.stderr
    return folder


def bindings_folder(version, python="{}.{}".format(*sys.version_info[:2])):
    "The folder with the bindings of a version for a Python; the test is skipped where pip can't bring them."
    target = _cache() / "{}-{}".format(version, python)
    if (target / "tensorrt_bindings").is_dir(): return target
    if sys.version_info < (3, 8): pytest.skip("the wheels are brought by a newer Python")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=str(target.parent), prefix=".part-"))
    words = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--disable-pip-version-check", "--target",
             str(part), "--python-version", python, "--only-binary=:all:",
             "{}=={}".format(PACKAGES[version], version)]
    try: done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120)
    except (OSError, subprocess.SubprocessError) as e: pytest.skip("pip does not run: {}".format(e))
    if done.returncode or not (part / "tensorrt_bindings").is_dir():
        shutil.rmtree(str(part), ignore_errors=True)
        last = done.stdout.decode("utf-8", "replace").strip().splitlines()[-1:]
        pytest.skip("pip cannot bring {} {}: {}".format(PACKAGES[version], version, "".join(last)[:200]))
    try: part.rename(target)
    except OSError: shutil.rmtree(str(part), ignore_errors=True)  # another process was faster
    return target


def run_with_bindings(version, libraries, words, python=sys.executable, pythons=None, path=""):
    "Run a Python program that can `import tensorrt_bindings`; its CompletedProcess, text in bytes."
    folder = bindings_folder(version, pythons) if pythons else bindings_folder(version)
    env = dict(os.environ, LD_LIBRARY_PATH=str(libraries), OMP_NUM_THREADS="1", LC_ALL="C.UTF-8",
               PYTHONPATH=os.pathsep.join([str(folder)] + ([path] if path else [])))
    return subprocess.run([str(python)] + [str(word) for word in words], env=env, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, timeout=120)
