"""Makes tokenizers/: tiny tokenizers and the ids that their original libraries give.

Not run by the tests. Needs sentencepiece, tokenizers and transformers: ``python
tests/goldens/make_tokenizers.py``. Last run with sentencepiece 0.2.3, tokenizers 0.23.3 and
transformers 5.23.0. Writes sentencepiece.json (a BPE model with byte fallback, as the GGUF kind
"llama" holds it), byte_level.json (a byte-level BPE vocabulary, and its ids under the cutting rules
of GPT-2, SmolLM2 and Llama 3), and gpt2_files/ (the same as vocab.json and merges.txt, with OPT's
start token).
"""

import io
import json
import pathlib

import sentencepiece
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import TikTokenConverter

HERE = pathlib.Path(__file__).parent / "tokenizers"
WORDS = (
    "the quick brown fox jumps over a lazy dog and then it's 1984 or 2001, isn't it? We'll see; "
    "they've said I'd better go on going through those other things that they themselves thought. "
)
TRAINING = [
    "in 1984 and 2024 and 20245 " * 30,
    WORDS * 3,
    WORDS.upper(),
    WORDS.title(),
    "größer naïve café 漢字 かな\n\n\tline one\r\nline",
]
TEXTS = [
    "",
    " ",
    "the fox",
    " the  fox   ",
    "It's 20245 dogs, they'VE said: 3.14159!",
    "naïve café, 漢字\N{SNOWMAN} \N{PARTY POPPER}\N{ZERO WIDTH JOINER}!",
    "line one\n\n\n  line two\r\n\tend \n",
    "a\N{NO-BREAK SPACE}b \N{ARABIC-INDIC DIGIT FOUR}\N{ROMAN NUMERAL TWELVE}²",
]


def dump(name: str, value: object) -> None:
    (HERE / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def sentencepiece_case() -> None:
    blob = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TRAINING for line in text.splitlines()]),
        model_writer=blob,
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=blob.getvalue())
    size = model.get_piece_size()
    kinds = [
        2 * model.is_unknown(i) or 3 * model.is_control(i) or 6 * model.is_byte(i) or 1
        for i in range(size)
    ]
    dump(
        "sentencepiece.json",
        {
            "tokens": [model.id_to_piece(i) for i in range(size)],
            "scores": [model.get_score(i) for i in range(size)],
            "types": kinds,
            "bos": model.bos_id(),
            "eos": model.eos_id(),
            "cases": [
                [text, model.encode(text), model.decode(model.encode(text))] for text in TEXTS
            ],
        },
    )


def byte_level_case() -> None:
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=["</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(TRAINING, trainer)
    state = json.loads(trained.to_str())["model"]
    vocab, merges = state["vocab"], [tuple(pair) for pair in state["merges"]]

    def ids(cut: pre_tokenizers.PreTokenizer, **options: bool) -> list[list[int]]:
        backend = tokenizers.Tokenizer(models.BPE(vocab, merges, **options))
        backend.pre_tokenizer = cut
        backend.decoder = decoders.ByteLevel()
        return [backend.encode(text).ids for text in TEXTS]

    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # As in SmolLM2's own tokenizer.json; and with the pattern that transformers has for Llama 3.
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    llama3 = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(TikTokenConverter().pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    dump(
        "byte_level.json",
        {
            "tokens": sorted(vocab, key=vocab.__getitem__),
            "merges": [" ".join(pair) for pair in merges],
            "texts": TEXTS,
            "ids": {
                "gpt-2": ids(whole),
                "smollm": ids(digits),
                "llama-bpe": ids(llama3, ignore_merges=True),
            },
        },
    )
    folder = HERE / "gpt2_files"
    folder.mkdir(exist_ok=True)
    trained.model.save(str(folder))
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_bos_token": True,
        "add_prefix_space": False,
        "bos_token": {"content": "</s>", "__type": "AddedToken"},
        "eos_token": "</s>",
        "unk_token": "</s>",
        "pad_token": "<pad>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    slow = transformers.GPT2Tokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        bos_token="</s>",
        eos_token="</s>",
        unk_token="</s>",
        pad_token="<pad>",
    )
    special = [*TEXTS, "one</s>two <pad>"]
    golden = [[text, slow.encode(text, add_special_tokens=False)] for text in special]
    (folder / "golden.json").write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    sentencepiece_case()
    byte_level_case()
