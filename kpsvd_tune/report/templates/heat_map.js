// Heat maps of layers and kinds of modules, and what every chart beside them shares.
const byId = (id) => document.getElementById(id);
const config = { displaylogo: false, responsive: true, modeBarButtons: [["toImage"]] };

function compact(value) {
  if (value >= 999500) return (value / 1e6).toFixed(1) + "M";
  if (value >= 9950) return Math.round(value / 1e3) + "k";
  return value >= 1000 ? (value / 1e3).toFixed(1) + "k" : String(value);
}

function colour(name) {
  return getComputedStyle(root).getPropertyValue("--" + name).trim();
}

// What both charts share: the colours of the page, and no chart background of their own.
function look(layout) {
  const axis = { gridcolor: colour("line"), linecolor: colour("line"), zeroline: false, fixedrange: true };
  return {
    ...layout,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("text"), size: 12, family: getComputedStyle(document.body).fontFamily },
    hoverlabel: { align: "left" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("quiet"), activecolor: colour("text") },
    dragmode: false,
    xaxis: { ...axis, ...layout.xaxis },
    yaxis: { ...axis, ...layout.yaxis },
  };
}

// One cell for each layer (columns) and kind of module (rows); cells hold places in values, or null.
function drawHeatMap(id, { columns, rows, cells }, { values, title, format, cell, hover, outline, step }) {
  const each = (make, empty) => cells.map((row) => row.map((i) => (i === null ? empty : make(i))));
  const high = Math.max(0, ...values.filter((value) => value !== null));
  const dark = root.dataset.theme === "dark";
  const mapWidth = byId(id).clientWidth;
  // On a phone the end of a kind's name must do, where that still tells them apart.
  const ends = rows.map((row) => row.slice(row.lastIndexOf(".") + 1));
  const names = mapWidth < 560 && new Set(ends).size === ends.length ? ends : rows;
  // Pixels of a cell: names of the rows stand to its left, the colour bar to its right.
  const longest = Math.max(...names.map((name) => name.length));
  const cellWidth = (mapWidth - 90 - 7 * longest) / columns.length;
  const every = Math.max(1, Math.ceil(24 / Math.max(1, cellWidth)));
  const ticks = columns.map((_, i) => i).filter((i) => i % every === 0 || columns[i] === "other");
  const box = outline && {
    type: "rect", x0: outline.column - 0.5, x1: outline.column + 0.5, y0: outline.row - 0.5, y1: outline.row + 0.5,
    line: { color: colour("accent"), width: 3 },
  };
  // The figures stand in the cells as long as they fit.
  const text = each((i) => (values[i] === null ? "–" : cell(values[i])), "");
  const widest = Math.max(...text.flat().map((each) => each.length));
  return Plotly.react(id, [{
    type: "heatmap",
    z: each((i) => values[i], null),
    text,
    texttemplate: cellWidth >= Math.max(26, 7 * widest + 4) ? "%{text}" : "",
    textfont: { size: 11 },
    hovertext: each((i) => hover[i], ""),
    hoverinfo: "text",
    hoverongaps: false,
    // From nothing: a colour stands for how much there is.
    zmin: 0,
    zmax: high > 0 ? high : 1,
    // Few terms look like the background, many stand out, in either theme.
    colorscale: "YlGnBu",
    reversescale: !dark,
    xgap: 2,
    ygap: 2,
    colorbar: { title: { text: `${title}<br> ` }, tickformat: format, thickness: 12, outlinewidth: 0, nticks: 6,
      len: 1, dtick: step },
  }], look({
    height: 74 + rows.length * (rows.length > 24 ? 18 : 30),
    margin: { l: 10, r: 10, t: 14, b: 40 },
    xaxis: { title: { text: "layer", standoff: 8 }, tickvals: ticks, ticktext: ticks.map((i) => columns[i]),
      showgrid: false, ticks: "" },
    yaxis: { tickvals: rows.map((_, i) => i), ticktext: names, autorange: "reversed",
      automargin: true, showgrid: false, ticks: "", ticksuffix: " " },
    shapes: box ? [box] : [],
  }), config);
}
