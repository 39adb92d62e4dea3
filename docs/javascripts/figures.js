// Draw the figures of the notebooks' pages with the copy of plotly that the site holds.
document.addEventListener("DOMContentLoaded", () => {
  const figures = document.querySelectorAll(".plotly-figure");
  if (!figures.length) return;
  const script = document.createElement("script");
  script.src = new URL("plotly.min.js", document.querySelector("script[src*='javascripts/figures']").src);
  script.onload = () => {
    for (const place of figures) {
      const { data, layout } = JSON.parse(place.querySelector("script").textContent);
      const height = layout.height || 450;
      const narrow = place.clientWidth < 600;
      const fitted = { ...layout, width: undefined, height, autosize: true };
      if (narrow) fitted.legend = { ...(layout.legend || {}), orientation: "h", x: 0, y: -0.2, xanchor: "left", yanchor: "top" };
      Plotly.newPlot(place, data, fitted, { responsive: true, displaylogo: false });
    }
  };
  document.head.append(script);
});
