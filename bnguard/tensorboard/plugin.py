"""The BatchNorm tab of TensorBoard: serves the page and its data; never imports torch."""

from __future__ import annotations

import functools
import importlib.resources
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import werkzeug
from tensorboard import context as request_context
from tensorboard.backend import experiment_id, http_util
from tensorboard.plugins import base_plugin

from bnguard.rules import installed_rules
from bnguard.tensorboard.metadata import PLUGIN_NAME, LogError
from bnguard.tensorboard.reader import LogReader, Series, SeriesCache

_STATIC = importlib.resources.files("bnguard.tensorboard").joinpath("static")
_KINDS = {".js": "text/javascript", ".css": "text/css"}
# Only these are served or embedded: the content type of each file.
STATIC_FILES: Mapping[str, str] = {
    name: kind
    for name in sorted(file.name for file in _STATIC.iterdir())
    if (kind := _KINDS.get(Path(name).suffix))
}
_App = Callable[..., Any]


class BatchNormPlugin(base_plugin.TBPlugin):  # type: ignore[misc]
    """Serves the tab: its static files, and the runs as JSON and binary arrays."""

    plugin_name = PLUGIN_NAME

    def __init__(self, context: base_plugin.TBContext) -> None:
        self._provider = context.data_provider
        self._cache = SeriesCache()

    def get_plugin_apps(self) -> dict[str, _App]:
        """Return the handler of each route."""
        apps = {
            "/runs": self._app(lambda reader, _: reader.runs()),
            "/run": self._app(lambda reader, asked: reader.run(asked["run"])),
            "/stats": self._app(lambda reader, asked: reader.stats(asked["run"], asked["metric"])),
            "/layer": self._app(lambda reader, asked: reader.layer(asked["run"], asked["layer"])),
            "/channels": self._app(
                lambda reader, asked: reader.channels(asked["run"], asked["layer"])
            ),
            "/rules": self._app(lambda _reader, _asked: rule_pages()),
        }
        return apps | {
            f"/static/{name}": _static_app(name, kind) for name, kind in STATIC_FILES.items()
        }

    def is_active(self) -> bool:
        """Return False: TensorBoard enables the tab itself once a run has bnguard data."""
        return False

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        """Return the tab's name and its entry module."""
        return base_plugin.FrontendMetadata(es_module_path="/static/index.js", tab_name="BatchNorm")

    def _app(self, answer: Callable[[LogReader, Mapping[str, str]], object]) -> _App:
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
                content = answer(reader, defaultdict(str, request.args.to_dict()))
            except LogError as error:
                return _respond(request, str(error), "text/plain", code=404)
            if isinstance(content, Series):
                return _respond(request, content.pack(), "application/octet-stream")
            return _respond(request, json.dumps(content), "application/json")

        return app


@functools.cache
def static_text(name: str) -> str:
    """Return one of the static files.

    Raises:
        KeyError: The file is not on the list.
    """
    if name not in STATIC_FILES:
        raise KeyError(name)
    return _STATIC.joinpath(name).read_text("utf-8")


def rule_pages() -> dict[str, Any]:
    """Return the page of each rule, by its code: headline, and sections of text and code.

    >>> rule_pages()["BN301"][0]
    'Inputs in eval mode do not match the running statistics.'
    """
    # TensorBoard starts without rich.
    from bnguard.report.pages import sections_of

    return {rule.code: sections_of(rule) for rule in installed_rules()}


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
