"""The interface of runtime.engine.cuda, played on the CPU's memory, strictly: nothing that was put on a stream happens
before it is synchronized, freed memory is not touched, and a call without the context is an error. Python 3.6."""
import itertools
import threading

import numpy as np


class FakeStream:
    def __init__(self, cuda):
        self.cuda = cuda
        self.handle = next(cuda.numbers)
        self.waiting = []
        self.captured = None
        cuda.streams[self.handle] = self

    def add(self, work):
        assert self.cuda.current(), "CUDA without a context"
        (self.waiting if self.captured is None else self.captured).append(work)

    def synchronize(self):
        assert self.captured is None, "a stream that is captured must not be synchronized"
        waiting = self.waiting
        self.waiting = []
        for work in waiting: work()


class _Part:
    def __init__(self, cuda, array, pointer):
        self._cuda = cuda
        self._array = array
        self._pointer = pointer
        cuda.alive.append(self)

    def _live(self):
        assert self in self._cuda.alive, "memory that was freed"
        return self

    def free(self):
        self._live()
        self._cuda.alive.remove(self)


class FakeBuffer(_Part):
    nbytes = property(lambda self: self._live()._array.nbytes)
    pointer = property(lambda self: self._live()._pointer)


class FakeHost(_Part):
    array = property(lambda self: self._live()._array)
    pointer = property(lambda self: self._live()._pointer)


class FakeCuda:
    def __init__(self, compute_capability=(8, 7), name="Orin", integrated=True, offers=("mapped", "managed")):
        self.compute_capability = compute_capability
        self.name = name
        self.integrated = integrated
        self.offers = offers
        self.streams = {}
        self.numbers = itertools.count(1000)
        self.alive = []
        self.made = []
        self._depth = threading.local()

    def __enter__(self):
        self._depth.n = getattr(self._depth, "n", 0) + 1
        return self

    def __exit__(self, *error): self._depth.n -= 1

    def current(self): return getattr(self._depth, "n", 0) > 0

    def stream(self): return FakeStream(self)

    def buffer(self, nbytes):
        assert isinstance(nbytes, int) and nbytes > 0
        array = np.full(nbytes, 255, np.uint8)  # of floats: nan
        self.made.append("buffer")
        return FakeBuffer(self, array, array.ctypes.data)

    def _host(self, kind, shape, dtype, pointer):
        if kind in ("mapped", "managed") and kind not in self.offers:
            from jetson_det.runtime.files import InputError
            raise InputError("this device has no {} memory".format(kind))
        self.made.append(kind)
        array = np.zeros(shape, dtype)
        return FakeHost(self, array, array.ctypes.data if pointer else None)

    def host(self, shape, dtype, mapped=False):
        return self._host("mapped" if mapped else "pinned", shape, dtype, mapped)

    def managed(self, shape, dtype): return self._host("managed", shape, dtype, True)

    def copy_in(self, buffer, array, stream=None):
        assert isinstance(buffer, FakeBuffer) and array.flags.c_contiguous and array.nbytes <= buffer.nbytes
        target = buffer._array

        def work(): target[:array.nbytes] = array.reshape(-1).view(np.uint8)
        stream.add(work) if stream is not None else work()

    def copy_out(self, array, buffer, stream=None):
        assert isinstance(buffer, FakeBuffer) and array.flags.c_contiguous and array.nbytes <= buffer.nbytes
        source = buffer._live()._array

        def work(): array.reshape(-1).view(np.uint8)[...] = source[:array.nbytes]
        stream.add(work) if stream is not None else work()


class FakeDriver:
    "libcuda's functions for graphs."
    def __init__(self, cuda, fails="", old=False):
        self.cuda = cuda
        self.fails = fails
        self.graphs = {}
        self.launches = 0
        self.alive = 0
        if not old: self.cuGraphInstantiateWithFlags = self._instantiate
        else: self.cuGraphInstantiate_v2 = lambda made, graph, node, log, size: self._instantiate(made, graph, size)

    def cuStreamBeginCapture_v2(self, stream, mode):
        assert mode.value == 1
        if self.fails == "begin": return 900
        self.cuda.streams[stream.value].captured = []
        return 0

    def cuStreamEndCapture(self, stream, graph):
        there = self.cuda.streams[stream.value]
        works = there.captured
        there.captured = None
        if self.fails == "end": return 901
        graph._obj.value = next(self.cuda.numbers)
        self.graphs[graph._obj.value] = works
        return 0

    def _instantiate(self, made, graph, flags):
        made._obj.value = graph.value
        self.alive += 1
        return 0

    def cuGraphDestroy(self, graph): return 0

    def cuGraphLaunch(self, made, stream):
        self.launches += 1
        for work in self.graphs[made.value]: self.cuda.streams[stream.value].add(work)
        return 0

    def cuGraphExecDestroy(self, made):
        self.alive -= 1
        return 0
