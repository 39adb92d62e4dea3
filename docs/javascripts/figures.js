// Draw the figures of the notebooks' pages with the copy of plotly that the site holds: at their own size, shrunk to
// the page's width, and on a narrow screen scrolled where they would become unreadable.
document.addEventListener("DOMContentLoaded", () => {
  const figures = [...document.querySelectorAll(".plotly-figure")];
  if (!figures.length) return;
  const fit = (place) => {
    const inner = place.firstElementChild;
    const scale = Math.min(1, Math.max(0.6, place.clientWidth / Number(inner.dataset.width)));
    inner.style.transform = `scale(${scale})`;
    inner.parentElement.style.height = `${Number(inner.dataset.height) * scale + 12}px`;
  };
  const draw = (place) => {
    const { data, layout } = JSON.parse(place.querySelector("script").textContent);
    const width = layout.width || 860;
    const height = layout.height || 450;
    const inner = document.createElement("div");
    Object.assign(inner.dataset, { width, height });
    Object.assign(inner.style, { width: `${width}px`, height: `${height}px`, transformOrigin: "0 0" });
    place.replaceChildren(inner);
    fit(place);
    Plotly.newPlot(inner, data, { ...layout, width, height }, { displaylogo: false, displayModeBar: false });
  };
  const script = document.createElement("script");
  script.src = new URL("plotly.min.js", document.querySelector("script[src*='javascripts/figures']").src);
  script.onload = () => {
    figures.forEach(draw);
    window.addEventListener("resize", () => figures.forEach(fit));
  };
  document.head.append(script);
});
