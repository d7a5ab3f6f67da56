"""HTML that is escaped by construction: a string is text unless `Markup` says that it is markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TypeAlias


class Markup(str):
    """A string that is HTML already; everything else is escaped when it becomes part of a page."""

    __slots__ = ()


Child: TypeAlias = "str | int | float | Iterable[Child] | None"


def render(child: Child) -> Markup:
    """Markup as it is, text and numbers escaped, None as nothing, anything else item by item."""
    if child is None:
        return Markup()
    if isinstance(child, Markup):
        return child
    if isinstance(child, str | int | float):
        return Markup(escape(str(child)))
    return Markup("".join(render(item) for item in child))


VOID = frozenset({"img", "meta", "source", "br", "line", "rect", "circle", "path", "polyline"})
"""Elements without content, of HTML and SVG."""


def tag(element: str, *children: Child, **attributes: str | int | float | bool | None) -> Markup:
    """An element. An underscore in an attribute's name is a hyphen, one at its end is dropped (`class_`).

    True gives an attribute without a value; False and None leave it out.
    """
    given = []
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        key = name.rstrip("_").replace("_", "-")
        given.append(f" {key}" if value is True else f' {key}="{escape(str(value))}"')
    opening = f"<{element}{''.join(given)}"
    if element in VOID:
        return Markup(f"{opening}/>")
    return Markup(f"{opening}>{render(children)}</{element}>")


def table(header: Sequence[Child], rows: Iterable[Sequence[Child]], numeric: Iterable[int] = ()) -> Markup:
    """A table that scrolls sideways on a narrow screen; the columns `numeric` are aligned to the right."""
    right = frozenset(numeric)

    def cells(kind: str, values: Sequence[Child]) -> list[Markup]:
        return [tag(kind, value, class_="number" if i in right else None) for i, value in enumerate(values)]

    head = tag("thead", tag("tr", cells("th", header)))
    body = tag("tbody", [tag("tr", cells("td", row)) for row in rows])
    return tag("div", tag("table", head, body), class_="scroll")


def section(title: str, *children: Child, note: Child = None) -> Markup:
    """A part of the page under a heading; nothing at all when it has no content."""
    content = render(children)
    if not content:
        return Markup()
    return tag("section", tag("h2", title), tag("p", note, class_="note") if note else None, content)
