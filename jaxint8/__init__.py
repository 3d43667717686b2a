"""LLM.int8() for JAX: linear layers in int8 with the few outlier activations at higher precision.

The pieces: `quantize` a kernel into a `QuantizedMatrix`, multiply with `int8_linear` under one of the outlier rules,
or put `Dense8bit` where a Flax model has `Dense`. Whole checkpoints are loaded by `jaxint8.models.load`.
"""

import importlib
import types

from jaxint8 import nnx as nnx
from jaxint8.convert import convert_params as convert_params
from jaxint8.dense import Dense8bit as Dense8bit
from jaxint8.linear import int8_linear as int8_linear
from jaxint8.outliers import RelativeThreshold as RelativeThreshold
from jaxint8.outliers import Threshold as Threshold
from jaxint8.outliers import TopK as TopK
from jaxint8.partition import Partition as Partition
from jaxint8.quantize import QuantizedMatrix as QuantizedMatrix
from jaxint8.quantize import quantize as quantize

__version__ = "0.1.0"


def __getattr__(name: str) -> types.ModuleType:
    """Imports `jaxint8.models` where it is first used: layers alone need none of it."""
    if name == "models":
        return importlib.import_module("jaxint8.models")
    raise AttributeError(f"module 'jaxint8' has no attribute {name!r}")
