"""A self-contained page of `evaluate`: the text, colored by cost, and the details of a character.

The page loads nothing: its policy forbids it. The text is in the page itself, so that it can be
read without JavaScript, which shows the details of the character under the pointer or the cursor.
"""

import json
from html import escape
from string import Template

from gpt_lightning.commands.cost_views import LEVELS, Cell, visible

# Background and text of each level. The contrast is at least 4.5 to 1 (WCAG AA) in both themes.
LIGHT = ("#ffffff", "#fff6da", "#ffebb3", "#ffdd8c", "#ffcb6b", "#ffb657", "#ffa04d", "#ff8a4a",
         "#ff7352")  # fmt: skip
DARK = ("#16181d", "#2b2418", "#3d2c17", "#503316", "#633915", "#773e16", "#8a4218", "#9c441d",
        "#ad4426")  # fmt: skip
LIGHT_TEXT, DARK_TEXT = "#1a1a1a", "#f4f4f4"

PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: $light_text; $light }
@media (prefers-color-scheme: dark) { :root { --ink: $dark_text; $dark } }
html { scroll-padding: 1rem 0 10rem; }
body { margin: 0 auto; max-width: 52rem; padding: 1rem 1rem 9rem; background: var(--c0);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1, h2 { font-size: 1.25rem; overflow-wrap: anywhere; }
pre, #text { font-family: ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
pre { font-size: .8rem; }
#text { font-size: 1.05rem; line-height: 1.7; padding: .5rem; border: 1px solid; }
#text:focus { outline: 3px solid; outline-offset: 2px; }
#text span { cursor: pointer; }
#text .on { outline: 2px solid; }
.legend span { padding: .1rem .5rem; display: inline-block; }
$classes
#details { position: fixed; left: 0; right: 0; bottom: 0; min-height: 4rem; padding: .5rem 1rem;
  background: var(--c0); border-top: 2px solid; }
#details > * { max-width: 52rem; margin: .2rem auto; padding: 0; }
#details ol { display: flex; flex-wrap: wrap; gap: .2rem 1.5rem; list-style: none; }
#details b { font-family: ui-monospace, monospace; white-space: pre; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="legend">Bits per character: $legend</p>
<p id="help">Point at a part of the text or tap it. With the keyboard: Tab, then the arrow keys.</p>
<p>$note</p>
<div id="text" tabindex="0" role="application" aria-label="The text, colored by cost"
  aria-describedby="help details">$text</div>
<h2>Figures</h2>
<pre>$report</pre>
<div id="details" role="status" aria-live="polite"><p>Nothing is chosen.</p></div>
<script type="application/json" id="data">$data</script>
<script>
"use strict";
const cells = JSON.parse(document.getElementById("data").textContent);
const box = document.getElementById("text"), details = document.getElementById("details");
const spans = box.children, numbers = new Map([...spans].map((span, i) => [span, i]));
let current = -1;

function element(tag, content) {
  const made = document.createElement(tag);
  made.textContent = content;
  return made;
}

function percent(p) {
  return p < 0.0001 ? "under 0.01%" : (100 * p).toFixed(2) + "%";
}

function choose(i) {
  if (!spans[i] || i === current) return;
  if (current >= 0) spans[current].classList.remove("on");
  current = i;
  spans[i].classList.add("on");
  const [nats, likeliest] = cells[i];
  const name = spans[i].textContent === " " ? "space" : spans[i].textContent.trim();
  const list = document.createElement("ol"), heading = document.createElement("p");
  for (const [token, p] of likeliest) {
    list.append(element("li", ""));
    list.lastChild.append(element("b", token + " "), percent(p));
  }
  const cost = nats === null ? "not predicted" :
    percent(Math.exp(-nats)) + ", " + nats.toFixed(3) + " nats, " +
    (nats / Math.LN2).toFixed(3) + " bits";
  heading.append(element("b", name + " "), cost, likeliest.length ? ". The likeliest here:" : "");
  details.replaceChildren(heading, list);
}

// The character of the next row that is nearest to the left edge of the current one.
function nextRow(step) {
  const { offsetTop: top, offsetLeft: left } = spans[current];
  let best = current;
  for (let i = current + step; spans[i]; i += step) {
    if (spans[i].offsetTop === top) continue;
    if (best !== current && spans[i].offsetTop !== spans[best].offsetTop) break;
    const distance = Math.abs(spans[i].offsetLeft - left);
    if (best === current || distance < Math.abs(spans[best].offsetLeft - left)) best = i;
  }
  return best;
}

box.addEventListener("click", event => choose(numbers.get(event.target)));
let pointer = "";
box.addEventListener("mousemove", event => {
  // a browser also sends this event when the text moves under a pointer that rests
  const place = event.screenX + " " + event.screenY;
  if (place !== pointer) choose(numbers.get(event.target));
  pointer = place;
});
box.addEventListener("focus", () => { if (current < 0) choose(0); });
box.addEventListener("keydown", event => {
  const steps = { ArrowRight: () => current + 1, ArrowLeft: () => current - 1,
    ArrowDown: () => nextRow(1), ArrowUp: () => nextRow(-1),
    Home: () => 0, End: () => spans.length - 1 };
  if (!(event.key in steps)) return;
  event.preventDefault();
  choose(steps[event.key]());
  spans[current].scrollIntoView({ block: "nearest" });
});
</script>
</body>
</html>
""")


def cost_page(title: str, report: str, cells: list[Cell], note: str) -> str:
    """The page.

    Args:
        title: its heading.
        report: lines of figures.
        cells: the text.
        note: what the page leaves out, if anything.
    """
    data = [
        (
            round(cell.nats, 4) if cell.predicted else None,
            [(token, round(p, 5)) for token, p in cell.likeliest],
        )
        for cell in cells
    ]
    names = [f"{level}" for level in range(LEVELS - 1)] + [f"{LEVELS - 1} or more"]
    return PAGE.substitute(
        title=escape(title),
        note=escape(note),
        report=escape(report),
        light=variables(LIGHT),
        dark=variables(DARK),
        light_text=LIGHT_TEXT,
        dark_text=DARK_TEXT,
        classes=" ".join(f".c{i} {{ background: var(--c{i}); }}" for i in range(LEVELS)),
        legend="".join(f'<span class="c{i}">{name}</span>' for i, name in enumerate(names)),
        text="".join(f'<span class="c{c.level}">{escape(visible(c.text))}</span>' for c in cells),
        # "<" could end the script
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    )


def variables(colors: tuple[str, ...]) -> str:
    return " ".join(f"--c{i}: {color};" for i, color in enumerate(colors))
