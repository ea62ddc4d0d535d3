# Copyright (c) 2026, fleet.portknock contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Rendering a back end's templates.

They are rendered here and not by a task, so that no secret ever becomes a variable; they see ``gate`` and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ansible import constants
from ansible_collections.fleet.portknock.plugins.module_utils._backends import back_end
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from jinja2 import Environment, FileSystemBytecodeCache, FileSystemLoader, StrictUndefined, TemplateError


def render(folder: Path, backend: str, gate: Mapping[str, Any]) -> dict[str, str]:
    """Render every template of a back end.

    :param folder: holds a folder of templates for each back end, and ``common``.
    :param gate: the model that the templates see.
    :returns: the texts of the back end's files, by its names for them.
    :raises PortknockError: a template is missing or wrong; says which and on what line, never with what values.
    """
    # Plain text for nft and systemd, so there is nothing to escape; lines that hold only a statement leave nothing behind.
    environment = Environment(
        loader=FileSystemLoader(folder),
        # Compiled once for all hosts of a run, whose own folder this is. What it holds are the templates, without values.
        bytecode_cache=FileSystemBytecodeCache(constants.DEFAULT_LOCAL_TMP),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701
    )
    texts = {}
    for key, file in back_end(backend).files.items():
        name = file.template
        try:
            texts[key] = environment.get_template(name).render(gate=gate)
        except TemplateError as exc:
            line = getattr(exc, "lineno", None)
            where = f"{folder / name}, line {line}" if line else str(folder / name)
            raise PortknockError(
                f"knock_server_templates: expected a template that renders; {where}: {type(exc).__name__}."
            ) from None
        except OSError as exc:
            raise PortknockError(
                f"knock_server_templates: expected {folder / name} to be readable; got {exc.strerror}."
            ) from None
    return texts


__all__ = ("render",)
