// Line figures whose traces say the place of their colour; each theme has colours of its own.
function paint(trace, colours) {
  const colour = colours[trace.meta.colour % colours.length];
  return {
    ...trace,
    ...(trace.line && { line: { color: colour, ...trace.line } }),
    ...(trace.marker && { marker: { color: colour, ...trace.marker } }),
    ...(trace.error_y && { error_y: { color: colour, ...trace.error_y } }),
    ...(trace.fill && { fillcolor: colour }),
  };
}

function drawFigure(id, traces, { x, y }, palettes) {
  if (!window.Plotly) return;
  const style = getComputedStyle(root);
  const text = style.getPropertyValue("--text"), line = style.getPropertyValue("--line");
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, automargin: true };
  Plotly.react(id, traces.map((trace) => paint(trace, palettes[root.dataset.theme])), {
    margin: { l: 55, r: 10, t: 10, b: 45 }, paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)", font: { color: text, size: 13 },
    xaxis: { ...axis, ...x }, yaxis: { ...axis, ...y },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: line, activecolor: text },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 }, hovermode: "closest",
  }, { displaylogo: false, responsive: true });
}
