"""Sections of a report as HTML. A section without content is empty text."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from ddiff.evaluation.compared_run import PROTOCOL, select_settings
from ddiff.run_dir.files import METRICS
from ddiff.runs.report.clusters import MOST_WORDS, TokenTree, show_token
from ddiff.runs.report.confusions import LevelConfusion, describe_mistakes
from ddiff.runs.report.generation import make_generation
from ddiff.runs.report.markup import EMPTY, Markup, element, escape, join, void_element
from ddiff.runs.report.records import make_records
from ddiff.runs.report.run_files import Bound, ReportedRun, environment_of
from ddiff.runs.report.tables import format_value, make_table, run_label

MOST_SAMPLES = 8  # of a run on the page
REPLACEMENT = (
    "\N{REPLACEMENT CHARACTER}"  # in texts, in place of bytes that do not form a character
)
UNFOLDED_SAMPLES = 4
UNFOLDED_NODES = 12  # of a tree
EVALUATE = "This run is not evaluated yet: repeat `ddiff run`, or use `ddiff eval`."


def section(name: str, title: str, *content: object) -> Markup:
    """Return a section with a heading, which the navigation of the page links to."""
    if not any(content):
        return EMPTY
    return element("section", element("h2", title), *content, id=name)


# ---------------------------------------------------------------------- summary


def make_summary(runs: Sequence[ReportedRun]) -> Markup:
    """Return sentences on each run, and on the run with the lowest bound."""
    cards = []
    for run in runs:
        sentences = [_describe_training(run), *_describe_results(run)]
        cards.append(
            element("div", element("h3", run_label(run)), element("p", *sentences), _class="card")
        )
    return join([element("div", *cards, _class="cards"), _compare_bounds(runs)])


def _describe_training(run: ReportedRun) -> str:
    environment = run.record.environment
    parts = [f"Process {run.process}"]
    if "parameters" in environment:
        parts.append(f"{environment['parameters']:,} parameters")
    text = ", ".join(parts)
    if run.origin is not None:
        return f"{text}. Imported from {run.origin.source} by the layout {run.origin.layout}. "
    if not run.metrics:
        return f"{text}. {METRICS} has no training step."
    tokens = sum(line["tokens"] for line in run.metrics)
    seconds = sum(line["seconds"] for line in run.metrics)
    steps = f"Trained for {run.metrics[-1]['step']:,} steps on {tokens:,.0f} tokens"
    device = environment.get("device", "an unknown device")
    return f"{text}. {steps} in {timedelta(seconds=round(seconds))} on {device}. "


def _describe_results(run: ReportedRun) -> list[object]:
    if run.has_fields:
        return _describe_targets(run)
    bound = run.bound
    if bound is None:
        return [EVALUATE]
    exact = "exact negative log-likelihood" if bound.label == "NLL" else "bound (NELBO)"
    sentences: list[object] = [f"Its validation {exact} is "]
    sentences.append(element("b", f"{bound.nats:.4f} nats per {bound.unit}"))
    sentences.append(f"{_describe_interval(bound.interval)}")
    if bound.bits_per_byte is not None:
        sentences.append(f", which is {bound.bits_per_byte:.4f} bits per byte")
    sentences.append(f". {_describe_baselines(bound)}")
    if warning := run.evaluation.get("warning"):
        sentences.append(element("strong", f" {warning}", _class="warning"))
    return sentences


def _describe_interval(interval: Sequence[float] | None) -> str:
    if interval is None:
        return ""
    low, high = interval
    return f" (95 % interval {low:.4f} to {high:.4f})"


def _describe_baselines(bound: Bound) -> str:
    """Say whether the model is better than the simple models on the same text."""
    parts = []
    for name, value in bound.baselines.items():
        difference = bound.nats - value
        relation = "below" if difference < 0 else "above"
        parts.append(f"{abs(difference):.3f} {relation} the {name} baseline")
    if not parts:
        return ""
    sentence = f"This is {' and '.join(parts)}; lower is better."
    limit = bound.baselines.get("unigram")
    if limit is not None and bound.nats > limit - 0.1:
        sentence += " The model has learned little more than the frequencies of the tokens."
    return sentence


def _describe_targets(run: ReportedRun) -> list[object]:
    targets = run.evaluation.get("targets")
    if not targets:
        return [EVALUATE]
    sentences: list[object] = ["Its validation bounds: "]
    for number, (target, found) in enumerate(targets.items()):
        if number:
            sentences.append("; ")
        sentences.append(f"{target} ")
        sentences.append(element("b", f"{found['nats_per_sample']:.2f}"))
    sentences.append(" nats per sample.")
    for target, found in targets.items():
        if found.get("is_below_entropy"):
            text = f" The bound of {target} is below the entropy of the source: it is impossible."
            sentences.append(element("strong", text, _class="warning"))
    return sentences


def _compare_bounds(runs: Sequence[ReportedRun]) -> Markup:
    """Return a paragraph on the lowest bound, or on settings that differ."""
    bounds = [(run, run.bound) for run in runs if run.bound is not None]
    if len(bounds) < 2:
        return EMPTY
    differing = find_differences([bound for _, bound in bounds if bound is not None])
    if differing:
        names = ", ".join(differing)
        return element(
            "p",
            f"The bounds of these runs are not comparable: they were evaluated with different "
            f"settings ({names}).",
            _class="warning",
        )
    ranked = sorted(bounds, key=_nats_of)
    best, lowest = ranked[0]
    other, second = ranked[1]
    assert lowest is not None
    assert second is not None
    sentence = [run_label(best), " has the lowest bound, ", f"{second.nats - lowest.nats:.4f}"]
    sentence += [f" nats per {lowest.unit} below ", run_label(other), ". "]
    if lowest.interval and second.interval and lowest.interval[1] >= second.interval[0]:
        sentence.append("Their 95 % intervals overlap. ")
    return element("p", *sentence, _class="verdict")


def _nats_of(pair: tuple[ReportedRun, Bound | None]) -> float:
    bound = pair[1]
    return math.inf if bound is None else bound.nats


def find_differences(bounds: Sequence[Bound]) -> list[str]:
    """Return the evaluation settings in which bounds differ, such as "tokenizer"."""
    selected = [
        select_settings({**bound.protocol, "unit": bound.unit}, bound.label) for bound in bounds
    ]
    differing = []
    for name in PROTOCOL:
        known = {repr(settings[name]) for settings in selected if settings[name] is not None}
        if len(known) > 1:
            differing.append(name)
    return differing


# ---------------------------------------------------------------------- tables


Figure = tuple[str, Callable[[ReportedRun, Bound], str]]

BOUND_FIGURES: Sequence[Figure] = (
    ("bound", lambda run, bound: bound.label),
    ("nats per unit", lambda run, bound: f"{bound.nats:.4f}"),
    ("95 % interval", lambda run, bound: _format_interval(bound.interval)),
    ("perplexity", lambda run, bound: _format_perplexity(bound)),
    ("bits per byte", lambda run, bound: _optional(bound.bits_per_byte)),
)

SETTING_FIGURES: Sequence[Figure] = (
    ("unit", lambda run, bound: bound.unit),
    ("scored units", lambda run, bound: f"{bound.units:,}"),
    ("documents", lambda run, bound: f"{bound.documents:,}"),
    ("weights", lambda run, bound: str(run.evaluation.get("weights", "–"))),
    ("step", lambda run, bound: f"{run.evaluation['step']:,}"),
)


def _format_interval(interval: Sequence[float] | None) -> str:
    return "–" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"


def _format_perplexity(bound: Bound) -> str:
    if bound.perplexity is None:
        return "none: no likelihood of the text, which is given its own vector"
    return f"{bound.perplexity:.2f}"


def _optional(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def make_evaluation(runs: Sequence[ReportedRun]) -> Markup:
    """Return the figures of all runs, one column per run."""
    tables = [
        _make_bound_table(runs),
        _make_target_table(runs),
        _make_judged_table(runs),
        make_generation(runs),
        make_records(runs),
    ]
    columns = [element("div", table) for table in tables if table]
    return element("div", *columns, _class="tables") if columns else EMPTY


def _make_bound_table(runs: Sequence[ReportedRun]) -> Markup:
    bounds = [(run, run.bound) for run in runs if run.bound is not None]
    if not bounds:
        return EMPTY
    rows: list[list[object]] = []
    for title, figure in BOUND_FIGURES:
        rows.append([title, *[figure(run, bound) for run, bound in bounds if bound is not None]])
    names = dict.fromkeys(name for _, bound in bounds if bound for name in bound.baselines)
    for name in names:
        values = [bound.baselines.get(name) for _, bound in bounds if bound is not None]
        rows.append([f"{name}, nats per unit", *map(_optional, values)])
    rows.append(["sampler", *[run.sampler for run, _ in bounds]])
    rows.append(["network evaluations per sample", *[_mean_nfe(run) for run, _ in bounds]])
    titles = ["", *[run_label(run) for run, _ in bounds]]
    summary = element("summary", "Settings of the evaluation")
    settings = make_table(titles, _list_settings(runs))
    heading = element("h3", "Bound on the validation text")
    return join([heading, make_table(titles, rows), element("details", summary, settings)])


def _list_settings(runs: Sequence[ReportedRun]) -> list[list[object]]:
    """Return the rows of the table of settings, without settings that no run has."""
    bounds = [(run, run.bound) for run in runs if run.bound is not None]
    rows: list[list[object]] = []
    for title, figure in SETTING_FIGURES:
        rows.append([title, *[figure(run, bound) for run, bound in bounds if bound is not None]])
    for name in PROTOCOL:
        values = [bound.protocol.get(name) for _, bound in bounds if bound is not None]
        if name != "unit" and any(value not in (None, []) for value in values):
            rows.append([name, *["–" if value is None else str(value) for value in values]])
    return rows


def _mean_nfe(run: ReportedRun) -> str:
    if not run.samples:
        return "–"
    return f"{sum(sample['nfe'] for sample in run.samples) / len(run.samples):.1f}"


def _make_target_table(runs: Sequence[ReportedRun]) -> Markup:
    """Return the bounds of runs of several fields, one row per target, control and field."""
    columns = [run for run in runs if run.evaluation.get("targets")]
    cells: dict[str, dict[int, Markup]] = {}
    for run in columns:
        for target, found in run.evaluation["targets"].items():
            for name, value in _describe_target(run, target, found).items():
                cells.setdefault(name, {})[run.number] = value
    if not cells:
        return EMPTY
    rows = []
    for name, values in cells.items():
        rows.append([name, *[values.get(run.number, "–") for run in columns]])
    title = element("h3", "Bounds of the targets, with 95 % intervals")
    table = make_table(["", *[run_label(run) for run in columns]], rows)
    return join([title, table])


def _describe_target(
    run: ReportedRun, target: str, found: Mapping[str, Any]
) -> Mapping[str, Markup]:
    """Return the figures of one target by name."""
    written = {f"{target}, nats per sample": _format_bound(found, "nats_per_sample")}
    for field, part in found["fields"].items():
        unit = run.evaluation["units"].get(field, "item")
        name = f"{target}: {field}, nats per {unit}"
        if field in found.get("notes", {}):
            name += f" ({found['notes'][field]})"
        written[name] = _format_bound(part, "nats_per_item")
    for control, other in found.get("controls", {}).items():
        name = f"{target}, given fields {control}, nats per sample"
        written[name] = _format_bound(other, "nats_per_sample")
    entropy = found.get("entropy_nats_per_sample")
    if entropy is not None:
        written[f"{target}, entropy of the source"] = escape(f"{entropy:.4f}")
    return written


def _format_bound(found: Mapping[str, Any], key: str) -> Markup:
    return format_value(found[key], found.get("interval"))


def _make_judged_table(runs: Sequence[ReportedRun]) -> Markup:
    """Return the findings of the judges, such as the fraction of correct samples."""
    columns = [run for run in runs if run.judged.get("targets")]
    cells: dict[str, dict[int, Markup]] = {}
    for run in columns:
        for target, findings in run.judged["targets"].items():
            for finding in findings:
                text = format_value(finding["value"], finding.get("interval"))
                if finding.get("chance") is not None:
                    chance = f"by chance {finding['chance']:.4f}"
                    text = join([text, element("div", chance, _class="note")])
                cells.setdefault(f"{target}: {finding['name']}", {})[run.number] = text
    if not cells:
        return EMPTY
    rows = []
    for name, values in cells.items():
        rows.append([name, *[values.get(run.number, "–") for run in columns]])
    title = element("h3", "Findings of the judge, with 95 % intervals")
    table = make_table(["", *[run_label(run) for run in columns]], rows)
    return join([title, table])


# ---------------------------------------------------------------------- samples and pictures


def make_samples(runs: Sequence[ReportedRun]) -> Markup:
    """Return the first samples of each run."""
    groups = []
    for run in runs:
        if not run.samples:
            continue
        written = []
        for sample in run.samples[:MOST_SAMPLES]:
            written.append(_make_sample(sample))
        note = f"{len(run.samples)} samples; {run.sampler}."
        if len(run.samples) > MOST_SAMPLES:
            note = f"{note} The first {MOST_SAMPLES} are shown."
        heading = element("h3", run_label(run))
        groups += [heading, element("p", note, _class="note")]
        groups.append(element("div", *written[:UNFOLDED_SAMPLES], _class="samples"))
        more = written[UNFOLDED_SAMPLES:]
        if more:
            summary = element("summary", f"{len(more)} more")
            folded = element("div", *more, _class="samples")
            groups.append(element("details", summary, folded))
    return join(groups)


def _make_sample(sample: Mapping[str, Any]) -> Markup:
    details = [f"sample {sample['index']}", f"{sample['nfe']} network evaluations"]
    if "fields" not in sample:
        text = sample["text"]
        for key in ("prompt", "infill"):
            if key in sample:
                details.append(f"{key}: {sample[key]}")
    else:
        details.insert(0, str(sample["target"]))
        parts = []
        for name, value in sample["fields"].items():
            if isinstance(value, Mapping) and "text" in value:
                given = " (given)" if name in sample["given"] else ""
                parts.append(f"{name}{given}: {value['text']}")
        text = "\n".join(parts)
        if not text:
            return EMPTY  # pictures are shown in their own section
    note = element("p", " · ".join(details), _class="note")
    return element("figure", element("pre", text), note)


def make_pictures(runs: Sequence[ReportedRun]) -> Markup:
    """Return the grids of pictures of runs of several fields, as embedded PNG images."""
    figures = []
    for run in runs:
        for name, content in run.pictures.items():
            encoded = base64.b64encode(content).decode()
            target = name.removeprefix("samples-").removesuffix(".png").replace("-", " ")
            source = f"data:image/png;base64,{encoded}"
            image = void_element("img", src=source, alt=f"{run.name}: {target}")
            caption = element("figcaption", run_label(run), f" {target}")
            figures.append(element("figure", image, caption, _class="picture"))
    return element("div", *figures, _class="pictures") if figures else EMPTY


# ---------------------------------------------------------------------- vocabulary


def make_clusters(
    found: Sequence[tuple[ReportedRun, TokenTree, Sequence[LevelConfusion]]],
) -> Markup:
    """Return the trees of hierarchical vocabularies as nested lists that can be opened.

    `found` has the run, its tree and its confusions, which are shown next to the nodes.
    """
    parts = []
    for run, tree, levels in found:
        if not tree.has_clusters:
            continue
        sizes = " → ".join(f"{size:,}" for size in reversed(tree.level_sizes))
        root = tree.offsets[-1]
        nodes = sorted(tree.children[root], key=lambda node: -len(tree.tokens_below(node)))
        confusions = {level.level: level for level in levels}
        shown = [_make_node(tree, node, confusions) for node in nodes]
        folded = shown[UNFOLDED_NODES:]
        more = EMPTY
        if folded:
            summary = element("summary", f"{len(folded)} more")
            more = element("details", summary, element("div", *folded, _class="nodes"))
        hint = "find a word"
        search = void_element(
            "input", _class="filter", type="search", placeholder=hint, aria_label=hint
        )
        parts.append(
            element(
                "div",
                element("h3", run_label(run)),
                element("p", f"Nodes by level, from the root: {sizes}.", _class="note"),
                search,
                element("div", *shown[:UNFOLDED_NODES], _class="nodes"),
                more,
                _class="tree",
            )
        )
    return join(parts)


def _make_node(tree: TokenTree, node: int, confusions: Mapping[int, LevelConfusion]) -> Markup:
    tokens = tree.tokens_below(node)
    level = tree.level_of(node)
    name = element("b", tree.name_state(node))
    count = f" {len(tokens):,} token{'s' if len(tokens) > 1 else ''}"
    bar = element("span", style=f"width:{100 * len(tokens) / tree.level_sizes[0]:.1f}%")
    size = element("span", bar, _class="size")
    title = element("summary", name, element("span", count, _class="note"), size)
    if level > 1:
        inner = [_make_node(tree, child, confusions) for child in tree.children[node]]
    else:
        # a byte that is only part of a character has no text
        words = [tree.words[token] for token in tokens]
        texts = [word for word in words if REPLACEMENT not in word]
        inner = [element("code", show_token(word)) for word in texts[:MOST_WORDS]]
        left = []
        if len(texts) > MOST_WORDS:
            left.append(f"{len(texts) - MOST_WORDS:,} more")
        if len(words) > len(texts):
            left.append(f"{len(words) - len(texts):,} parts of characters")
        if left:
            inner.append(element("span", f"and {' and '.join(left)}", _class="note"))
    mistakes = describe_mistakes(tree, confusions.get(level), node)
    return element("details", title, mistakes, element("div", *inner, _class="words"))


# ---------------------------------------------------------------------- environment and recipe


def make_environment(runs: Sequence[ReportedRun]) -> Markup:
    """Return versions and machine of the runs, and the origins of their components."""
    found = {run.number: environment_of(run) for run in runs}
    names = dict.fromkeys(name for values in found.values() for name in values)
    rows: list[list[object]] = []
    for name in names:
        shown = [_format_setting(values.get(name)) for values in found.values()]
        if any(value != "–" for value in shown):
            rows.append([name, *shown])
    parts = [make_table(["", *map(run_label, runs)], rows)]
    for run in runs:
        origins = run.record.environment.get("components", {})
        lines = [[name, origin] for name, origin in origins.items()]
        if lines:
            title = element("summary", "components of ", run_label(run))
            parts.append(element("details", title, make_table(["table", "component"], lines)))
    return join(parts)


def _format_setting(value: object) -> str:
    if value in (None, {}, []):
        return "–"
    return f"{value:,}" if type(value) is int else str(value)


def make_recipes(runs: Sequence[ReportedRun]) -> Markup:
    """Return the recipes of the runs, each folded."""
    parts = []
    for run in runs:
        title = element("summary", "recipe of ", run_label(run))
        text = element("pre", run.record.recipe_text, _class="recipe")
        parts.append(element("details", title, text))
    return join(parts)
