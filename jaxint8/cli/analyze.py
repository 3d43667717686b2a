"""Looks for outlier features in a model as section 4 of the LLM.int8() paper does, and at what they do.

  jaxint8-analyze --model=demo --output=DIR            Table 4, ablation, signal over noise, plots
  jaxint8-analyze --inject=16 --output=DIR             saves a model of the same function with injected outliers

The paper's outliers appear at 6.7B parameters. --inject gives a small model hidden states like theirs, by scaling norm
weights up and the columns that read them down; the float function stays the same to the bit. Use the saved model with
jaxint8-eval --model=DIR.
"""

import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import Progress

from jaxint8.cli import app, measure, methods, screen
from jaxint8.evaluation import analysis, datasets, features, perplexity, report, snr
from jaxint8.evaluation.files import write_atomically
from jaxint8.evaluation.outliers import Activations
from jaxint8.models import LanguageModel, load, probe
from jaxint8.models.observe import linear_inputs

SCREEN = Console(stderr=True, highlight=False)
# Random dimensions of the control, the same at every run.
SEED = 0
# What is looked at besides counts costs a multiple of a forward pass, and varies little.
MOST_CALLS = 4


def main(argv: Sequence[str] | None = None) -> int:
    """The console script; returns the exit status."""
    return app.launch(__doc__ or "", define_flags, run, argv)


def define_flags(values: flags.FlagValues) -> None:
    """Adds the command's flags to `values`."""
    flags.DEFINE_string("model", "demo", "A checkpoint, or demo.", flag_values=values)
    flags.DEFINE_string(
        "text",
        "demo",
        "A .txt or .jsonl file, demo or pydoc (see jaxint8-eval).",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "max_tokens", 8192, "Tokens read of the text.", lower_bound=2, flag_values=values
    )
    flags.DEFINE_integer("window", 512, "Tokens per window.", lower_bound=2, flag_values=values)
    flags.DEFINE_float("threshold", 6.0, "Magnitude of an outlier.", flag_values=values)
    flags.DEFINE_list(
        "sites",
        ["qkv", "out", "up"],
        "Linear layers of a block whose inputs count; the paper's by default.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "methods",
        ["vectorwise", "zeropoint_vectorwise", "llm_int8", "relative", "topk"],
        "Int8 methods of the signal-to-noise plot, named as for jaxint8-eval, without :kv_int8.",
        flag_values=values,
    )
    flags.DEFINE_string("output", None, "Folder for the report and plots.", flag_values=values)
    flags.DEFINE_float(
        "inject", None, "Instead: factor (a power of two) of injected outliers.", flag_values=values
    )
    flags.DEFINE_integer(
        "inject_dimensions",
        6,
        "Dimensions that get outliers; six have them in the paper's 6.7B model.",
        lower_bound=1,
        flag_values=values,
    )


def run(options: app.Options) -> None:
    """Analyses or injects, as the flags say."""
    output = options["output"]
    with app.input_errors():
        if options["inject"] is not None:
            _check_inject(options["inject"], output)
        if not 0 < options["threshold"] < math.inf:
            raise ValueError(f"threshold: expected a positive number, got {options['threshold']}")
        names = methods.parse_methods(options["methods"])
        schemes = {name: methods.method(name).quantization for name in names}
        for name, scheme in schemes.items():
            if scheme is None:
                raise ValueError(f"methods: expected int8 methods, got {name!r}")
            if scheme.kv_cache != "float":
                raise ValueError(
                    f"methods: expected no kv_int8, as a cache changes no layer's product, got {name!r}"
                )
        text = None if options["inject"] is not None else datasets.load_text(options["text"])
        if output is not None:
            app.make_folder("output", output)
        model = load(options["model"], quantization=None, dtype=np.float32)
    if text is None:
        _inject(model, options)
        return
    with app.input_errors():
        tokens = measure.text_tokens(model, text.text, options)
        result = _analyse(model, tokens, text.name, schemes, options)
    Console(highlight=False, soft_wrap=True).print(
        "\n".join(
            line for line in analysis.to_markdown(result).splitlines()[:-1] if line[:2] != "- "
        )
    )
    if output is not None:
        with app.input_errors():
            written = analysis.write(result, output)
        SCREEN.print("wrote " + ", ".join(map(str, written)), soft_wrap=True)
        screen.say_if_no_plots(SCREEN)


def _check_inject(factor: float, output: str | None) -> None:
    """Refuses what cannot be injected or written before a model is loaded, which may take minutes."""
    mantissa, exponent = math.frexp(factor)
    if mantissa != 0.5 or not -125 <= exponent <= 128:  # a normal number of float32
        raise ValueError(f"inject: expected a power of two, got {factor:g}")
    if output is None:
        raise ValueError("output: expected a folder to save the model with injected outliers")
    app.refuse_model("output", output)


def _analyse(
    model: LanguageModel, tokens: np.ndarray, text: str, schemes: dict, options: app.Options
) -> analysis.Analysis:
    calls = perplexity.cut(tokens, options["window"], 1)
    activations: Activations = functools.partial(linear_inputs, model.config, model.params)
    threshold = options["threshold"]
    with Progress(console=SCREEN, transient=True, disable=not SCREEN.is_terminal) as bars:
        states = _step(
            bars,
            "counting outliers",
            sum(call.size for call in calls),
            lambda show: features.count(activations, calls, threshold, show),
        )
        groups = {", ".join(options["sites"]): list(options["sites"])}
        groups |= {site: [site] for site in dict.fromkeys(s.site for s in states.values())}
        chosen = {label: features.select(states, sites) for label, sites in groups.items()}
        found = {label: features.features(of_group) for label, of_group in chosen.items()}
        kept = sorted({f[0].dimension for f in found.values() if f})
        few = calls[:: -(-len(calls) // MOST_CALLS)]
        values = features.values(activations, few, list(states), kept)
        main = next(iter(found.values()))
        ablations = _step(
            bars,
            "ablating",
            len(few) * 3 * 2,
            lambda show: _ablations(model, few, main, activations, show),
        )
        noise = _step(
            bars,
            "comparing products",
            1,
            lambda show: snr.signal_to_noise(activations, few[:2], _weights(model), schemes),
        )
    summaries = [
        _summary(label, found[label], chosen[label], values, kept, threshold) for label in groups
    ]
    most_common = {s.sites: s.dimension for s in summaries}
    return analysis.Analysis(
        model=options["model"],
        text=text,
        tokens=int(sum(call.size for call in calls)),
        threshold=threshold,
        summaries=summaries,
        features=[f for f in main if features.is_feature(f)],
        ablations=ablations,
        states=list(states.values()),
        magnitudes={
            name: None
            if (dimension := most_common[state.site]) is None
            else _quartiles(np.abs(values[name][:, kept.index(dimension)]))
            for name, state in states.items()
        },
        snr=noise,
        environment=report.environment(command=options["command"], window=options["window"]),
    )


def _step[R](bars: Progress, what: str, total: int, work: Callable[[Callable], R]) -> R:
    task = bars.add_task(what, total=total)
    result = work(lambda done, of=None: bars.update(task, completed=done))
    bars.remove_task(task)
    return result


def _summary(
    label: str,
    found: list[features.Feature],
    states: list[features.State],
    values: dict[str, np.ndarray],
    kept: list[int],
    threshold: float,
) -> analysis.Summary:
    counted = [f for f in found if features.is_feature(f)]
    first = found[0] if found else None
    quartiles = None
    if first is not None:
        column = kept.index(first.dimension)
        sample = [values[f"layers.{s.layer}.{s.site}"][:, column] for s in states]
        quartiles = features.quartiles(np.concatenate(sample), threshold)
    return analysis.Summary(
        sites=label,
        count=len(counted),
        one_sided=sum(f.one_sided for f in counted),
        layers=first.layers if first else 0.0,
        positions=first.positions if first else 0.0,
        dimension=first.dimension if first else None,
        quartiles=quartiles,
    )


def _quartiles(sample: np.ndarray) -> tuple[float, float, float]:
    low, middle, high = np.quantile(sample.astype(np.float64), (0.25, 0.5, 0.75))
    return float(low), float(middle), float(high)


def _ablations(
    model: LanguageModel,
    calls: Sequence[np.ndarray],
    found: list[features.Feature],
    activations: Activations,
    show: Callable[[int], None],
) -> list[analysis.Ablation]:
    """The model as it is, without its outlier features (the six most common ones if it has none), and the control.

    Without any outlier the model as it is alone: there is nothing to zero, and so nothing to compare with.
    """
    counted = [f.dimension for f in found if features.is_feature(f)]
    dimensions = counted or [f.dimension for f in found[:6]]
    width = model.config.hidden_size
    others = np.setdiff1d(np.arange(width), dimensions)
    random = np.random.default_rng(SEED).choice(others, len(dimensions), replace=False)
    label = "outlier features" if counted else "most common outliers"
    cases = [("nothing", [])]
    if dimensions:
        cases += [(label, dimensions), ("random dimensions", random.tolist())]
    done = 0
    result = []
    for what, zeroed in cases:
        before = probe.without(model.params, zeroed, ["qkv"])
        everywhere = probe.without(model.params, zeroed, probe.HIDDEN_SITES)
        top1 = [
            probe.top1_probability(model.config, before, activations(jnp.asarray(call)))
            for call in calls
        ]
        scores = []
        for params in (before, everywhere):
            changed = LanguageModel(model.config, params)
            logprobs = []
            for call in calls:
                logprobs.append(perplexity.logprobs(changed.logits, call))
                done += 1
                show(done)
            scores.append(float(np.exp(-np.mean(np.concatenate(logprobs), dtype=np.float64))))
        result.append(analysis.Ablation(what, zeroed, float(np.mean(top1)), *scores))
    return result


def _weights(model: LanguageModel) -> dict[str, jax.Array]:
    return {
        f"layers.{i}.{site}": node["weight"]
        for i, layer in enumerate(model.params["layers"])
        for site, node in layer.items()
        if "weight" in node and node["weight"].ndim == 2
    }


def _inject(model: LanguageModel, options: app.Options) -> None:
    """Saves the model with injected outliers, and a file that says so."""
    count, factor, output = options["inject_dimensions"], options["inject"], Path(options["output"])
    with app.input_errors():
        if count > model.config.hidden_size:
            raise ValueError(f"inject_dimensions: the model has {model.config.hidden_size}")
        chosen = np.random.default_rng(SEED).choice(model.config.hidden_size, count, replace=False)
        dimensions = sorted(int(i) for i in chosen)
        params = probe.inject(model.config, model.params, dimensions, factor)
        changed = LanguageModel(model.config, params, tokenizer=model.tokenizer)
        changed.save(output)
    note = {
        "injected": True,
        "source": options["model"],
        "factor": factor,
        "dimensions": dimensions,
    }
    note |= {"function": "the same as that of the source in floating point"}
    text = json.dumps(note, indent=2) + "\n"
    with app.input_errors():
        write_atomically(output / "injected.json", lambda path: path.write_text(text))
    shown = ", ".join(map(str, dimensions))
    SCREEN.print(
        f"wrote {output}: {options['model']} with dimensions {shown} scaled by {factor:g}",
        soft_wrap=True,
    )
