"""Registration of the model class of ddiff in transformers, with the components of the plugins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from ddiff.plugin.loader import survey_plugins
from ddiff.plugin.registry import Component
from ddiff.runs.hub.modeling import DdiffConfig, DdiffModel

KINDS = ("backbone", "head", "process", "sampler")


class InstalledComponents(Mapping[tuple[str, str], Any]):
    """Classes of the components of a model in all installed plugins, by kind and name.

    A class is imported when it is looked up. A configuration can therefore only name components
    that a plugin has registered.
    """

    def __getitem__(self, key: tuple[str, str]) -> Any:
        return self._components()[key].load()

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._components())

    def __len__(self) -> int:
        return len(self._components())

    def _components(self) -> dict[tuple[str, str], Component]:
        registry = survey_plugins().registry
        found = {}
        for kind in KINDS:
            for component in registry.components(kind):
                found[kind, component.name] = component
        return found


def register_models() -> None:
    """Register the model type `ddiff` in the Auto classes of transformers.

    A second call changes nothing.
    """
    DdiffModel.components = InstalledComponents()
    AutoConfig.register(DdiffConfig.model_type, DdiffConfig, exist_ok=True)
    for auto_class in (AutoModel, AutoModelForMaskedLM):
        auto_class.register(DdiffConfig, DdiffModel, exist_ok=True)
