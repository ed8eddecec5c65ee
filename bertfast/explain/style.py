"""The page's style: signs are told by marks, sides and patterns as well as by colour."""

CSS = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --quiet: #5a5a5a;
  --line: #c9c9c9; --for: #0b5cad; --against: #a34700; --tint: .30; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #161616; --quiet: #a8a8a8; --line: #4a4a4a;
    --for: #6db3f8; --against: #ffa45c; --tint: .38; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .25rem; }
p { margin: .4rem 0; } .quiet { color: var(--quiet); font-size: .9rem; }
a { color: var(--for); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; margin: .6rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .6rem .2rem 0; text-align: start;
  vertical-align: top; }
.text { white-space: pre-wrap; line-height: 1.3; padding: .3rem 0; }
.w { display: inline-block; max-width: 100%; position: relative;
  padding: .1rem 0 1.3rem; --hue: var(--for); }
.w::before { content: ""; position: absolute; left: 0; right: 0; bottom: .6rem; height: 1px;
  background: var(--line); }
.w::after { content: ""; position: absolute; left: 1px; right: 1px;
  height: calc(var(--s) * .55rem); }
.n { --hue: var(--against); }
.p::after { bottom: calc(.6rem + 1px); background: var(--hue); }
.n::after { top: calc(100% - .6rem); border: 1px solid var(--hue);
  background: repeating-linear-gradient(45deg, var(--hue) 0 1px, transparent 1px 4px); }
.p > span, .n > span { background: color-mix(in srgb, var(--hue) calc(var(--s) * 100% *
  var(--tint)), transparent); }
.p.m > span { text-decoration: underline 2px solid var(--hue); }
.n.m > span { text-decoration: underline 2px wavy var(--hue); }
.m > b { font-size: .7em; line-height: 0; vertical-align: super; color: var(--hue); }
.u { color: var(--quiet); font-style: italic; text-decoration: line-through; }
.bad { border-inline-start: 4px solid var(--against); padding-inline-start: .5rem; }
@media print { .w::before, .w::after, .w > span { print-color-adjust: exact; } }
"""
