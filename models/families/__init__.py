"""The families known here, found by what a checkpoint says of itself.

To add one: write ``families/<name>.py`` with a ``FAMILY`` and list it below. Nothing else in the
package knows any family by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxint8.models.families.base import Family as Family
from jaxint8.models.families.base import Part as Part
from jaxint8.models.families.base import Path as Path
from jaxint8.models.families.base import Source as Source
from jaxint8.models.families.base import WeightMap as WeightMap
from jaxint8.models.families.bloom import FAMILY as _bloom
from jaxint8.models.families.llama import FAMILY as _llama
from jaxint8.models.families.opt import FAMILY as _opt

FAMILIES: tuple[Family, ...] = (_llama, _opt, _bloom)


def family_from_hf(config: Mapping[str, Any]) -> Family:
    """Finds the family of a Hugging Face ``config.json``.

    Args:
        config: the parsed file; "architectures" decides, and "model_type" where that is missing.

    Raises:
        ValueError: no known family; the message names the architecture and lists the known ones. Or
            "architectures" is no list.

    """
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list):
        raise ValueError(f"'architectures': expected a list of names, got {architectures!r}")
    for family in FAMILIES:
        if any(name in family.architectures for name in architectures):
            return family
        if not architectures and config.get("model_type") == family.model_type:
            return family
    found = ", ".join(map(str, architectures)) or config.get("model_type") or "none given"
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise ValueError(f"unknown model architecture {found}; known: {known}")


def family_from_gguf(metadata: Mapping[str, Any]) -> Family:
    """Finds the family of a GGUF file by its "general.architecture".

    Raises:
        ValueError: no known family; the message names the architecture and lists the known ones.

    """
    found = metadata.get("general.architecture")
    for family in FAMILIES:
        if family.gguf_architecture is not None and family.gguf_architecture == found:
            return family
    known = ", ".join(f.gguf_architecture for f in FAMILIES if f.gguf_architecture is not None)
    raise ValueError(f"unknown GGUF architecture {found}; known: {known}")
