"""Renders HTML pages that consist of a single file each; page.css.jinja is their common style."""

import functools
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megavlm import __version__
from megavlm.base import number_format

if TYPE_CHECKING:
    import jinja2


def render_page(template: str, filters: Mapping[str, Callable] | None = None, **values: Any) -> str:
    """Renders a template of this folder with `values`, which are escaped unless they are Markup.

    Templates can use the filters `filters` and the functions of ``number_format``, and for the footer the values
    ``written`` (time) and ``version``.
    """
    written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    environment = _environment(tuple((filters or {}).items()))
    return environment.get_template(template).render(**values, written=written, version=__version__)


@functools.lru_cache(8)
def _environment(filters: tuple[tuple[str, Callable], ...]) -> "jinja2.Environment":
    """It keeps its templates compiled, which takes longer than to render a page."""
    import jinja2  # a dependency of transformers

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= dict(filters)
    for function in (number_format.short, number_format.number, number_format.duration, number_format.percent):
        environment.filters[function.__name__] = function
    return environment
