"""Nucleotide substitution (Kimura 1980) for ddiff."""

from ddiff import Registry, hookimpl


@hookimpl
def ddiff_register(registry: Registry) -> None:
    registry.add("process", "kimura", "ddiff_kimura.process:Kimura")
