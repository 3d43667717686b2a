"""What a decoder is made of: frozen dataclasses whose fields are the choices it branches on.

A family (``families/<name>.py``) only fills these fields; the decoder never asks which family it
runs. Both dataclasses are hashable, so that they can be static arguments of ``jax.jit``: two
configurations that compare equal share one compiled program.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from jaxint8 import schemes
from jaxint8.schemes import SCHEMES, Scheme

# Far more than any model has, and few enough that a file that claims more is refused, not walked layer by layer.
MOST_LAYERS = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those of training.

    ``linear`` divides every frequency by ``factor``. ``llama3`` divides the slow ones only:
    wavelengths longer than ``original_positions / low_frequency_factor`` are divided by ``factor``,
    those shorter than ``original_positions / high_frequency_factor`` are kept, and those between
    are blended.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    # The four below are used by "llama3" only.
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_positions: int = 8192

    def __post_init__(self) -> None:
        """Checks the numbers, which frequencies are divided by."""
        for name in ("factor", "low_frequency_factor", "high_frequency_factor"):
            _check_number(f"rope scaling: {name}", getattr(self, name))
        _check_size("rope scaling: original_positions", self.original_positions)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        if high <= low:
            raise ValueError(
                f"rope scaling: high_frequency_factor ({high}) must be more than "
                f"low_frequency_factor ({low})"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Every architectural choice of a decoder-only transformer; sizes are element counts."""

    # Name of the family that filled this in; for messages and saved files only, never branched on
    # by the decoder.
    family: str

    # Sizes.
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    # Width of the MLP between its two products.
    mlp_size: int
    # Longest sequence the positions are defined for.
    max_positions: int
    # Width of the token embedding; where it differs from hidden_size, project_in and project_out
    # bridge the two.
    embedding_size: int

    # Norm: root mean square, or mean and variance.
    norm: Literal["rms", "layer"]
    norm_epsilon: float
    # Layer norms without weight and bias exist.
    norm_affine: bool = True
    # Pre-norm (True) normalises the input of attention and MLP, post-norm the sum after them.
    norm_first: bool = True
    # A last norm before the head, and one between the embedding and the first layer.
    final_norm: bool = True
    embedding_norm: bool = False

    # Positions: rotary, a learned table whose row for position p is p + position_offset, or ALiBi,
    # a bias of attention that falls with distance.
    positions: Literal["rope", "learned", "alibi"]
    position_offset: int = 0
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    # True when the checkpoint stores a divisor per rotary frequency (GGUF's rope_freqs); then it is
    # a parameter.
    rope_factors: bool = False

    # MLP: act(gate(x)) * up(x) when gated, else act(up(x)).
    activation: Literal["silu", "relu", "gelu", "gelu_tanh"]
    gated: bool

    # Biases of q, k, v; of the attention output; of the MLP's products.
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False

    # True when the head is the embedding table.
    tied_embeddings: bool = False

    # Token ids: generation ends at any of end_tokens; start_token goes before a text when the
    # tokenizer says so.
    start_token: int | None = None
    end_tokens: tuple[int, ...] = ()

    @property
    def query_size(self) -> int:
        """Outputs of the query projection: heads * head_dim."""
        return self.heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Outputs of the key projection, and of the value projection: kv_heads * head_dim."""
        return self.kv_heads * self.head_dim

    def __post_init__(self) -> None:
        """Checks numbers and sizes, those against each other too."""
        for name in _SIZES:
            _check_size(f"{self.family} config: {name}", getattr(self, name))
        _check_number(f"{self.family} config: rope_theta", self.rope_theta)
        _check_number(f"{self.family} config: norm_epsilon", self.norm_epsilon, or_zero=True)
        if self.layers > MOST_LAYERS:
            raise ValueError(
                f"{self.family} config: layers must be at most {MOST_LAYERS}, got {self.layers}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.family} config: heads ({self.heads}) must be a multiple of "
                f"kv_heads ({self.kv_heads})"
            )
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(
                f"{self.family} config: rotary positions need an even head_dim, got {self.head_dim}"
            )


_SIZES = (
    "vocab_size",
    "hidden_size",
    "layers",
    "heads",
    "kv_heads",
    "head_dim",
    "mlp_size",
    "max_positions",
    "embedding_size",
)


def _check_size(what: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{what} must be at least 1, an integer, got {value!r}")


def _check_number(what: str, value: float, or_zero: bool = False) -> None:
    if not math.isfinite(value) or value < 0 or (value == 0 and not or_zero):
        least = "at least 0" if or_zero else "more than 0"
        raise ValueError(f"{what} must be {least} and finite, got {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationConfig(Scheme):
    """How a decoder's linear layers are carried out in int8: a scheme, and where; the default is the paper's method.

    Embeddings, norms and biases stay float, and so do the head and the cache unless ``lm_head`` and
    ``kv_cache`` say "int8".
    """

    # "cuda", "cpu", "xla", "reference"; None is the best that exists.
    implementation: str | None = None
    # Precision of the product that makes logits. "int8" keeps the float matrix as well: the largest
    # logits are computed from it once more where they choose the next token (see head.py).
    lm_head: Literal["float", "int8"] = "float"
    # Keys and values that attention sees: as activations are, or int8 vectors of one scale each (see
    # vectors.py), in the cache and, so that its length changes nothing, in prompts too.
    kv_cache: Literal["float", "int8"] = "float"
    # On a mesh, layers whose inputs many devices made: "exact" gathers rows, so that a layer has the
    # bits of one device; "fast" lets every device scale its part of a row, and adds up the results,
    # half of the messages (see jaxint8.int8_linear).
    reduction: Literal["exact", "fast"] = "exact"

    def __post_init__(self) -> None:
        """Checks the choices, and turns a number into the rule that it means."""
        super().__post_init__()
        self._one_of("implementation", None, "cuda", "cpu", "xla", "reference")
        self._one_of("lm_head", "float", "int8")
        self._one_of("kv_cache", "float", "int8")
        self._one_of("reduction", "exact", "fast")

    @classmethod
    def of(cls, scheme: Scheme) -> QuantizationConfig:
        """Returns the scheme with the library's choices for the rest."""
        return cls(**vars(scheme))


# The methods of the paper's tables, and the rules that came after it, by the names used everywhere.
QUANTIZATIONS = {name: QuantizationConfig.of(scheme) for name, scheme in SCHEMES.items()}

# Options of a name that are no scheme's, for they are about more than a layer.
_OPTIONS: dict[str, dict[str, Any]] = {
    "kv_int8": {"kv_cache": "int8"},
    "fast": {"reduction": "fast"},
}


def as_quantization(value: QuantizationConfig | str | None) -> QuantizationConfig | None:
    """Returns what a user's ``quantization`` argument means: a config, a name, or None for float.

    A name may carry options, "relative:8" or "topk:16" (see `jaxint8.schemes.parse`), "kv_int8" for
    ``kv_cache="int8"`` and "fast" for ``reduction="fast"``: "topk:kv_int8", "topk:fast".

    Raises:
        ValueError: a name that is not known.
        TypeError: anything else.

    """
    if value is None or isinstance(value, QuantizationConfig):
        return value
    if not isinstance(value, str):
        raise TypeError(
            "quantization: expected a name, a QuantizationConfig or None, "
            f"got {type(value).__name__}"
        )
    base, *options = value.split(":")
    scheme = schemes.parse(":".join([base, *(o for o in options if o not in _OPTIONS)]))
    config = QuantizationConfig.of(scheme)
    for option in options:
        config = dataclasses.replace(config, **_OPTIONS.get(option, {}))
    return config
