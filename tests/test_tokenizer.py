"""Tokenizers against the ids that their original libraries give (goldens/make_tokenizers.py)."""

import json
import shutil
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import tokenizers

from jaxint8 import download
from jaxint8.checkpoint import CheckpointError, open_checkpoint
from jaxint8.models.tokenizer import Tokenizer

GOLDENS = Path(__file__).parent / "goldens" / "tokenizers"
BYTE_LEVEL = json.loads((GOLDENS / "byte_level.json").read_text())
SENTENCEPIECE = json.loads((GOLDENS / "sentencepiece.json").read_text())


def gguf(**values: Any) -> dict[str, Any]:
    return {f"tokenizer.ggml.{name}": value for name, value in values.items()}


def byte_level(**values: Any) -> dict[str, Any]:
    tokens = BYTE_LEVEL["tokens"]
    given = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "merges": BYTE_LEVEL["merges"],
        "token_type": [3 if token in ("</s>", "<pad>") else 1 for token in tokens],
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return gguf(**{k: v for k, v in (given | values).items() if v is not None})


def sentencepiece(**values: Any) -> dict[str, Any]:
    given = {
        "model": "llama",
        "tokens": SENTENCEPIECE["tokens"],
        "scores": SENTENCEPIECE["scores"],
        "token_type": SENTENCEPIECE["types"],
        "bos_token_id": SENTENCEPIECE["bos"],
        "eos_token_id": SENTENCEPIECE["eos"],
    }
    return gguf(**given | values)


@pytest.mark.parametrize("pre", BYTE_LEVEL["ids"])
def test_byte_level_cuts_text_as_the_originals_do(pre: str) -> None:
    tokenizer = Tokenizer.from_gguf(byte_level(pre=pre))
    for text, ids in zip(BYTE_LEVEL["texts"], BYTE_LEVEL["ids"][pre], strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.decode(ids) == text


def test_the_cutting_rules_differ() -> None:
    ids = BYTE_LEVEL["ids"]
    assert ids["gpt-2"] != ids["smollm"] != ids["llama-bpe"] != ids["gpt-2"]


def test_sentencepiece_with_byte_fallback() -> None:
    tokenizer = Tokenizer.from_gguf(sentencepiece())
    for text, ids, decoded in SENTENCEPIECE["cases"]:
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.encode(text) == [1, *ids]  # this kind starts texts unless told not to
        assert tokenizer.decode(ids) == decoded == text
    assert (tokenizer.start_token, tokenizer.end_tokens) == (1, (2,))
    bare = Tokenizer.from_gguf(sentencepiece(add_space_prefix=False, add_bos_token=False))
    assert bare.encode("the fox") != tokenizer.encode("the fox", add_special_tokens=False)
    assert bare.decode(bare.encode("the fox")) == "the fox"


def test_start_and_end_tokens() -> None:
    plain = Tokenizer.from_gguf(byte_level())
    assert plain.encode("fox") == plain.encode("fox", add_special_tokens=False)
    both = Tokenizer.from_gguf(byte_level(add_bos_token=True, add_eos_token=True))
    fox = plain.encode("fox")
    assert both.encode("fox") == [0, *fox, 0]
    assert both.encode_batch(["fox", ""]) == [[0, *fox, 0], [0, 0]]
    assert both.encode("fox", add_special_tokens=False) == fox
    assert both.decode([0, *fox, 0]) == "fox"
    assert both.decode([0, *fox, 0], skip_special_tokens=False) == "</s>fox</s>"
    assert both.decode_batch([fox, [0]]) == ["fox", ""]
    assert both.encode("fox<pad>", add_special_tokens=False) == [*fox, 1]
    eot = Tokenizer.from_gguf(byte_level(eot_token_id=1))
    assert (eot.start_token, eot.end_tokens, eot.vocab_size) == (0, (0, 1), 480)


def test_gpt2_files_as_opt_has_them() -> None:
    folder = GOLDENS / "gpt2_files"
    tokenizer = Tokenizer.from_directory(folder)
    for text, ids in json.loads((folder / "golden.json").read_text()):
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.encode(text) == [0, *ids]
    assert (tokenizer.start_token, tokenizer.end_tokens) == (0, (0,))


def test_saved_tokenizers_read_back(tmp_path: Path) -> None:
    for metadata in (byte_level(pre="smollm", add_bos_token=True), sentencepiece()):
        tokenizer = Tokenizer.from_gguf(metadata)
        tokenizer.save(tmp_path)
        assert {p.name for p in tmp_path.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
        again = Tokenizer.from_directory(tmp_path)
        for text in BYTE_LEVEL["texts"]:
            assert again.encode(text) == tokenizer.encode(text)
        assert again.start_token == tokenizer.start_token
        assert again.end_tokens == tokenizer.end_tokens


def test_truncation_stored_in_a_file_is_ignored(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(Tokenizer.from_gguf(byte_level())._backend.to_str())
    backend.enable_truncation(2)
    backend.enable_padding(length=99)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "the quick brown fox"
    whole = Tokenizer.from_gguf(byte_level()).encode(text)
    assert Tokenizer.from_directory(tmp_path).encode(text) == whole


@hypothesis.given(st.lists(st.integers(0, 479), max_size=40))
def test_streaming_byte_level_is_decoding(ids: list[int]) -> None:
    tokenizer = _BYTES
    assert "".join(tokenizer.decode_stream(ids)) == tokenizer.decode(ids)


# SentencePiece writes a space as U+2581: one in the text comes back as a space.
@hypothesis.given(st.text(st.characters(codec="utf-8", exclude_characters="\u2581"), max_size=30))
def test_streaming_text_is_decoding(text: str) -> None:
    for tokenizer in (_BYTES, _PIECES):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        pieces = list(tokenizer.decode_stream(ids))
        assert "".join(pieces) == text
        assert all(pieces)


_BYTES = Tokenizer.from_gguf(byte_level())
_PIECES = Tokenizer.from_gguf(sentencepiece())


def test_streaming_holds_a_character_back_until_it_is_whole() -> None:
    ids = _BYTES.encode("漢!")
    assert len(ids) == 4
    assert list(_BYTES.decode_stream(ids)) == ["漢", "!"]
    assert list(_BYTES.decode_stream(ids[:2])) == ["\N{REPLACEMENT CHARACTER}"]
    assert list(_BYTES.decode_stream([])) == []


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "metadata 'tokenizer.ggml.model' is missing"),
        (byte_level(pre="other"), "tokenizer.ggml.pre 'other' is not supported; known: gpt-2, "),
        (byte_level(pre=None), "metadata 'tokenizer.ggml.pre' is missing"),
        (byte_level(merges=None), "metadata 'tokenizer.ggml.merges' is missing"),
        (byte_level(merges=["ab"]), "'ab' is not a pair"),
        (byte_level(merges=["漢 字"]), "'漢 字' is not a pair of tokens that make one"),
        (
            byte_level(tokens=["a", "b"], token_type=None, merges=["a b"]),
            "'a b' is not a pair of tokens that make one",
        ),
        (byte_level(merges="a b"), "merges: expected an array of str, got 'a b'"),
        (byte_level(tokens="abc"), "tokens: expected an array of str, got 'abc'"),
        (byte_level(tokens=[1, 2]), r"tokens: expected an array of str, got \[1, 2\]"),
        (byte_level(token_type=1), "token_type: expected an array of int, got 1"),
        (byte_level(pre=["gpt-2"]), r"tokenizer.ggml.pre \['gpt-2'\] is not supported"),
        (byte_level(eos_token_id="0"), "eos_token_id '0' of 480 tokens"),
        (sentencepiece(scores="abc"), "scores: expected an array of float or int, got 'abc'"),
        (byte_level(model="t5"), "tokenizer.ggml.model 't5' is not supported; known: gpt2, llama"),
        (byte_level(token_type=[1]), "480 tokens but 1 token types"),
        (byte_level(tokens=["a", "a"], token_type=[1, 1]), "holds a token twice"),
        (byte_level(eos_token_id=480), "eos_token_id 480 of 480 tokens"),
        (sentencepiece(scores=[0.5]), "480 tokens but 1 scores"),
    ],
)
def test_broken_metadata_are_named(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^a.gguf: .*{message}"):
        Tokenizer.from_gguf(metadata, "a.gguf")


def test_broken_directories_are_named(tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as caught:
            Tokenizer.from_directory(tmp_path)
        assert "\n" not in str(caught.value)

    refused("holds no tokenizer.json, and no vocab.json with merges.txt$")
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    refused(r"\(tokenizer.model alone is not enough\)")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(GOLDENS / "gpt2_files" / name, tmp_path)
    assert Tokenizer.from_directory(tmp_path).end_tokens == ()
    (tmp_path / "merges.txt").write_text("漢 字\n")
    refused("vocab.json and merges.txt ")
    # The library panics, which is no Exception.
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "merges.txt").write_text("a b\n")
    refused("vocab.json and merges.txt ")
    (tmp_path / "tokenizer.json").write_text("{}")
    refused("tokenizer.json: not a tokenizer")
    (tmp_path / "tokenizer_config.json").write_text("[1, 2]")
    refused("tokenizer_config.json: expected a JSON object, got list")
    (tmp_path / "tokenizer_config.json").write_text("{")
    refused("tokenizer_config.json: not JSON")
    (tmp_path / "tokenizer_config.json").write_text("[" * 200_000)
    refused("tokenizer_config.json: not JSON")
    for odd in ("5", '{"content": 5}', '["a"]'):
        (tmp_path / "tokenizer_config.json").write_text(f'{{"bos_token": {odd}}}')
        refused("tokenizer_config.json: 'bos_token': expected a token's text, got ")


def test_interrupting_the_library_is_no_error_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")

    def interrupted(path: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizers.Tokenizer, "from_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Tokenizer.from_directory(tmp_path)


def test_text_is_checked() -> None:
    with pytest.raises(ValueError, match="text: not Unicode .a lone surrogate at 1"):
        _BYTES.encode("a\ud800")
    with pytest.raises(TypeError, match="text: expected a string, got list"):
        _BYTES.encode(["a"])  # pyright: ignore[reportArgumentType]


@pytest.mark.demo
def test_the_demo_text_has_the_tokens_that_llama_cpp_counts() -> None:
    reader = open_checkpoint(download.demo_model_path())
    tokenizer = Tokenizer.from_gguf(reader.metadata, reader.path)
    text = "\n\n".join(path.read_text("utf-8") for path in download.demo_text_files())
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == 21_048
    assert ids[:4] == [75, 1653, 8753, 281]
    assert sum(ids[:8192]) == 32_090_171
    assert tokenizer.decode(ids) == text == "".join(tokenizer.decode_stream(ids))
