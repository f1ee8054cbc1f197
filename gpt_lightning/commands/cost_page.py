"""A page of `evaluate`: the text, colored by cost, and the details of the character in focus.

It is one file without scripts that loads nothing; its policy forbids it.
"""

from collections.abc import Iterable
from html import escape
from math import exp, log
from string import Template

from gpt_lightning.commands.cost_views import COLORS, LEVELS, Cell, visible

PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>$title</title>
<style>
body { margin: 0 auto; max-width: 52rem; padding: 1rem 1rem 9rem; color: black; background: white;
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.25rem; overflow-wrap: anywhere; }
pre, #text { font-family: ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
#text { font-size: 1.05rem; line-height: 1.7; padding: .5rem; border: 1px solid; }
#text span:hover, #text span:focus { outline: 2px solid; }
#text span:hover::after, #text span:focus::after { content: attr(data-cost); position: fixed;
  left: 0; right: 0; bottom: 0; padding: .5rem 1rem; background: white; border-top: 2px solid; }
#text span:hover::after { z-index: 1; }
.legend span { padding: .1rem .5rem; display: inline-block; }
$classes
</style>
</head>
<body>
<h1>$title</h1>
<p class="legend">Bits per character: $legend</p>
<p>Point at a part of the text, tap it, or move to it with the Tab key.</p>
<div id="text">$text</div>
<pre>$report</pre>
</body>
</html>
""")


def cost_page(title: str, report: str, cells: Iterable[Cell]) -> str:
    """The page: a heading, the text in `cells`, and below it the lines of `report`."""
    colors = enumerate(COLORS.values())
    return PAGE.substitute(
        title=escape(title),
        report=escape(report),
        classes="\n".join(f".c{i} {{ background: {color}; }}" for i, color in colors),
        legend="".join(f'<span class="c{i}">{bits}</span>' for i, bits in enumerate(LEVELS)),
        text="".join(
            f'<span class="c{cell.level}" tabindex="0" data-cost="{escape(details(cell))}">'
            f"{escape(visible(cell.text))}</span>"
            for cell in cells
        ),
    )


def details(cell: Cell) -> str:
    """The cost of a cell, and the likeliest tokens in its place."""
    if not cell.predicted:
        return "not predicted"
    likeliest = [f"{label}\N{NO-BREAK SPACE}{p:.2%}" for label, p in cell.likeliest]
    cost = f"{exp(-cell.nats):.2%}, {cell.nats:.3f} nats, {cell.nats / log(2):.3f} bits"
    return f"{cost}\nThe likeliest: {'   '.join(likeliest)}"
