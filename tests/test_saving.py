"""Saving: what is loaded again is the same to the bit, and the layout is that of bitsandbytes."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxint8 import TopK
from jaxint8.checkpoint import open_checkpoint
from jaxint8.models import saving
from jaxint8.models.config import DecoderConfig, QuantizationConfig
from jaxint8.models.language_model import LanguageModel
from jaxint8.models.loading import load
from jaxint8.models.tokenizer import Tokenizer

GOLDENS = Path(__file__).parent / "goldens"
CASES = sorted(path.parent.name for path in GOLDENS.glob("*/golden.npz"))


def assert_same(one: LanguageModel, other: LanguageModel) -> None:
    assert one.config == other.config
    assert jax.tree.structure(one.params) == jax.tree.structure(other.params)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["float32", "bfloat16", "llm_int8", "absmax"])
def test_saved_models_load_as_they_were(tmp_path: Path, case: str, method: str) -> None:
    model = load(GOLDENS / case, quantization=method)
    model.save(tmp_path / "new")
    assert_same(load(tmp_path / "new", quantization=method), model)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {
        "SHA256SUMS",
        "config.json",
        "model.safetensors",
    }
    saving.save(model, tmp_path / "new", shard_bytes=20_000)  # over the first, in pieces
    assert_same(load(tmp_path / "new", quantization=method), model)
    assert not (tmp_path / "new" / "model.safetensors").exists()


def test_what_belongs_to_a_run_is_not_saved(tmp_path: Path) -> None:
    models = [load(GOLDENS / "llama_mha", quantization=q) for q in ("topk", "topk:kv_int8")]
    for model, name in zip(models, ("plain", "cache"), strict=True):
        model.save(tmp_path / name)
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("plain", "cache")
    ]
    assert files[0] == files[1]
    for name in ("topk", "topk:kv_int8"):
        again = load(tmp_path / "cache", quantization=name)
        assert again.quantization == QuantizationConfig(
            outliers=TopK(8), kv_cache="int8" if "kv_int8" in name else "float"
        )
        assert_same(again, models[0])


def test_the_layout_is_that_of_bitsandbytes(tmp_path: Path) -> None:
    stored = open_checkpoint(GOLDENS / "llama_gqa_tied")
    load(GOLDENS / "llama_gqa_tied").save(tmp_path)
    reader = open_checkpoint(tmp_path)
    linear = [name for name in stored.names() if name.endswith("_proj.weight")]
    extra = [name.removesuffix("weight") + x for name in linear for x in ("SCB", "weight_format")]
    assert sorted(reader.names()) == sorted(stored.names() + extra)
    for name in linear:
        # Written out from bitsandbytes' definition: SCB is the absmax of a row, codes are
        # 127 * weight / SCB.
        weight = stored.read(name)
        absmax = reader.read(name.removesuffix("weight") + "SCB")
        np.testing.assert_allclose(absmax, np.abs(weight).max(axis=1), rtol=2**-23)
        codes = np.rint(127 * weight.astype(np.float64) / absmax[:, None])
        assert np.abs(codes - reader.read(name)).max() <= 1  # a tie may fall either way
        assert (codes != reader.read(name)).mean() < 0.01
        assert reader.dtype(name) == np.int8
        assert reader.read(name.removesuffix("weight") + "weight_format") == 0
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["quantization_config"] == {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": ["lm_head"],
    }


def test_the_tokenizer_is_saved(tmp_path: Path) -> None:
    model = load(GOLDENS / "opt_pre_norm")
    model.tokenizer = Tokenizer.from_directory(GOLDENS / "tokenizers" / "gpt2_files")
    model.save(tmp_path)
    again = load(tmp_path).tokenizer
    assert again is not None
    assert again.encode("it's 1984") == model.tokenizer.encode("it's 1984")


def test_a_model_that_cannot_be_written_writes_nothing(tmp_path: Path) -> None:
    model = load(GOLDENS / "llama_mha")
    config = DecoderConfig(**{**vars(model.config), "rope_factors": True})
    with pytest.raises(ValueError, match="no place in config.json"):
        LanguageModel(config, model.params).save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.demo
def test_the_demo_model_survives_saving(tmp_path: Path) -> None:
    model = load("demo")
    model.save(tmp_path)
    again = load(tmp_path)
    assert_same(again, model)
    assert again.tokenizer is not None
    text = "In 1961 and 20245,\n\nthe café"
    assert model.tokenizer is not None
    assert again.tokenizer.encode(text) == model.tokenizer.encode(text)
