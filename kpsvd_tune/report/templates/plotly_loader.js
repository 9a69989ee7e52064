"use strict";
// plotly.js stands in the page gzipped, in base64.
const plotlyLoaded = (async () => {
  const packed = atob(document.getElementById("plotly").textContent);
  const bytes = Uint8Array.from(packed, (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
})();
plotlyLoaded.catch((error) => {
  const message = document.createElement("p");
  message.setAttribute("role", "alert");
  message.textContent = `The figures need a browser of 2023 or newer (${error}); tables do without.`;
  document.querySelector("header").after(message);
});
