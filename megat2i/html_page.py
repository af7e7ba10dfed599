"""Pages of results: Markdown rendered as one HTML file that needs neither a network nor a script."""

import base64
import html
import re
from collections.abc import Iterable, Sequence

import markdown

STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "img{max-width:100%;height:auto}table{border-collapse:collapse;display:block;overflow-x:auto;margin:1rem 0}"
    "td,th{border:1px solid #ccc;padding:.3rem .6rem;text-align:left;vertical-align:top}"
    "td{min-width:6rem}"
    "pre{background:#f5f5f5;padding:.6rem;overflow-x:auto;font-size:.8rem}"
    "blockquote{border-left:4px solid #99b;margin:0;padding:.2rem 1rem;background:#f4f6fb}"
)


def page(title: str, text: str, style: str = "") -> bytes:
    """The Markdown ``text`` as an HTML file. ``style``: CSS on top of the common one."""
    head = '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
    head += '<meta name="viewport" content="width=device-width">'
    head += f"<title>{html.escape(title)}</title><style>{STYLE}{style}</style></head>"
    body = markdown.markdown(text, extensions=["tables", "fenced_code"], output_format="html")
    return f"{head}\n<body>\n{body}\n</body></html>\n".encode()


def table(head: Sequence[str], rows: Iterable[Sequence]) -> str:
    """A Markdown table of plain texts."""
    lines = [head, ["---"] * len(head), *(map(plain, row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plain(value) -> str:
    """A value as Markdown that shows just its text, on one line."""
    text = re.sub(
        r"[\\`*\[\]|]|(?<![^\W_])_|_(?![^\W_])", lambda found: f"&#{ord(found[0])};", html.escape(str(value), False)
    )
    return text.replace("\n", "<br>")


def embedded(png: bytes, alternative: str, attributes: str = "") -> str:
    """An ``img`` that carries its picture inside. ``alternative``: its text for those who do not see it."""
    data = base64.b64encode(png).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(alternative)}"{attributes}>'
