"""Template and style sheet of the HTML report."""

from __future__ import annotations

# The policy is a second fence behind the escaping: no script, no request, whatever the text.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<header><h1>{title}</h1><p class="headline">{headline}</p></header>
{body}</main>
</body>
</html>
"""

STYLE = """
:root { --ink: #1d2126; --soft: #5a6470; --line: #dde1e6; --page: #ffffff; --panel: #f5f6f8;
  --blue: #0072b2; --orange: #b87400; --good: #00684a; --bad: #a8320a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #a2abb5; --line: #383e46; --page: #16191d; --panel: #20242a;
    --blue: #6ab7ea; --orange: #f0b646; --good: #4cc9a0; --bad: #ff9a73; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: .85rem; margin: 0 0 .25rem; color: var(--soft); }
.headline { font-size: 1.1rem; max-width: 46em; margin: 0; padding: .9rem 1.1rem;
  background: var(--panel); border-left: 4px solid var(--blue); overflow-wrap: anywhere; }
.note { color: var(--soft); font-size: .875rem; max-width: 52em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; font-weight: normal; }
thead th { font-weight: 600; vertical-align: bottom; }
.numbers td, .numbers thead * + th { text-align: right; font-variant-numeric: tabular-nums; }
.numbers small { display: block; color: var(--soft); font-size: .8rem; font-weight: normal; }
.numbers td { white-space: nowrap; }
.wins { margin-bottom: 1rem; }
.wins th[scope=rowgroup] { color: var(--soft); font-size: .85rem; padding-top: .8rem; }
td.up { color: var(--good); font-weight: 600; }
td.down { color: var(--bad); font-weight: 600; }
tfoot th, tfoot td { font-weight: 600; border-bottom: 0; }
.stages td:nth-child(2) { white-space: nowrap; text-align: right; }
.settings { width: 100%; font-size: .85rem; }
.settings th { width: 40%; }
.settings th, .settings td, .stages td:last-child { overflow-wrap: anywhere; }
section.plots { columns: 26rem; column-gap: 1.5rem; }
section.plots h2 { column-span: all; }
figure { margin: 0 0 1.5rem; break-inside: avoid; }
img { display: block; width: 100%; height: auto; background: #fff; border-radius: 6px; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .4rem; }
article { background: var(--panel); border-radius: 8px; padding: 1rem; margin-bottom: 1rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 .75rem; }
.answers { display: grid; margin-top: .75rem; gap: .5rem 1.25rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); }
.answers > div { border-top: 3px solid var(--line); padding-top: .5rem; }
.answers > .first { border-color: var(--orange); }
.answers > .last { border-color: var(--blue); }
summary { cursor: pointer; overflow-wrap: anywhere; white-space: pre-wrap; }
details[open] .start { display: none; }
pre { background: var(--panel); padding: .9rem 1rem; border-radius: 6px; overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
@media (max-width: 600px) {
  main { padding: 1rem .75rem 3rem; }
  h1 { font-size: 1.35rem; }
  .headline { font-size: 1rem; padding: .75rem .9rem; }
  th, td { padding: .4rem .3rem; }
  .numbers { font-size: .82rem; }
  .numbers small { font-size: .72rem; }
  .numbers td:last-child small { white-space: normal; }
  .numbers th, .numbers td { padding: .4rem .2rem; }
  .numbers th[scope=row] { min-width: 5.2rem; overflow-wrap: anywhere; position: sticky; left: 0;
    background: var(--page); }
}
@media print { details { display: block; } }
"""
