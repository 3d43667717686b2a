"""Our models as lm-evaluation-harness wants them; importing this adds them to its list, as `jaxint8`.

The surprising fact: it is a module of its own because the harness is optional, and a base class cannot be imported
late.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jaxint8.cli import zeroshot as ours
from jaxint8.evaluation import zeroshot
from jaxint8.models import load
from jaxint8.models.generate import generate_tokens
from jaxint8.models.sampling import Sampling


@register_model("jaxint8")
class JaxInt8LM(TemplateLM):
    """A model of `jaxint8.models` as the harness wants one."""

    backend = "causal"

    def __init__(
        self,
        pretrained: str = "demo",
        quantization: str = "llm_int8",
        dtype: str | None = None,
        batch_tokens: int = 1024,
        **ignored: Any,
    ) -> None:
        """Loads the model.

        Args:
          pretrained: as `source` of `jaxint8.models.load`.
          quantization: a method by name, "float32" and "bfloat16" included, options too ("topk:kv_int8").
          dtype: as for `load`.
          batch_tokens: most tokens of a batch, padding included.
          ignored: the harness's batch_size and device, which JAX has no use for.
        """
        super().__init__()
        del ignored
        self._model = load(pretrained, quantization=quantization, dtype=dtype)
        self._batch_tokens = int(batch_tokens)
        if self._model.tokenizer is None:
            raise ValueError(f"pretrained: {pretrained} comes without a tokenizer")
        self._tokenizer = self._model.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text; it also stands before one that has no context."""
        config = self._model.config
        return config.end_tokens[0] if config.end_tokens else config.start_token or 0

    @property
    def prefix_token_id(self) -> int:
        """What the first token of a text is predicted from."""
        start = self._model.config.start_token
        return self.eot_token_id if start is None else start

    @property
    def tokenizer_name(self) -> str:
        """What the harness calls its caches by."""
        return self._model.config.family

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **ignored: Any
    ) -> list[int]:
        """Token ids, without special ones unless they are asked for."""
        del ignored
        return self._tokenizer.encode(string, add_special_tokens=bool(add_special_tokens))

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **ignored: Any,
    ) -> list[tuple[float, bool]]:
        del disable_tqdm, ignored
        longest = self._model.config.max_positions
        asked = [
            zeroshot.Request(tuple(context[-(longest + 1 - len(ids)) :]), tuple(ids))
            for _, context, ids in requests
        ]
        answers = zeroshot.score(
            functools.partial(ours.padded_logits, self._model),
            asked,
            batch_tokens=self._batch_tokens,
        )
        found = [(answer.logprob, answer.greedy) for answer in answers]
        for (pair, *_), answer in zip(requests, found, strict=True):
            if pair is not None:
                self.cache_hook.add_partial("loglikelihood", pair, answer)
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of whole texts, window by window."""
        del disable_tqdm
        sums = []
        for request in requests:
            texts: Any = request.args
            (text,) = texts
            windows = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self._model.config.max_positions, 1
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            sums.append(float(np.sum([p for p, _ in self._loglikelihood_tokens(pairs)])))
        return sums

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues contexts, each up to the first of its stop texts."""
        del disable_tqdm
        texts = []
        for request in requests:
            arguments: Any = request.args  # (context, options)
            context, options = arguments
            new = int(options.get("max_gen_toks", 256))
            stops = options.get("until") or []
            stops = [stops] if isinstance(stops, str) else list(stops)
            sampling = Sampling(
                float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0,
                options.get("top_k"),
                options.get("top_p"),
            )
            room = self._model.config.max_positions - new
            if room < 1:
                raise ValueError(f"max_gen_toks: {new} leaves no room for a context")
            ids = self.tok_encode(context)[-room:] or [self.prefix_token_id]
            (row,) = generate_tokens(
                self._model.config,
                self._model.params,
                [ids],
                new,
                quantization=self._model.quantization,
                sampling=sampling,
                seed=0,
            )
            text = self._tokenizer.decode(row)
            ends = [text.find(stop) for stop in stops if stop and stop in text]
            texts.append(text[: min(ends, default=len(text))])
        return texts
