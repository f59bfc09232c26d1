"""`ddiff check NAME`: build small instances of a component and print every law with its largest error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from rich.table import Table

from ddiff.core.clock import LogTimeClock
from ddiff.core.process import ForwardProcess
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary, Vocabulary
from ddiff.errors import ArgumentError, PluginError, suggest
from ddiff.nn.denoiser import Denoiser
from ddiff.nn.heads import TokenHead
from ddiff.plugin.loader import Survey, load_plugins, survey_plugins
from ddiff.plugin.registry import Component, Registry
from ddiff.recipe.model import ComponentSpec
from ddiff.recipe.resolve import configure_component
from ddiff.testing.denoiser import check_denoiser
from ddiff.testing.head import check_head
from ddiff.testing.process import check_parts, check_process
from ddiff.testing.report import LawReport
from ddiff.testing.sampler import check_sampler, find_accepted_processes
from ddiff.testing.time_rule import check_time_rule

WIDTH, LENGTH = 6, 6  # of the heads and sequences that are checked
OF_PLUGINS = ("process", "sampler")  # kinds that are checked by the name of their plugin
PIPED_WIDTH = 140  # columns of a table that no terminal limits


class Instance(NamedTuple):
    """Something that can be proven, and what it is called in the table."""

    label: str
    prove: Callable[[], list[LawReport]]


def check_component(
    name: str, settings: Sequence[str], plugins: Sequence[str] | None = None
) -> int:
    """Check a component, or every process and sampler of a plugin; 0 when all laws hold, 1 when one is broken.

    `settings` are key=value texts for the component's Config. Without `plugins` everything installed is searched. Raises
    PluginError for an unknown name, RecipeError for a wrong setting, ArgumentError when nothing fits the settings.
    """
    torch.set_num_threads(
        1
    )  # the laws' tensors are small: a second thread costs more than it brings
    instances = [
        one
        for component in _named(name, plugins, bool(settings))
        for one in _instances(component, settings)
    ]
    reports = list(_prove(instances))
    _print(name, reports)
    return 0 if all(report.passed for _, report in reports) else 1


# ---------------------------------------------------------------------- which components


def _named(name: str, plugins: Sequence[str] | None, configured: bool) -> list[Component]:
    """The components called NAME that have laws, and the processes and samplers of the plugin called NAME.

    Settings belong to one component, so with them the plugin is meant only where no component has the name.
    """
    survey = survey_plugins() if plugins is None else Survey(load_plugins(plugins), [])
    registry = survey.registry
    same_name = [component for component in registry.components() if component.name == name]
    found = [component for component in same_name if component.kind in INSTANCES]
    of_plugin = [
        part for kind in OF_PLUGINS for part in registry.components(kind) if part.plugin == name
    ]
    chosen = found if found and configured else list(dict.fromkeys([*found, *of_plugin]))
    if chosen:
        return chosen
    for plugin, _, error in survey.reports:
        if plugin.name == name and error is not None:
            raise error
    raise PluginError(_explain(name, same_name, registry))


def _explain(name: str, same_name: list[Component], registry: Registry) -> str:
    known = [component for component in registry.components() if component.kind in INSTANCES]
    there_is = ", ".join(f"{component.kind} {component.name}" for component in known) or "nothing"
    if same_name:
        return f"ddiff check: the {same_name[0]} has no laws to check. Those that have: {there_is}."
    if any(component.plugin == name for component in registry.components()):
        return f'ddiff check: the plugin "{name}" registers no process and no sampler. By name: {there_is}.'
    names = [component.name for component in known] + [component.plugin for component in known]
    return f'ddiff check: there is no component or plugin "{name}".{suggest(name, names)} There is: {there_is}.'


# ---------------------------------------------------------------------- instances of a component


def small_vocabularies() -> list[Vocabulary]:
    """Words alone, words and a mask, trees of two and three levels: one of them fits most processes."""
    return [
        FlatVocabulary(4, mask=False),
        FlatVocabulary(4),
        HierarchicalVocabulary([[0, 1, 0, 1, 1]]),
        HierarchicalVocabulary([[2, 0, 1, 0, 1, 2], [1, 0, 1]]),
    ]


def _instances(component: Component, settings: Sequence[str]) -> list[Instance]:
    return INSTANCES[component.kind](
        component, configure_component(component, settings), bool(settings)
    )


def _processes(component: Component, part: ComponentSpec, configured: bool) -> list[Instance]:
    """The class's own examples; with settings, the configured process on its vocabularies that fit."""
    examples = _examples(component)
    if examples and not configured:
        built = examples
    else:
        built = _built_on(component, part, _vocabularies(component, examples))
    return [
        Instance(
            f"{component.name} {place} on {_sizes(process.vocabulary)}",
            partial(_prove_process, process),
        )
        for place, process in enumerate(built, start=1)
    ]


def _sizes(vocabulary: Vocabulary) -> str:
    return " < ".join(map(str, vocabulary.level_sizes))


def _prove_process(process: ForwardProcess) -> list[LawReport]:
    return check_parts(process) + check_process(process)


def _examples(component: Component) -> list[ForwardProcess]:
    """`examples()` of the component; those of an engine class that it derives from are examples of something else."""
    found = component.load()
    bases = found.__mro__ if isinstance(found, type) else ()
    owner = next((cls for cls in bases if "examples" in vars(cls)), None)
    if owner is None or (owner is not found and owner.__module__.startswith("ddiff.core.")):
        return []
    return found.examples()


def _vocabularies(component: Component, examples: list[ForwardProcess]) -> list[Vocabulary]:
    """`example_vocabularies()` of the component, else those of its examples, else a few small ones."""
    offered = component.members().example_vocabularies
    if offered is not None:
        return offered()
    distinct = {process.vocabulary.fingerprint: process.vocabulary for process in examples}
    return list(distinct.values()) or small_vocabularies()


def _built_on(
    component: Component, part: ComponentSpec, vocabularies: list[Vocabulary], **inputs: Any
) -> list[Any]:
    """What `build` makes of each vocabulary that it takes; its last refusal when it takes none."""
    built, refusal = [], None
    for vocabulary in vocabularies:
        try:
            built.append(part.build(vocabulary=vocabulary, **inputs))
        except ArgumentError as error:
            refusal = error
    if built:
        return built
    raise ArgumentError(
        f"ddiff check: the {component} fits none of {len(vocabularies)} small vocabularies with these settings. The last "
        f"one was refused so: {refusal} A class may offer vocabularies of its own in example_vocabularies()."
    )


def _heads(component: Component, part: ComponentSpec, configured: bool) -> list[Instance]:
    built = _built_on(component, part, small_vocabularies(), width=WIDTH)
    return [
        Instance(f"{component.name} on {_sizes(head.vocabulary)}", partial(check_head, head))
        for head in built
    ]


def _time_rules(component: Component, part: ComponentSpec, configured: bool) -> list[Instance]:
    rule = part.build()
    return [Instance(component.name, partial(check_time_rule, rule))]


def _backbones(component: Component, part: ComponentSpec, configured: bool) -> list[Instance]:
    """A backbone with a plain head, beside a masked process."""
    vocabulary = FlatVocabulary(5)
    backbone = _built_on(component, part, [vocabulary], length=LENGTH)[0]
    denoiser = Denoiser(backbone, TokenHead(vocabulary, backbone.width))
    process = TreeProcess(vocabulary, LogTimeClock((1.0,)))
    return [
        Instance(
            f"{component.name} on {_sizes(vocabulary)}", partial(check_denoiser, denoiser, process)
        )
    ]


def _samplers(component: Component, part: ComponentSpec, configured: bool) -> list[Instance]:
    """The sampler on each small process that it takes."""
    subjects, refused = find_accepted_processes(
        lambda vocabulary, steps: part.build(steps=steps, vocabulary=vocabulary)
    )
    if not subjects:
        raise ArgumentError(
            f"ddiff check: the {component} refuses every small process with these settings, so nothing can be checked. "
            f"The last refusal: {refused[-1]}"
        )
    return [
        Instance(
            f"{component.name} on {name}",
            partial(check_sampler, subject.build, subject.process, subject.predicts),
        )
        for name, subject in subjects.items()
    ]


INSTANCES: dict[str, Callable[[Component, ComponentSpec, bool], list[Instance]]] = {
    "process": _processes,
    "head": _heads,
    "time_rule": _time_rules,
    "backbone": _backbones,
    "sampler": _samplers,
}
"""How to make small instances of each kind that has laws."""


# ---------------------------------------------------------------------- proving and printing


def _prove(instances: list[Instance]) -> Iterator[tuple[str, LawReport]]:
    """(label, report) of every law on every instance, with a progress line on a terminal."""
    columns = SpinnerColumn(), TextColumn("{task.description}")
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as shown:
        task = shown.add_task("", total=None)
        for place, (label, prove) in enumerate(instances, start=1):
            shown.update(task, description=f"{place}/{len(instances)} {label}")
            yield from ((label, report) for report in prove())


def _print(name: str, reports: list[tuple[str, LawReport]]) -> None:
    """One line per law: its worst instance. Below, every broken law in words."""
    worst: dict[str, tuple[str, LawReport]] = {}
    for label, report in reports:
        known = worst.get(report.law)
        if known is None or _badness(report) > _badness(known[1]):
            worst[report.law] = (label, report)
    console = Console() if Console().is_terminal else Console(width=PIPED_WIDTH)
    table = Table("law", "largest error", "allowed", "worst instance", "", box=None, pad_edge=False)
    for label, report in worst.values():
        verdict = "[green]holds[/]" if report.passed else "[bold red]BROKEN[/]"
        table.add_row(report.law, f"{report.error:.1e}", f"{report.tolerance:.1e}", label, verdict)
    console.print(table)
    for label, report in worst.values():
        if not report.passed:
            console.print(f"\n{label}: {report}", markup=False, highlight=False, soft_wrap=True)
    broken = sum(not report.passed for _, report in worst.values())
    count = len({label for label, _ in reports})
    console.print(f"\n{len(worst)} laws on {count} instance(s), {broken} broken.", highlight=False)


def _badness(report: LawReport) -> float:
    """How near to breaking, or how far beyond."""
    return report.error / report.tolerance if report.tolerance > 0 else report.error * 1e300
