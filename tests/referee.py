"""TensorRT-RTX, of the extra [lint-check], as the referee of the lint: NVIDIA's own parser and builder, without a GPU.
It is as strongly typed as TensorRT 11, and is not a Jetson's TensorRT."""
import pytest


def needs_referee():
    "The module; the test, or the file, is skipped where it is not installed."
    reason = "the referee is not installed: pip install .[lint-check]"
    return pytest.importorskip("tensorrt_rtx_bindings", reason=reason, exc_type=ImportError)


def takes(data):
    "Does TensorRT-RTX parse and build it?"
    trt = needs_referee()
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(data): return False
    return builder.build_serialized_network(network, builder.create_builder_config()) is not None
