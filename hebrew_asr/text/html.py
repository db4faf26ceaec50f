"""Pieces of HTML pages: one line, direction, hidden characters."""

import re
from pathlib import Path
from typing import Any, cast

import jinja2
from markupsafe import Markup

from hebrew_asr.text.targets import HEBREW, INVISIBLE, LATIN, has_hebrew


def one_line(text: str) -> str:
    """`text` without line breaks, control characters and bidi marks, which a console would act on."""
    return INVISIBLE.sub("", " ".join(text.split()))


# Runs that read from left to right inside of Hebrew: from a Latin letter to the last one before the next Hebrew letter,
# with what stands between and in brackets (Google Cloud (GCP), C++), and numbers with a sign (-5 %)
LEFT_TO_RIGHT = re.compile(
    rf"([{LATIN}](?:[^{HEBREW}()\n]*(?:[{LATIN}\d+#%°]|\([^{HEBREW}()\n]*\)))*"
    rf"|(?<![\w{HEBREW}])[-+−]\d(?:[\d.,:]*\d)?\s?[%°]?)"
)


def bidi_parts(text: str) -> list[str]:
    """Splits a text at its left-to-right runs, which are every second part; one without Hebrew stays whole."""
    return LEFT_TO_RIGHT.split(text) if has_hebrew(text) else [text]


def path_parts(path: str) -> list[str]:
    """Splits a path at its separators, which are every second part: each name in it reads in its own direction."""
    return re.split(r"([/\\.]| \()", path)


def visible(value: Any) -> Any:
    """A text with invisible characters written as ⟨U+202E⟩, so that none can turn or hide what stands around it."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return INVISIBLE.sub(lambda mark: f"⟨U+{ord(mark[0]):04X}⟩", value)


def render_page(template: str, **values: Any) -> str:
    """Renders a template of a room (`data/report.html.jinja`): every text is escaped and without invisible marks."""
    loader = jinja2.FileSystemLoader(Path(__file__).parents[1])
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=visible
    )
    cast(dict[str, Any], environment.globals).update(
        bidi_parts=bidi_parts, path_parts=path_parts, has_hebrew=has_hebrew
    )
    return environment.get_template(template).render(values)
