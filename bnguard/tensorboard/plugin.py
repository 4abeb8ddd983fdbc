"""The BatchNorm tab of TensorBoard: what its page asks for, over HTTP; never imports torch."""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections.abc import Callable, Mapping
from typing import Any

import werkzeug
from tensorboard import context as request_context
from tensorboard.backend import experiment_id, http_util
from tensorboard.plugins import base_plugin

from bnguard.rules import installed_rules
from bnguard.tensorboard.metadata import PLUGIN_NAME, LogError
from bnguard.tensorboard.reader import LogReader, SeriesCache

# Nothing but these is served or embedded.
STATIC_FILES: Mapping[str, str] = {
    "app.js": "text/javascript",
    "channels.js": "text/javascript",
    "curves.js": "text/javascript",
    "dom.js": "text/javascript",
    "empty.js": "text/javascript",
    "findings.js": "text/javascript",
    "heatmap.js": "text/javascript",
    "host.js": "text/javascript",
    "index.js": "text/javascript",
    "layer.js": "text/javascript",
    "overview.js": "text/javascript",
    "plot.js": "text/javascript",
    "scale.js": "text/javascript",
    "signal.js": "text/javascript",
    "source.js": "text/javascript",
    "state.js": "text/javascript",
    "style.css": "text/css",
    "toolbar.js": "text/javascript",
}
_App = Callable[..., Any]
_Answer = tuple[str | bytes, str]


class BatchNormPlugin(base_plugin.TBPlugin):  # type: ignore[misc]
    """Serves the tab: its static files, and the runs as JSON and binary arrays."""

    plugin_name = PLUGIN_NAME

    def __init__(self, context: base_plugin.TBContext) -> None:
        self._provider = context.data_provider
        self._cache = SeriesCache()

    def get_plugin_apps(self) -> dict[str, _App]:
        """Return what answers each route."""
        data = {
            "/runs": _runs,
            "/run": _run,
            "/stats": _stats,
            "/layer": _layer,
            "/channels": _channels,
            "/rules": _rules,
        }
        apps = {route: self._app(answer) for route, answer in data.items()}
        return apps | {
            f"/static/{name}": _static_app(name, kind) for name, kind in STATIC_FILES.items()
        }

    def is_active(self) -> bool:
        """Leave it to TensorBoard, which enables the tab once a run has data of ours."""
        return False

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        """Return the tab's name and its entry module."""
        return base_plugin.FrontendMetadata(es_module_path="/static/index.js", tab_name="BatchNorm")

    def _app(self, answer: Callable[[LogReader, Mapping[str, str]], _Answer]) -> _App:
        @werkzeug.Request.application
        def app(request: werkzeug.Request) -> werkzeug.Response:
            environ = request.environ
            reader = LogReader(
                self._provider,
                request_context.from_environ(environ),
                environ.get(experiment_id.WSGI_ENVIRON_KEY, ""),
                self._cache,
            )
            try:
                content, kind = answer(reader, request.args)
            except LogError as error:
                return _respond(request, str(error), "text/plain", code=404)
            return _respond(request, content, kind)

        return app


@functools.cache
def static_text(name: str) -> str:
    """Return one of the static files.

    Raises:
        KeyError: The file is not on the list.
    """
    if name not in STATIC_FILES:
        raise KeyError(name)
    folder = importlib.resources.files("bnguard.tensorboard").joinpath("static")
    return folder.joinpath(name).read_text("utf-8")


def rule_pages() -> dict[str, str]:
    """Return the page of each rule, by its code; the first line is code and name.

    >>> rule_pages()["BN301"].splitlines()[0]
    'BN301 statistic-drift'
    """
    return {rule.code: f"{rule.code} {rule.name}\n\n{rule.page()}" for rule in installed_rules()}


def _runs(reader: LogReader, _: Mapping[str, str]) -> _Answer:
    return json.dumps(reader.runs()), "application/json"


def _run(reader: LogReader, arguments: Mapping[str, str]) -> _Answer:
    return json.dumps(reader.run(arguments.get("run", ""))), "application/json"


def _stats(reader: LogReader, arguments: Mapping[str, str]) -> _Answer:
    series = reader.stats(arguments.get("run", ""), arguments.get("metric", ""))
    return series.pack(), "application/octet-stream"


def _layer(reader: LogReader, arguments: Mapping[str, str]) -> _Answer:
    series = reader.layer(arguments.get("run", ""), arguments.get("layer", ""))
    return series.pack(), "application/octet-stream"


def _channels(reader: LogReader, arguments: Mapping[str, str]) -> _Answer:
    series = reader.channels(arguments.get("run", ""), arguments.get("layer", ""))
    return series.pack(), "application/octet-stream"


def _rules(_: LogReader, __: Mapping[str, str]) -> _Answer:
    return json.dumps(rule_pages()), "application/json"


def _static_app(name: str, kind: str) -> _App:
    @werkzeug.Request.application
    def app(request: werkzeug.Request) -> werkzeug.Response:
        return _respond(request, static_text(name), kind)

    return app


def _respond(
    request: werkzeug.Request, content: str | bytes, kind: str, code: int = 200
) -> werkzeug.Response:
    # Adds X-Content-Type-Options: nosniff.
    response: werkzeug.Response = http_util.Respond(request, content, kind, code=code)
    return response
