"""Every way of multiplying in int8 that the paper compares (section 2, Table 1), as values of one type.

A `Scheme` says how numbers become codes, how many share a constant, and what happens to outliers;
`jaxint8.scheme_linear` carries it out. The surprising fact: five of the eight int8 rows of Table 1 differ from
LLM.int8() only in the outlier rule or in the scales of the weights, so they run on the same compiled kernels.
"""

import dataclasses
from typing import Any, Literal

from jaxint8.outliers import OutlierRule, RelativeThreshold, Threshold, TopK, as_rule
from jaxint8.quantize import Arithmetic


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a linear layer is carried out in int8; the default is LLM.int8() as its authors released it.

    Attributes:
      outliers: which activation values leave the 8-bit range; a number means Threshold(number), None that none does.
      outlier_arithmetic: "float" (the paper) or "int15" (see `int8_linear`); None is the library's choice.
      outlier_weights: what outliers are multiplied with: the dequantised codes ("int8", as in the released code), or
        the weights before quantisation ("float", equation (8) of the paper; they are kept beside the codes).
      numbers: symmetric about 0 ("absmax"), or over [min, max] with an offset ("zeropoint", section 2.1).
      activations: one constant per row, one for all rows of a call ("tensor"), or no quantisation at all ("float").
      weights: one constant per output channel (a row of the codes), or one per matrix of the checkpoint ("tensor").
    """

    outliers: OutlierRule | float | None = 6.0
    outlier_arithmetic: Arithmetic | None = None
    outlier_weights: Literal["int8", "float"] = "int8"
    numbers: Literal["absmax", "zeropoint"] = "absmax"
    activations: Literal["row", "tensor", "float"] = "row"
    weights: Literal["row", "tensor"] = "row"

    def __post_init__(self) -> None:
        """Checks the choices, alone and together, and turns a number into the rule that it means."""
        object.__setattr__(self, "outliers", as_rule(self.outliers))
        self._one_of("outlier_arithmetic", None, "float", "int15")
        self._one_of("outlier_weights", "int8", "float")
        self._one_of("numbers", "absmax", "zeropoint")
        self._one_of("activations", "row", "tensor", "float")
        self._one_of("weights", "row", "tensor")
        if self.activations != "row" and self.outliers is not None:
            raise ValueError(
                f'quantization: activations="{self.activations}" has no outlier decomposition; '
                f"outliers must be None, got {self.outliers!r}"
            )
        if self.outlier_weights == "float" and self.outliers is None:
            raise ValueError('quantization: outlier_weights="float" needs a rule for outliers')
        if self.outlier_arithmetic == "int15" and "int15" not in self._arithmetics():
            raise ValueError(
                'quantization: outlier_arithmetic="int15" goes with absmax and int8 weights of '
                f"outliers, got numbers={self.numbers!r}, outlier_weights={self.outlier_weights!r}"
            )

    def _one_of(self, name: str, *known: str | None) -> None:
        value = getattr(self, name)
        if value not in known:
            raise ValueError(
                f"quantization: {name} must be one of {', '.join(map(repr, known))}, got {value!r}"
            )

    def _arithmetics(self) -> tuple[Arithmetic, ...]:
        symmetric = self.numbers == "absmax" and self.outlier_weights == "int8"
        return ("float", "int15") if symmetric else ("float",)

    @property
    def native(self) -> bool:
        """Whether `int8_linear`, and so a compiled kernel, carries it out."""
        return self.activations == "row" and "int15" in self._arithmetics()

    @property
    def stored(self) -> tuple[str, ...]:
        """Equal for schemes whose weights are stored alike, and can be shared."""
        return self.weights, self.numbers, self.outlier_weights


SCHEMES: dict[str, Scheme] = {
    "absmax": Scheme(outliers=None, activations="tensor", weights="tensor"),
    "zeropoint": Scheme(outliers=None, numbers="zeropoint", activations="tensor", weights="tensor"),
    "rowwise": Scheme(outliers=None, weights="tensor"),
    "vectorwise": Scheme(outliers=None),
    "zeropoint_vectorwise": Scheme(outliers=None, numbers="zeropoint"),
    "rowwise_decomposed": Scheme(outliers=Threshold(6.0), weights="tensor"),
    "llm_int8": Scheme(outliers=Threshold(6.0)),
    "llm_int8_zeropoint": Scheme(outliers=Threshold(6.0), numbers="zeropoint"),
    "weights_only": Scheme(outliers=None, activations="float"),
    "relative": Scheme(outliers=RelativeThreshold(6.0)),
    "topk": Scheme(outliers=TopK(8)),
}
"""The int8 rows of Table 1 in its order, then int8 weights alone, and the rules that came after the paper."""

_OPTIONS: dict[str, dict[str, Any]] = {
    "float": {"outlier_arithmetic": "float"},
    "int15": {"outlier_arithmetic": "int15"},
    "float_weights": {"outlier_weights": "float"},
}
# What options say that are no numbers.
_KINDS = {"token": "scope", "column": "scope", "float": "arithmetic", "int15": "arithmetic"} | {
    "float_weights": "kind of outlier weights"
}


def parse(name: str) -> Scheme:
    """Returns the scheme that a name means: one of `SCHEMES`, and options after colons.

    Options: a number (the threshold, or k of topk), "token" or "column" (the scope), "float" or "int15" (the
    arithmetic of outliers), "float_weights" (outliers times the weights before quantisation): "relative:8:column",
    "topk:16", "llm_int8:float_weights".

    Raises:
      ValueError: a name or an option that is not known, comes twice, or does not go with the scheme.
    """
    base, *options = name.split(":")
    if base not in SCHEMES:
        raise ValueError(f"quantization: {name!r} is not one of {', '.join(SCHEMES)}")
    scheme = SCHEMES[base]
    said: dict[str, str] = {}
    for option in options:
        what = _KINDS.get(option, "number")
        if what in said:
            raise ValueError(
                f"quantization: {name!r}: expected one {what}, got {said[what]!r} and {option!r}"
            )
        said[what] = option
        try:
            if option in _OPTIONS:
                scheme = dataclasses.replace(scheme, **_OPTIONS[option])
            else:
                scheme = dataclasses.replace(scheme, outliers=_changed(scheme.outliers, option))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"quantization: {name!r}: option {option!r} does not go with {base} ({error})"
            ) from None
    return scheme


def _changed(rule: Any, option: str) -> OutlierRule:
    """The rule with another scope, or another number."""
    if rule is None:
        raise ValueError("it has no outliers")
    if isinstance(rule, TopK):
        if not option.isdecimal():
            raise ValueError("it takes a whole number")
        return TopK(int(option))
    if option in ("token", "column"):
        return dataclasses.replace(rule, scope=option)
    return dataclasses.replace(rule, value=float(option))
