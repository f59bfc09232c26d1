"""Plugin with a process for nucleotides: substitution with the two rates of Kimura (1980)."""

from ddiff import Registry, hookimpl


@hookimpl
def ddiff_register(registry: Registry) -> None:
    registry.add("process", "kimura", "ddiff_kimura.process:Kimura")
