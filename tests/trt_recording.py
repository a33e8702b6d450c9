"""Objects of TensorRT's real classes, played: what a class does not have is refused, and so is a call that its binding
would not take. The network behind them is a numpy function. Python 3.6."""
import ctypes
import json
import re

import numpy as np


def _parts(text):
    "A text cut at the commas that stand in no bracket."
    parts = []
    depth = 0
    start = 0
    for k, c in enumerate(text):
        depth += (c in "([<{") - (c in ")]>}")
        if c == "," and not depth:
            parts.append(text[start:k])
            start = k + 1
    return [part.strip() for part in parts + [text[start:]] if part.strip()]


def signatures(function):
    "[(name, type, has a default) of each argument] of each overload, from the text that pybind11 writes."
    lines = [line for line in (function.__doc__ or "").splitlines() if "(" in line and ") ->" in line]
    found = []
    for line in lines:
        match = re.match(r"(?:\d+\. )?\w+\((.*)\) -> ", line)
        if match is None or match.group(1) == "*args, **kwargs": continue
        rows = []
        for part in _parts(match.group(1)):
            if part == "self" or part.startswith("self:"): continue
            head, _, _ = part.partition(" = ")
            name, _, kind = head.partition(":")
            rows.append((name.strip(), kind.strip(), " = " in part))
        found.append(rows)
    return found


_NUMPY = dict(FLOAT=np.float32, HALF=np.float16, UINT8=np.uint8, INT32=np.int32, INT64=np.int64)


class Refused(Exception):
    "What the real binding would not have taken."


class Recorder:
    "An object of a real class. `parts` are its methods and values."
    def __init__(self, trt, kind, **parts):
        self.__dict__.update(_trt=trt, _kind=kind, _parts=parts)

    def __getattr__(self, name):
        trt = self._trt
        if not trt.has(self._kind, name): raise AttributeError("{} has no {}".format(self._kind, name))
        trt.touched.add("{}.{}".format(self._kind, name))
        if name not in self._parts: raise Refused("{}.{} is not played".format(self._kind, name))
        part = self._parts[name]
        if not callable(part): return part
        return trt.checked("{}.{}".format(self._kind, name), getattr(getattr(trt.real, self._kind), name), part)

    def __setattr__(self, name, value):
        trt = self._trt
        if not trt.has(self._kind, name): raise Refused("{} has no {} to set".format(self._kind, name))
        member = getattr(getattr(trt.real, self._kind), name)
        if not isinstance(member, property) or member.fset is None:
            raise Refused("{}.{} can't be set".format(self._kind, name))
        trt.touched.add("{}.{}=".format(self._kind, name))
        self._parts[name] = value


class Stripped:
    "A class or an enum without some members."
    def __init__(self, real, missing): self.__dict__.update(_real=real, _missing=missing)

    def __getattr__(self, name):
        if name in self._missing: raise AttributeError(name)
        return getattr(self._real, name)


class FakeTensorRT:
    """TensorRT as a module: the real classes and enums, less `missing`; builder, parser, runtime, engine and context
    are played around `network`, a function of the input array that gives a dict of arrays. Its plan is JSON."""
    def __init__(self, real, network, inputs, outputs, streams, missing=None, version=None, parser_error=None):
        self.real = real
        self.network = network
        self.inputs = inputs    # name -> shape; -1 is open
        self.outputs = outputs
        self.streams = streams  # handle -> Stream of FakeCuda
        self.missing = missing or {}
        self.version = version or real.__version__
        self.parser_error = parser_error
        self.kinds = {}         # name -> of trt.DataType; FLOAT where it has none
        self.touched = set()
        self.calls = []
        self.timing = b""
        self.flags = None
        self.set_flags = []
        self.config = None
        self.calibrated = []
        self.profile = None

    # the module

    def __getattr__(self, name):
        if name == "__version__": return self.version
        if name.startswith("__"): raise AttributeError(name)
        if name in self.missing.get("", ()) or not hasattr(self.real, name): raise AttributeError(name)
        self.touched.add(name)
        played = {"Builder": self._builder, "OnnxParser": self._parser, "Runtime": self._runtime}
        if name == "init_libnvinfer_plugins": return lambda logger, namespace: True
        if name in played:
            return self.checked(name, getattr(self.real, name).__init__, played[name])
        real = getattr(self.real, name)
        return Stripped(real, self.missing[name]) if name in self.missing else real

    def has(self, kind, name):
        if name in self.missing.get(kind, ()): return False
        return hasattr(getattr(self.real, kind), name)

    def checked(self, label, real, played):
        "A function that takes what the real one takes."
        overloads = signatures(real)

        def call(*args, **kwargs):
            self.calls.append(label)
            if overloads and not any(self._fits(rows, args, kwargs) for rows in overloads):
                raise Refused("{} does not take {} {}; it takes {}".format(label, args, kwargs, overloads))
            return played(*args, **kwargs)
        return call

    def _fits(self, rows, args, kwargs):
        names = [name for name, _, _ in rows]
        if len(args) > len(rows) or any(name not in names[len(args):] for name in kwargs): return False
        given = dict(zip(names, args), **kwargs)
        for name, kind, has_default in rows:
            if name not in given:
                if not has_default: return False
            elif not self._is(given[name], kind): return False
        return True

    def _is(self, value, kind):
        kind = kind.split("tensorrt.")[-1]
        if kind in ("int", "typing.SupportsInt", "typing.SupportsIndex"):
            return isinstance(value, int) and not isinstance(value, bool)
        if kind == "bool": return isinstance(value, bool)
        if kind == "str": return isinstance(value, str)
        if re.match(r"(?:typing\.)?(?:[Ll]ist|collections\.abc\.Sequence)\[.*[Ii]nt", kind):
            return isinstance(value, list) and all(isinstance(v, int) for v in value)
        if kind.lower().endswith("buffer"):
            try: return memoryview(value) is not None
            except TypeError: return False
        if kind in ("Dims", "tuple"): return isinstance(value, tuple) and all(isinstance(v, int) for v in value)
        if hasattr(self.real, kind):
            played = isinstance(value, Recorder) and value._kind == kind
            return played or isinstance(value, getattr(self.real, kind))
        return True

    # the builder

    def _shape(self, shape): return self.real.Dims(list(shape))

    def _tensor(self, name, shape):
        kind = getattr(self.real.DataType, self.kinds.get(name, "FLOAT"))
        return Recorder(self, "ITensor", name=name, shape=self._shape(shape), dtype=kind)

    def _builder(self, logger):
        self.logger = logger

        def create_network(flags=0):
            self.flags = flags
            names = list(self.inputs)
            ends = list(self.outputs)
            return Recorder(
                self, "INetworkDefinition", num_inputs=len(names), num_outputs=len(ends), num_layers=3,
                get_input=lambda index: self._tensor(names[index], self.inputs[names[index]]),
                get_output=lambda index: self._tensor(ends[index], self.outputs[ends[index]]))

        def create_optimization_profile():
            def set_shape(input, min, opt, max): self.profile = (input, tuple(min), tuple(opt), tuple(max))
            return Recorder(self, "IOptimizationProfile", set_shape=set_shape)

        def build(network, config):
            parts = config._parts
            self.config = parts
            if "progress_monitor" in parts and parts["progress_monitor"] is not None:
                monitor = parts["progress_monitor"]
                monitor.phase_start("Building Engine", None, 2)
                for step in range(2):
                    if not monitor.step_complete("Building Engine", step): return None
                monitor.phase_finish("Building Engine")
            else:
                for layer in ("conv", "conv", "scores"):
                    text = "--------------- Timing Runner: {} (CudnnConvolution)".format(layer)
                    logger.log(self.real.ILogger.Severity.VERBOSE, text)
            if parts.get("int8_calibrator") is not None: self._calibrate(parts["int8_calibrator"])
            record = dict(version=self.version, inputs=self.inputs, outputs=self.outputs, kinds=self.kinds)
            if self.profile: record["most"] = self.profile[3][0]
            return b"ftrt" + json.dumps(record).encode("utf-8")

        return Recorder(self, "Builder", create_network=create_network, create_builder_config=self._make_config,
                        create_optimization_profile=create_optimization_profile, build_serialized_network=build,
                        platform_has_fast_fp16=True, platform_has_fast_int8=True)

    def _calibrate(self, calibrator):
        assert calibrator.read_calibration_cache() is None
        batch = calibrator.get_batch_size()
        shape = (batch,) + tuple(self.inputs["images"])[1:]
        while True:
            pointers = calibrator.get_batch(["images"])
            if pointers is None: break
            self.calibrated.append(self._at(pointers[0], shape, np.float32).copy())

    def _make_config(self):
        pools = {}

        def create_timing_cache(serialized_timing_cache):
            data = bytes(serialized_timing_cache)
            if data and not data.startswith(b"timing"):
                self.logger.log(self.real.ILogger.Severity.ERROR, "cache header is wrong")
                return None
            return Recorder(self, "ITimingCache", serialize=lambda: b"timing " + self.version.encode())

        def set_timing_cache(cache, ignore_mismatch): return True

        def set_pool(pool, pool_size): pools[pool.name] = pool_size
        return Recorder(
            self, "IBuilderConfig", set_flag=lambda flag: self.set_flags.append(flag.name), pools=pools,
            set_memory_pool_limit=set_pool, add_optimization_profile=lambda profile: 0,
            set_calibration_profile=lambda profile: True, create_timing_cache=create_timing_cache,
            set_timing_cache=set_timing_cache,
            get_timing_cache=lambda: Recorder(self, "ITimingCache",
                                              serialize=lambda: b"timing " + self.version.encode()))

    def _parser(self, network, logger):
        def get_error(index):
            node, name, operator, text = self.parser_error
            return Recorder(self, "ParserError", node=lambda: node, node_name=lambda: name,
                            node_operator=lambda: operator, desc=lambda: text)
        return Recorder(self, "OnnxParser", parse_from_file=lambda model: self.parser_error is None,
                        num_errors=int(self.parser_error is not None), get_error=get_error)

    # the engine

    def _runtime(self, logger):
        def deserialize(serialized_engine):
            data = bytes(serialized_engine)
            try: record = json.loads(data[4:].decode("utf-8"))
            except ValueError: record = {}
            if data[:4] == b"ftrt" and record.get("version") == self.version: return self._engine(record)
            logger.log(self.real.ILogger.Severity.ERROR, "Serialization assertion failed: Version tag does not match")
            return None
        return Recorder(self, "Runtime", deserialize_cuda_engine=deserialize)

    def _engine(self, record):
        inputs = record["inputs"]
        shapes = dict(inputs, **record["outputs"])
        names = list(inputs) + list(record["outputs"])
        most = record.get("most", 1)
        modes = self.real.TensorIOMode if hasattr(self.real, "TensorIOMode") else None

        def dtype(name): return getattr(self.real.DataType, record["kinds"].get(name, "FLOAT"))

        def profile(name):
            return [self._shape((n,) + tuple(shapes[name][1:])) for n in (1, most, most)]
        return Recorder(
            self, "ICudaEngine", num_io_tensors=len(names), num_bindings=len(names), num_optimization_profiles=1,
            get_tensor_name=lambda index: names[index], get_binding_name=lambda index: names[index],
            get_tensor_mode=lambda name: modes.INPUT if name in inputs else modes.OUTPUT,
            binding_is_input=lambda index: names[index] in inputs,
            get_tensor_shape=lambda name: self._shape(shapes[name]),
            get_binding_shape=lambda index: self._shape(shapes[names[index]]),
            get_tensor_dtype=dtype, get_binding_dtype=lambda index: dtype(names[index]),
            get_tensor_profile_shape=lambda name, profile_index: profile(name),
            get_profile_shape=lambda profile_index, binding: profile(names[binding]),
            create_execution_context=lambda: self._context(names, inputs, shapes, record["kinds"]))

    def _context(self, names, inputs, shapes, kinds):
        state = dict(batch=None)
        addresses = {}

        def shape_of(name):
            if shapes[name][0] > 0: return tuple(shapes[name])
            return (-1 if state["batch"] is None else state["batch"],) + tuple(shapes[name][1:])

        def set_shape(name, shape):
            state["batch"] = shape[0]
            return True

        def set_address(name, memory):
            addresses[name] = memory
            return True

        def launch(places, stream_handle):
            here = {name: (places[name], shape_of(name)) for name in names}

            def run():
                arrays = {name: self._at(*(here[name] + (_NUMPY[kinds.get(name, "FLOAT")],))) for name in names}
                for name, value in self.network(*(arrays[name] for name in inputs)).items(): arrays[name][...] = value
            self.streams[stream_handle].add(run)
            return True

        def execute_async_v2(bindings, stream_handle, input_consumed=None):
            return launch(dict(zip(names, bindings)), stream_handle)
        return Recorder(
            self, "IExecutionContext", get_tensor_shape=lambda name: self._shape(shape_of(name)),
            get_binding_shape=lambda binding: self._shape(shape_of(names[binding])),
            set_input_shape=set_shape, set_binding_shape=lambda binding, shape: set_shape(names[binding], shape),
            set_tensor_address=set_address, execute_async_v2=execute_async_v2,
            execute_async_v3=lambda stream_handle: launch(dict(addresses), stream_handle))

    @staticmethod
    def _at(address, shape, dtype):
        "The array at an address."
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        raw = (ctypes.c_uint8 * count).from_address(address)
        return np.frombuffer(raw, dtype).reshape(shape)
