"""What Keras' own description of a model can be written as again, and how a model of Keras 2 is made new for current Keras."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from neutral.archive import Contents, manifest_without_digests
from neutral.conventions.keras_config import is_keras2
from neutral.errors import Problem, Refused
from neutral.importers.keras_config import model_config


def _keras3_config(settings: Mapping[str, Any]) -> bool:
    config = settings.get("config")
    return isinstance(config, dict) and "module" in config


def _of_keras2(settings: Mapping[str, Any]) -> bool:
    """True for a `.keras` of Keras 2, whose config current Keras seldom loads."""
    return _keras3_config(settings) and is_keras2(settings["config"], settings.get("keras_version"))


def describes(settings: Mapping[str, Any], source_format: str, form: str) -> bool:
    """True if the config of a source can be written again: as it was, or between the formats of Keras 3."""
    if form == source_format == "h5":
        return True
    return _keras3_config(settings) and form in ("keras", "h5")


def renewed(contents: Contents) -> tuple[Contents, list[str], list[str]]:
    """A model of Keras 2 with its graph alone, if current Keras can be given a model of that; else with its own config.

    The second and third results are warnings and notes for the user.
    """
    if not _of_keras2(contents.source.settings):
        return contents, [], []
    manifest = manifest_without_digests(contents)
    try:
        if contents.graph is None:
            raise Refused(Problem("graph", manifest.no_graph(), "one"))
        model_config(manifest)
    except Refused as error:
        why = "; ".join(f"{problem.where}: {problem.found}" for problem in error.problems)
        without = replace(contents, graph=None, notes=(*contents.notes, f"no graph: {why}"))
        return without, [f"written as a file of Keras 2, like its source, for Keras 2 alone to load ({why})"], []
    settings = {name: value for name, value in contents.source.settings.items() if name != "config"}
    renewed = replace(contents, source=contents.source.model_copy(update={"settings": settings}))
    return renewed, [], ["a file of Keras 2: built anew for current Keras (--into keeps the file as it is)"]
