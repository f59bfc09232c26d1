"""`ddiff check NAME`: test a component on small instances and print the largest errors.

A test applies every conformance check of `ddiff.testing` for this kind of component.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table

from ddiff.console import make_console, print_table
from ddiff.core.clock import LogTimeClock
from ddiff.core.gaussian import GaussianProcess
from ddiff.core.process import ForwardProcess
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary, Vocabulary
from ddiff.errors import ArgumentError, DataError, DdiffError, PluginError, RecipeError, suggest
from ddiff.nn.denoiser import Denoiser
from ddiff.nn.heads import TokenHead
from ddiff.plugin.loader import Survey, load_plugins, survey_plugins
from ddiff.plugin.registry import Component, Registry
from ddiff.recipe.component import ComponentSpec
from ddiff.recipe.resolve import configure_component, read_recipe
from ddiff.testing.data_instances import (
    make_datasets,
    make_encoders,
    make_judges,
    make_normalizers,
    make_paths,
    make_tokenizers,
    make_vocabularies,
)
from ddiff.testing.denoiser import check_denoiser
from ddiff.testing.gaussian import check_gaussian
from ddiff.testing.head import check_head
from ddiff.testing.instance import Instance
from ddiff.testing.joint import check_path
from ddiff.testing.process import check_parts, check_process
from ddiff.testing.recipe_check import is_recipe_name, list_paths, list_specs
from ddiff.testing.report import LawReport
from ddiff.testing.sampler import check_sampler, find_accepted_processes
from ddiff.testing.time_rule import check_time_rule
from ddiff.testing.vector_sampler import check_vector_sampler, find_accepted_vector_processes

WIDTH = 6  # of the hidden states of checked heads
LENGTH = 6  # of checked sequences
VECTOR_WIDTHS = (1, 2)  # of checked processes of vectors
REFUSALS = (ArgumentError, DataError, RecipeError)  # errors with which a component refuses inputs


class LabelledReport(NamedTuple):
    """Report of one conformance check, with the label of the checked instance."""

    label: str
    report: LawReport


def check_component(
    name: str, settings: Sequence[str], plugins: Sequence[str] | None = None
) -> int:
    """Check a component, all components of a plugin, or a recipe; print the results.

    Returns 0 if all laws hold, else 1. Components that cannot be built without other settings or
    data are listed as not checked, if at least one other component can be checked.

    Args:
        name: name of the component, of the plugin, or of a recipe file.
        settings: values of the component's Config or of the recipe, each in the form "key=value".
        plugins: names of the plugins that are searched; None for all installed plugins.

    Raises PluginError for an unknown name, RecipeError for a wrong setting, and ArgumentError if
    no small test instance of the component can be built with these settings.
    """
    torch.set_num_threads(1)  # the tensors are small: a second thread costs more than it saves
    if is_recipe_name(name):
        instances, unchecked = _make_recipe_instances(name, settings)
    else:
        components = find_components(name, plugins, bool(settings))
        instances, unchecked = _make_component_instances(components, settings)
    reports = list(_check_instances(instances))
    _print_reports(
        reports, {one.label: one.settings for one in instances if one.settings}, unchecked
    )
    return 0 if all(report.passed for _, report in reports) else 1


# ---------------------------------------------------------------------- which components


def find_components(
    name: str,
    plugins: Sequence[str] | None,
    configured: bool,
) -> list[Component]:
    """Return the components that `ddiff check NAME` checks.

    These are the components called `name` and those of the plugin called `name`, if their kind has
    conformance checks.

    Args:
        name: name of components or of a plugin.
        plugins: names of the plugins that are searched; None for all installed plugins.
        configured: whether the command has settings of a component. The components of a plugin are
            then returned only if no component is called `name`.
    """
    survey = survey_plugins() if plugins is None else Survey(load_plugins(plugins), [])
    registry = survey.registry
    same_name = [component for component in registry.components() if component.name == name]
    found = [component for component in same_name if component.kind in MAKERS]
    # settings fit one component, not a whole plugin
    if not (found and configured):
        for kind in MAKERS:
            found += [one for one in registry.components(kind) if one.plugin == name]
    if found:
        return list(dict.fromkeys(found))
    # NAME may be a plugin that failed to load
    for plugin, _, error in survey.reports:
        if plugin.name == name and error is not None:
            raise error
    raise PluginError(_not_found_message(name, same_name, registry))


def _not_found_message(
    name: str,
    same_name: list[Component],
    registry: Registry,
) -> str:
    known = [component for component in registry.components() if component.kind in MAKERS]
    listed = ", ".join(f"{component.kind} {component.name}" for component in known) or "nothing"
    if same_name:
        return (
            f"ddiff check: the {same_name[0]} has no laws to check. Components with laws: {listed}."
        )
    if any(component.plugin == name for component in registry.components()):
        return (
            f'ddiff check: the plugin "{name}" registers no component with laws. '
            f"Components with laws: {listed}."
        )
    names = [component.name for component in known] + [component.plugin for component in known]
    return (
        f'ddiff check: there is no component or plugin "{name}".{suggest(name, names)} '
        "A plugin of your own must be installed: pip install -e FOLDER. "
        f"Components with laws: {listed}."
    )


# ---------------------------------------------------------------------- instances of a component


def small_vocabularies() -> list[Vocabulary]:
    """Build four small vocabularies; most processes accept at least one.

    The vocabularies are: tokens only, tokens and a mask, and trees of two and three levels.
    """
    return [
        FlatVocabulary(4, mask=False),
        FlatVocabulary(4),
        HierarchicalVocabulary([[0, 1, 0, 1, 1]]),
        HierarchicalVocabulary([[2, 0, 1, 0, 1, 2], [1, 0, 1]]),
    ]


def _make_component_instances(
    components: Sequence[Component],
    settings: Sequence[str],
) -> tuple[list[Instance], dict[Component, DdiffError]]:
    """Make the instances of components.

    The result is that of `_collect_instances`.
    """
    makers = [
        (component, partial(_make_instances, component, settings)) for component in components
    ]
    return _collect_instances(makers)


def _collect_instances(
    makers: Iterable[tuple[Component, Callable[[], list[Instance]]]],
    other: Sequence[Instance] = (),
) -> tuple[list[Instance], dict[Component, DdiffError]]:
    """Call the functions that make the instances of components, and add the instances `other`.

    Returns all instances, and the error of each component that rejects all small instances. If
    there is no instance, the first error is raised.
    """
    made: list[Instance] = []
    rejected: dict[Component, DdiffError] = {}
    for component, make in makers:
        try:
            made += make()
        except REFUSALS as error:
            rejected[component] = error
    made += other
    if rejected and not made:
        raise next(iter(rejected.values()))
    return made, rejected


def _make_instances(
    component: Component,
    settings: Sequence[str],
) -> list[Instance]:
    make = MAKERS[component.kind]
    made = make(
        component,
        configure_component(component, settings),
        bool(settings),
    )
    given = ", ".join(settings)
    return [one._replace(settings=one.settings or given) for one in made]


def _make_recipe_instances(
    name: str, settings: Sequence[str]
) -> tuple[list[Instance], dict[Component, DdiffError]]:
    """Make the components and the paths of a recipe that are checked.

    `settings` are "key=value" texts that replace values of the recipe. The result is that of
    `_collect_instances`.
    """
    recipe = read_recipe(name, settings)
    paths = [
        Instance(f"{label}: {path}", partial(check_path, path))
        for label, path in list_paths(recipe).items()
    ]
    makers = [
        (spec.component, partial(MAKERS[spec.component.kind], spec.component, spec, True))
        for spec in list_specs(recipe)
    ]
    return _collect_instances(makers, paths)


def _make_processes(
    component: Component,
    spec: ComponentSpec,
    configured: bool,
) -> list[Instance]:
    """Make the instances of a process class that are checked; they have few states.

    Without settings, the instances are the examples of the class. If settings are given
    (`configured`), or if there are no examples, the process is built from `spec`: for vectors of
    the widths in `VECTOR_WIDTHS` if it declares that it serves vectors, else on each of the
    vocabularies that `_example_vocabularies` returns.
    """
    processes = _load_examples(component)
    settings = _format_example_settings(component, processes)
    if configured or not processes:
        if "vectors" in spec.members.states:
            processes = [spec.build(vocabulary=None, width=width) for width in VECTOR_WIDTHS]
        else:
            vocabularies = _example_vocabularies(component, processes)
            processes = _build_on(component, spec, vocabularies, width=None)
        settings = [""] * len(processes)
    instances = []
    for number, (process, text) in enumerate(zip(processes, settings, strict=True), start=1):
        name = f"{component.name} {number}"
        if isinstance(process, GaussianProcess):
            label = f"{name}, width {process.width}"
            instances.append(Instance(label, partial(check_gaussian, process), text))
        else:
            label = f"{name} on {_format_sizes(process.vocabulary)}"
            instances.append(Instance(label, partial(_check_process_and_parts, process), text))
    return instances


def _format_example_settings(component: Component, examples: list[Any]) -> list[str]:
    """Format the settings of each example of a component, such as `schedule=power, power=2.5`.

    The texts are empty if the component does not define `example_settings`. Raises PluginError if
    their number is not the number of `examples`.
    """
    settings = component.members().example_settings
    if not settings:
        return [""] * len(examples)
    if len(settings) != len(examples):
        raise PluginError(
            f"The {component} has {len(settings)} example_settings and {len(examples)} examples. "
            "example_settings must give the settings of each process that examples() returns, in "
            "the same order."
        )
    return [", ".join(map(_format_setting, one.items())) for one in settings]


def _format_setting(setting: tuple[str, Any]) -> str:
    """Format a key and its value as the option `--set` accepts them."""
    key, value = setting
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def _format_sizes(vocabulary: Vocabulary) -> str:
    return " < ".join(map(str, vocabulary.level_sizes))


def _check_process_and_parts(process: ForwardProcess) -> list[LawReport]:
    return check_parts(process) + check_process(process)


def _load_examples(component: Component) -> list[Any]:
    """Return the examples that the component's process class defines, or an empty list.

    Examples that a plugin's class inherits from a class of ddiff.core are not returned, because
    they are instances of the class of ddiff.core.
    """
    found = component.load()
    classes = found.__mro__ if isinstance(found, type) else ()
    for cls in classes:
        if "examples" in vars(cls):
            is_inherited = cls is not found and cls.__module__.startswith("ddiff.core.")
            return [] if is_inherited else found.examples()
    return []


def _example_vocabularies(
    component: Component,
    examples: list[Any],
) -> list[Vocabulary]:
    """Return the vocabularies on which a component is built.

    If the component defines `example_vocabularies()`, they are its result. Otherwise they are the
    vocabularies of `examples`, the component's examples. Without examples, they are
    `small_vocabularies()`.
    """
    offered = component.members().example_vocabularies
    if offered is not None:
        return offered()
    distinct = {process.vocabulary.fingerprint: process.vocabulary for process in examples}
    return list(distinct.values()) or small_vocabularies()


def _build_on(
    component: Component, spec: ComponentSpec, vocabularies: list[Vocabulary], **inputs: Any
) -> list[Any]:
    """Build the component on each vocabulary that it accepts. Return the built objects.

    `inputs` are further arguments of `spec.build`. Raises ArgumentError if the component accepts
    none of the vocabularies.
    """
    built = []
    rejection = None
    for vocabulary in vocabularies:
        try:
            built.append(spec.build(vocabulary=vocabulary, **inputs))
        # an ArgumentError is a rejection; other errors are bugs of the component
        except ArgumentError as error:
            rejection = error
    if built:
        return built
    raise ArgumentError(
        f"ddiff check: the {component} accepts none of {len(vocabularies)} small vocabularies with "
        f"these settings. The last error was: {rejection} To check the component on "
        "other vocabularies, define example_vocabularies()."
    )


def _make_heads(
    component: Component,
    spec: ComponentSpec,
    configured: bool,
) -> list[Instance]:
    instances = []
    for head in _build_on(component, spec, small_vocabularies(), width=WIDTH):
        label = f"{component.name} on {_format_sizes(head.vocabulary)}"
        instances.append(Instance(label, partial(check_head, head)))
    return instances


def _make_time_rules(
    component: Component,
    spec: ComponentSpec,
    configured: bool,
) -> list[Instance]:
    return [Instance(component.name, partial(check_time_rule, spec.build()))]


def _make_backbones(
    component: Component,
    spec: ComponentSpec,
    configured: bool,
) -> list[Instance]:
    """Make a denoiser from the backbone and a `TokenHead`, to check it with masked diffusion.

    `spec` is the backbone with its settings. `configured` is not used.
    """
    vocabulary = FlatVocabulary(5)
    process = TreeProcess(vocabulary, LogTimeClock((1.0,)))
    backbone = _build_on(component, spec, [vocabulary], length=LENGTH, process=process)[0]
    denoiser = Denoiser(backbone, TokenHead(vocabulary, backbone.width))
    label = f"{component.name} on {_format_sizes(vocabulary)}"
    return [Instance(label, partial(check_denoiser, denoiser, process))]


def _make_samplers(
    component: Component,
    spec: ComponentSpec,
    configured: bool,
) -> list[Instance]:
    """Make one sampler for each small process that the sampler supports, of tokens or of vectors.

    `spec` is the component with its settings. `configured` is not used.
    """

    def build(vocabulary: Vocabulary, steps: int) -> Any:
        return spec.build(steps=steps, vocabulary=vocabulary)

    def build_vectors(steps: int) -> Any:
        return spec.build(steps=steps, vocabulary=None)

    checks: dict[str, Callable[[], list[LawReport]]] = {}
    if "tokens" in spec.members.states:
        cases, rejected = find_accepted_processes(build)
        for name, case in cases.items():
            checks[name] = partial(check_sampler, case.build, case.process, case.predicts)
    else:
        of_vectors, rejected = find_accepted_vector_processes(build_vectors)
        for name, one in of_vectors.items():
            checks[name] = partial(check_vector_sampler, one.build, one.process)
    if not checks:
        raise ArgumentError(
            f"ddiff check: the {component} rejects every small process with these settings, so "
            f"nothing can be checked. The last error was: {rejected[-1]}"
        )
    return [Instance(f"{component.name} on {name}", check) for name, check in checks.items()]


MAKERS: dict[str, Callable[[Component, ComponentSpec, bool], list[Instance]]] = {
    "process": _make_processes,
    "head": _make_heads,
    "time_rule": _make_time_rules,
    "backbone": _make_backbones,
    "sampler": _make_samplers,
    "tokenizer": make_tokenizers,
    "vocabulary": make_vocabularies,
    "dataset": make_datasets,
    "fields_dataset": make_datasets,
    "normalizer": make_normalizers,
    "encoder": make_encoders,
    "path_rule": make_paths,
    "judge": make_judges,
}
"""Function that makes small instances, for each kind of component that has laws."""


# ---------------------------------------------------------------------- checking and printing


def _check_instances(instances: list[Instance]) -> Iterator[LabelledReport]:
    """Check every instance and yield its reports, with a progress line on a terminal."""
    console = Console(stderr=True)
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with progress:
        task = progress.add_task("", total=None)
        for number, (label, check, _) in enumerate(instances, start=1):
            progress.update(task, description=f"{number}/{len(instances)} {label}")
            for report in _run_check(check):
                yield LabelledReport(label, report)


def _run_check(check: Callable[[], list[LawReport]]) -> list[LawReport]:
    """Run the checks of an instance, and report an error of the component as a broken law."""
    try:
        return check()
    except REFUSALS as error:
        law = "the component accepts the inputs of the checks"
        return [LawReport(law, math.inf, 0.0, f"an error: {error}", "", 1)]


def _print_reports(
    reports: list[LabelledReport],
    settings: Mapping[str, str],
    unchecked: Mapping[Component, DdiffError],
) -> None:
    """Print one line per conformance check, with its largest error; explain every failed check.

    Args:
        reports: reports of all checks.
        settings: settings of the instances, by label. They are printed below the table.
        unchecked: components that were not checked, with the reasons.
    """
    worst = _find_worst(reports)
    console = make_console()
    table = Table(
        "law",
        "largest error",
        "allowed",
        "worst instance",
        "",
        box=None,
        pad_edge=False,
    )
    for label, report in worst:
        verdict = "[green]holds[/]" if report.passed else "[bold red]BROKEN[/]"
        table.add_row(
            report.law,
            f"{report.error:.1e}",
            f"{report.tolerance:.1e}",
            escape(label),  # a label may contain the name of a table in brackets
            verdict,
        )
    print_table(table, console)
    if settings:
        console.print()
    width = max(map(len, settings), default=0)
    for label, text in settings.items():
        line = f"{label:{width}}  {text}"
        console.print(line, markup=False)
    broken = [one for one in worst if not one.report.passed]
    for label, report in broken:
        console.print(f"\n{label}: {report}", markup=False)
    count = len({label for label, _ in reports})
    if unchecked:
        console.print("\nNot checked:")
    for component, error in unchecked.items():
        line = f"{component.kind} {component.name}: {error}"
        console.print(line, markup=False)
    summary = f"\n{len(worst)} laws on {count} instance(s), {len(broken)} broken."
    if unchecked:
        summary += f" {len(unchecked)} component(s) not checked."
    console.print(summary)


def _find_worst(reports: list[LabelledReport]) -> list[LabelledReport]:
    """Return for each conformance check the report with the largest error relative to tolerance.

    The result has the order in which the checks first occur in `reports`.
    """
    worst: dict[str, LabelledReport] = {}
    for one in reports:
        known = worst.get(one.report.law)
        if known is None or _relative_error(one.report) > _relative_error(known.report):
            worst[one.report.law] = one
    return list(worst.values())


def _relative_error(report: LawReport) -> float:
    """Return the error divided by the tolerance, or error * 1e300 if the tolerance is 0."""
    return report.error / report.tolerance if report.tolerance > 0 else report.error * 1e300
