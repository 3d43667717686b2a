"""Evaluation of any model that is a function from tokens to logits: perplexity, texts and reports.

Nothing in here knows a model family or loads a checkpoint: `perplexity.score` takes a callable
`tokens int32[b, t] -> float[b, t, vocab]`, so it serves other people's models as well as ours.
"""
