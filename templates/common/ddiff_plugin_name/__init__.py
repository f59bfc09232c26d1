"""Plugin for ddiff with the plugin_kind `plugin_name`."""

from ddiff import Registry, hookimpl

DDIFF_API = 1  # version of the plugin interface, ddiff.API_VERSION, for which this is written


@hookimpl
def ddiff_register(registry: Registry) -> None:
    registry.add("plugin_kind", "plugin_name", "ddiff_plugin_name.plugin_kind:PluginName")
