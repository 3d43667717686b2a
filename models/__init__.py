"""Whole language models in int8: checkpoints in, text and logits out.

`load` reads a Hugging Face, GGUF or bitsandbytes checkpoint and converts it while it is read; the surprising fact is
that there is one decoder for all of them, and a family is only a config and a map of names.
"""

from jaxint8.models.config import DecoderConfig as DecoderConfig
from jaxint8.models.config import QuantizationConfig as QuantizationConfig
from jaxint8.models.language_model import LanguageModel as LanguageModel
from jaxint8.models.loading import load as load
