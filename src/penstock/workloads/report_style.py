"""The style sheet and the tooltip script of `report.html`, as text to embed: the file fetches nothing."""

from __future__ import annotations

PALETTE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #14181f; --soft: #5b6472; --faint: #8a93a1; --rule: #e4e7ec;
  --s1: #2563c9; --s2: #d9730d; --s3: #0f8a6d; --s4: #7a4fd0; --s5: #c22f78;
  --s6: #6b7280; --bad: #c8323c; --good: #1a8f5a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f1217; --card: #171b22; --ink: #e8ecf2; --soft: #a3adba; --faint: #76808e; --rule: #272d37;
    --s1: #6aa2ff; --s2: #f5a04e; --s3: #3fc9a3; --s4: #b394f5; --s5: #ff7eb6;
    --s6: #a7b0bd; --bad: #ff6b74; --good: #4cc98d;
  }
}
"""

# What is drawn inside a picture; it also stands in pictures of their own (`charts.standalone`).
DRAWING = """
.s1 { --tone: var(--s1); } .s2 { --tone: var(--s2); } .s3 { --tone: var(--s3); } .s4 { --tone: var(--s4); }
.s5 { --tone: var(--s5); } .s6 { --tone: var(--s6); }
.lost { --tone: var(--bad); } .gained { --tone: var(--good); }
svg text { font-size: 11px; fill: var(--faint); }
svg .grid { stroke: var(--rule); }
svg .line { fill: none; stroke: var(--tone); stroke-width: 1.8; stroke-linejoin: round; }
svg .area { fill: var(--tone); opacity: .13; }
svg .dot { fill: var(--tone); }
svg line.mark { stroke: var(--faint); stroke-dasharray: 4 3; }
svg text.mark { fill: var(--soft); }
"""

CSS = (
    PALETTE
    + """
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums;
}
main { max-width: 1200px; margin: 0 auto; padding: 32px 24px 56px; }
header .kind {
  color: var(--s1); font-weight: 600; letter-spacing: .06em; text-transform: uppercase; font-size: 12px;
}
h1 { margin: 2px 0 4px; font-size: 26px; line-height: 1.2; letter-spacing: -.01em; overflow-wrap: anywhere; }
header p { margin: 0; color: var(--soft); overflow-wrap: anywhere; }
h2 { margin: 36px 0 12px; font-size: 16px; }
h3 { margin: 0; font-size: 14px; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.note.card { margin: 14px 0 0; padding: 10px 14px; border-left: 4px solid var(--s2); }
.note.bad { border-left-color: var(--bad); }
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(172px, 1fr)); gap: 12px; margin-top: 22px;
}
.tile { padding: 14px 16px; }
.tile .name { color: var(--soft); font-size: 12.5px; }
.tile .value { font-size: 25px; font-weight: 620; line-height: 1.25; letter-spacing: -.01em; }
.tile .value small { font-size: 14px; font-weight: 500; color: var(--soft); }
.tile .note { color: var(--faint); font-size: 12.5px; }
.tile.bad .value { color: var(--bad); }
.tile.good .value { color: var(--good); }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 12px; }
.trio { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 12px; }
@media (max-width: 820px) { .pair, .trio { grid-template-columns: minmax(0, 1fr); } }
figure { margin: 0; padding: 14px 16px 8px; position: relative; }
figcaption p { margin: 0; color: var(--faint); font-size: 12.5px; }
.legend { display: flex; gap: 14px; margin-top: 4px; font-size: 12.5px; color: var(--soft); }
.key::before {
  content: ""; display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 6px;
  background: var(--tone);
}
.none { padding: 60px 0; text-align: center; color: var(--faint); }
svg { display: block; width: 100%; height: auto; margin-top: 6px; }
"""
    + DRAWING
    + """
svg .cursor { stroke: var(--soft); stroke-width: 1; visibility: hidden; }
.tip { position: absolute; pointer-events: none; padding: 7px 10px; border-radius: 8px; font-size: 12.5px;
  background: var(--ink); color: var(--page); white-space: nowrap; z-index: 2; }
.tip b { display: block; }
.tip .key { display: block; }
.bars { padding: 6px 16px 14px; }
.bar { display: grid; grid-template-columns: minmax(90px, 190px) 1fr 74px; gap: 12px; align-items: center;
  margin-top: 9px; }
.bar .track { height: 12px; border-radius: 6px; background: var(--rule); overflow: hidden; }
.bar .fill { height: 100%; border-radius: 6px; background: var(--tone); }
.bar .share { text-align: right; font-weight: 600; }
.bar .parts { display: flex; justify-content: space-between; }
.bar.wide { grid-template-columns: minmax(90px, 210px) 1fr 270px; }
.bars h3 { margin-top: 12px; }
.bar.part { font-size: 12.5px; color: var(--soft); }
.bar.part .track { height: 7px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { padding: 7px 16px; text-align: right; border-top: 1px solid var(--rule); white-space: nowrap; }
tr:first-child th, tr:first-child td { border-top: 0; }
th { color: var(--soft); font-weight: 500; }
th:first-child, td:first-child { text-align: left; }
table.facts td { text-align: left; }
table.facts td:first-child { width: 200px; color: var(--soft); }
table.facts td:last-child { white-space: normal; overflow-wrap: anywhere; }
footer { margin-top: 36px; color: var(--faint); font-size: 12.5px; }
@media print { body { background: #fff; } .card { break-inside: avoid; } }
"""
)

SCRIPT = """
for (const figure of document.querySelectorAll("figure.chart")) {
  const source = figure.querySelector("script"), svg = figure.querySelector("svg");
  if (!source || !svg) continue;
  const data = JSON.parse(source.textContent), cursor = svg.querySelector(".cursor");
  const dots = data.series.map(series => {
    const dot = document.createElementNS("http://www.w3.org/2000/svg", "circle");
    dot.setAttribute("class", "dot " + series.tone);
    dot.setAttribute("r", 3.5);
    dot.style.visibility = "hidden";
    return svg.appendChild(dot);
  });
  const tip = figure.appendChild(document.createElement("div"));
  tip.className = "tip";
  tip.hidden = true;
  const hide = () => {
    tip.hidden = true;
    for (const mark of [cursor, ...dots]) mark.style.visibility = "hidden";
  };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const at = (event.clientX - box.left) * scale;
    let best = 0;
    data.x.forEach((x, index) => { if (Math.abs(x - at) < Math.abs(data.x[best] - at)) best = index; });
    cursor.setAttribute("x1", data.x[best]);
    cursor.setAttribute("x2", data.x[best]);
    cursor.style.visibility = "visible";
    tip.textContent = "";
    tip.appendChild(document.createElement("b")).textContent = data.label[best];
    data.series.forEach((series, index) => {
      const line = tip.appendChild(document.createElement("span")), y = series.y[best];
      line.className = "key " + series.tone;
      line.textContent = series.name + "  " + series.text[best];
      dots[index].style.visibility = y === null ? "hidden" : "visible";
      if (y !== null) { dots[index].setAttribute("cx", data.x[best]); dots[index].setAttribute("cy", y); }
    });
    tip.hidden = false;
    const outer = figure.getBoundingClientRect(), x = box.left - outer.left + data.x[best] / scale;
    tip.style.left = (x + tip.offsetWidth + 24 > outer.width ? x - tip.offsetWidth - 12 : x + 12) + "px";
    tip.style.top = (box.top - outer.top + 16) + "px";
  });
}
"""
