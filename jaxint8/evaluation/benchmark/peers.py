"""Other engines' linear layers, each if it is installed: ONNX Runtime and torch.

Their int8 is what their own tools make of a model: dynamic quantisation, one scale for all
activations of a call, no outlier part. That is less work than LLM.int8() at a lower quality. The
surprising fact: each engine starts threads of its own, so all of them are given the same number.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

Layer = Callable[[np.ndarray], Callable[[], Any]]
"""Takes activations float32[m, k]; gives a function that computes the layer once and returns its
result, something that NumPy can read as float32[m, n]."""

PACKAGES = ("onnxruntime", "torch", "llama_cpp", "ctranslate2")


def installed(*packages: str) -> bool:
    """Whether all of these can be found."""
    return all(importlib.util.find_spec(package) is not None for package in packages)


def versions() -> dict[str, str]:
    """The version of each peer that is installed."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            if installed(package):
                found[package] = importlib.metadata.version(package.replace("_cpp", "-cpp-python"))
    return found


def layers(codes: np.ndarray, scale: float, threads: int) -> dict[str, Layer]:
    """The layers of the engines that are installed, by the engine's name.

    Args:
      codes: int8[n, k], the weights; their scale is one number, as these engines have it.
      scale: of the codes.
      threads: for each engine.
    """
    made: dict[str, Layer] = {}
    if installed("onnxruntime", "onnx"):
        made["onnxruntime int8"] = onnxruntime_layer(codes, scale, threads)
    if installed("torch"):
        made["torch float32"] = torch_layer(codes, scale, threads)
        made["torch int8"] = torch_layer(codes, scale, threads, int8=True)
    return made


def onnxruntime_layer(codes: np.ndarray, scale: float, threads: int) -> Layer:
    """ONNX Runtime's dynamically quantised layer, uint8 activations by int8 weights.

    The graph is what its quantize_dynamic writes; the runtime fuses it into one or two nodes.
    """
    onnx: Any = importlib.import_module("onnx")
    runtime: Any = importlib.import_module("onnxruntime")
    helper, kinds = onnx.helper, onnx.TensorProto
    constants = {
        "w": np.ascontiguousarray(codes.T),
        "w_zero": np.zeros((), np.int8),
        "w_scale": np.array(scale, np.float32),
    }
    nodes = [
        ("DynamicQuantizeLinear", ["x"], ["xq", "x_scale", "x_zero"], {}),
        ("MatMulInteger", ["xq", "w", "x_zero", "w_zero"], ["sums"], {}),
        ("Cast", ["sums"], ["floats"], {"to": kinds.FLOAT}),
        ("Mul", ["x_scale", "w_scale"], ["both"], {}),
        ("Mul", ["floats", "both"], ["y"], {}),
    ]
    n, k = codes.shape
    graph = helper.make_graph(
        [helper.make_node(kind, ins, outs, **options) for kind, ins, outs, options in nodes],
        "layer",
        [helper.make_tensor_value_info("x", kinds.FLOAT, ["m", k])],
        [helper.make_tensor_value_info("y", kinds.FLOAT, ["m", n])],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    # Versions that every runtime of the last years reads.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = runtime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )

    def layer(x: np.ndarray) -> Callable[[], Any]:
        # Bound once: a call then copies nothing. `run` keeps the memory alive.
        given, y = np.ascontiguousarray(x), np.zeros((x.shape[0], n), np.float32)
        binding = session.io_binding()
        binding.bind_input("x", "cpu", 0, np.float32, list(given.shape), given.ctypes.data)
        binding.bind_output("y", "cpu", 0, np.float32, list(y.shape), y.ctypes.data)

        def run(kept: np.ndarray = given) -> np.ndarray:
            del kept
            session.run_with_iobinding(binding)
            return y

        return run

    return layer


def torch_layer(codes: np.ndarray, scale: float, threads: int, *, int8: bool = False) -> Layer:
    """The linear layer of torch, float32 or dynamically quantised to int8 by its own tool."""
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(threads)
    n, k = codes.shape
    linear = torch.nn.Linear(k, n, bias=False)
    with torch.inference_mode():
        linear.weight.copy_(torch.from_numpy(codes).to(torch.float32) * scale)
    model = torch.nn.Sequential(linear).eval()
    if int8:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the tool is to move
            model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})

    def layer(x: np.ndarray) -> Callable[[], Any]:
        given = torch.from_numpy(x)

        def run() -> Any:
            with torch.inference_mode():
                return model(given)

        return run

    return layer
