"use strict";
// Says the values under the pointer, or at the step that the arrow keys choose. Everything else reads without it.
for (const plot of document.querySelectorAll("[data-chart]")) {
  const chart = JSON.parse(plot.dataset.chart), svg = plot.querySelector("svg"), box = chart.box;
  const number = value => String(value).replaceAll("-", "\u2212");
  const across = step => box[0] + (step - chart.x[0]) / (chart.x[1] - chart.x[0]) * (box[2] - box[0]);
  const up = value => box[3] - (value - chart.y[0]) / (chart.y[1] - chart.y[0]) * (box[3] - box[1]);
  const nearest = (steps, wanted) => {
    let low = Math.min(0, steps.length - 1), high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] <= wanted) low = middle; else high = middle;
    }
    return wanted - steps[low] <= steps[high] - wanted ? low : high;
  };
  const add = (parent, name, text) => {
    const made = parent.namespaceURI === svg.namespaceURI
      ? document.createElementNS(svg.namespaceURI, name) : document.createElement(name);
    if (text !== undefined) made.textContent = text;
    return parent.appendChild(made);
  };
  const cursor = add(svg, "g"), line = add(cursor, "line"), readout = add(plot, "div");
  cursor.setAttribute("class", "cursor");
  readout.className = "readout";
  readout.setAttribute("role", "status");
  const longest = chart.series.map(each => each.steps).reduce((a, b) => b.length > a.length ? b : a);
  let at = null;

  const hide = () => { at = null; cursor.style.display = readout.style.display = "none"; };
  const show = wanted => {
    const points = chart.series.flatMap((each, index) => {
      const at = nearest(each.steps, wanted);
      return at < 0 ? [] : [{kind: `s${index + 1}`, label: each.label, step: each.steps[at], value: each.values[at]}];
    });
    at = points.map(each => each.step).reduce((a, b) => Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a);
    cursor.querySelectorAll("circle").forEach(dot => dot.remove());
    readout.replaceChildren();
    add(readout, "b", `step ${at}`);
    points.forEach(each => {
      const entry = add(readout, "div"), dot = add(cursor, "circle");
      add(entry, "i").className = each.kind;
      if (chart.series.length > 1) add(entry, "span", `${each.label} `);
      add(entry, "output", number(each.value));
      if (each.step !== at) add(entry, "small", ` step ${each.step}`);
      dot.setAttribute("class", each.kind);
      dot.setAttribute("cx", across(each.step));
      dot.setAttribute("cy", up(each.value));
      dot.setAttribute("r", 3.5);
    });
    for (const [name, value] of [["x1", across(at)], ["x2", across(at)], ["y1", box[1]], ["y2", box[3]]])
      line.setAttribute(name, value);
    cursor.style.display = readout.style.display = "";
    const x = across(at) / svg.viewBox.baseVal.width * plot.clientWidth, beside = x + 12 + readout.offsetWidth;
    readout.style.left = `${Math.max(0, beside <= plot.clientWidth ? x + 12 : x - 12 - readout.offsetWidth)}px`;
  };

  hide();
  svg.setAttribute("tabindex", "0");
  const pointed = event => {
    const place = svg.getBoundingClientRect();
    const x = (event.clientX - place.left) / place.width * svg.viewBox.baseVal.width;
    show(chart.x[0] + (x - box[0]) / (box[2] - box[0]) * (chart.x[1] - chart.x[0]));
  };
  svg.addEventListener("pointermove", pointed);
  svg.addEventListener("pointerdown", pointed);
  svg.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") hide(); });
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", event => {
    const by = {ArrowLeft: -1, ArrowRight: 1}[event.key], steps = longest;
    if (by === undefined) return;
    event.preventDefault();
    const from = at === null ? steps.length - 1 - (by > 0) : nearest(steps, at);
    show(steps[Math.min(steps.length - 1, Math.max(0, from + by))]);
  });
}
