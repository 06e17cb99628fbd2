"""What MkDocs does with the pages beside its plugins: sections of README.md, links out of docs/, formulas."""

import html
import pathlib
import re

import latex2mathml.converter

README = pathlib.Path(__file__).parents[1] / "README.md"


def section(title: str) -> str:
    """The text of one of README's sections, with the links that it has in docs/."""
    _, found, rest = README.read_text().partition(f"\n## {title}\n")
    if not found:
        raise ValueError(f"README.md has no section {title!r}")
    text = rest.partition("\n## ")[0]
    return re.sub(r"\]\((?!https?:|#)(docs/)?([^)]+)\)", lambda link: f"]({'' if link[1] else '../'}{link[2]})", text)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Puts in README's sections, so that none is written twice, and leaves links to the repository as text."""
    markdown = re.sub(r"^<!-- README: (.+) -->$", lambda of: section(of[1]), markdown, flags=re.MULTILINE)
    return re.sub(r"(?<!!)\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", markdown)


def on_page_content(content: str, **_: object) -> str:
    """Makes MathML of formulas, which needs no script and no network."""

    def convert(formula: re.Match[str]) -> str:
        display = "block" if formula[1] == "div" else "inline"
        return latex2mathml.converter.convert(html.unescape(formula[2]), display=display)

    return re.sub(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', convert, content, flags=re.DOTALL)
