"""Exports the component and calls `plugin.py`. Used by `dim plugin build`; not for authors of plugins."""

import json

import dim
import plugin
import wit_world
from componentize_py_types import Err


def _answer(called, method, body):
    """Calls `command` or `query` of the plugin with the parsed body and returns the reply as JSON."""
    function = getattr(plugin, called, None)
    try:
        body = dim._loads(body)
    except ValueError as error:
        raise Err(dim._refusal(dim.Invalid(str(error)))) from None
    try:
        if function is None:
            raise dim.UnknownMethod
        return dim._dumps(dim._done(called, function(method, body)))
    except Exception as error:
        refusal = dim._refusal(error)
        if refusal is None:
            raise
        raise Err(refusal) from None


def _why(error):
    """Returns the reason of an exception. If it is not of the SDK, adds its type and its line in the plugin."""
    if isinstance(error, (dim.Reject, dim.Refused)):
        return str(error) or type(error).__name__
    place, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        # Files of the module path are in a numbered directory; those of the standard library are not.
        _, number, *rest = file.split("/") if file.startswith("/") else ("", "", file)
        name = "/".join(rest)
        if number.isdigit() and name not in ("dim.py", "dim_component.py"):
            place = f" ({name}:{trace.tb_lineno})"
        trace = trace.tb_next
    return f"{type(error).__name__}: {error}{place}"


class WitWorld(wit_world.WitWorld):
    def start(self, config, from_state_version):
        dim.config.clear()
        dim.config.update(json.loads(config))
        if hasattr(plugin, "start"):
            try:
                dim._done("start", plugin.start(dim.config, from_state_version))
            except Exception as error:
                raise Err(_why(error)) from None

    def handle(self, event_):
        if not hasattr(plugin, "handle"):
            return
        try:
            dim._done("handle", plugin.handle(dim._plain(event_)))
        except Exception as error:
            failure = dim._failure(error)
            if failure is None:
                raise
            raise Err(failure) from None

    def command(self, method, body):
        return _answer("command", method, body)

    def query(self, method, body):
        return _answer("query", method, body)
