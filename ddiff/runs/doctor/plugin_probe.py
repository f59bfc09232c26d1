"""Probe of `ddiff doctor`: load every plugin and import its components; print errors as JSON."""

from __future__ import annotations

import json
from typing import Any

from ddiff.errors import PluginError
from ddiff.plugin.loader import survey_plugins


def probe() -> list[dict[str, Any]]:
    """Return name, origin, number of components and errors of each plugin."""
    registry, reports = survey_plugins()
    errors: dict[str, list[str]] = {}
    for component in registry.components():
        try:
            component.members()
        except PluginError as error:
            errors.setdefault(component.plugin, []).append(str(error))
    found = []
    for report in reports:
        own = [str(report.error)] if report.error is not None else []
        found.append(
            {
                "name": report.plugin.name,
                "origin": str(report.plugin.origin),
                "components": len(report.components),
                "errors": own + errors.get(report.plugin.name, []),
            }
        )
    return found


if __name__ == "__main__":
    print(json.dumps(probe()))
