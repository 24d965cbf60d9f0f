"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { length, heads, layers, names } = data;
  const rows = layers.length * heads;
  const unpack = (text) => {
    const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return Uint8Array.from({ length: rows * length }, (_, i) => (packed[i >> 3] >> (i & 7)) & 1);
  };
  const kept = Object.fromEntries(Object.entries(data.kept).map(([name, bits]) => [name, unpack(bits)]));
  const text = document.getElementById("text");
  const tokens = Array.from(text.children);
  const status = document.getElementById("status");
  const layerChoice = document.getElementById("layer");
  const maps = [
    { canvas: document.getElementById("by-layer"), span: heads },
    { canvas: document.getElementById("by-head"), span: 1 },
  ];
  let here = -1;
  let row = -1; // of the map by head; -1 for none

  const mode = () => document.querySelector("input[name=mode]:checked").value.split("-");
  const allRows = () => {
    const layer = layerChoice.value;
    return layer === "" ? [0, rows] : [Number(layer) * heads, (Number(layer) + 1) * heads];
  };
  // How many of the rows [from, to) keep a token.
  const count = (name, token, from, to) => {
    let sum = 0;
    for (let r = from; r < to; r++) sum += kept[name][r * length + token];
    return sum;
  };
  // Square root: most tokens are kept by few heads, and these few must be seen.
  const shade = (share) => Math.sqrt(share);

  function shadeText() {
    const [mine, other] = mode();
    const [from, to] = allRows();
    tokens.forEach((token, i) => {
      let share = count(mine, i, from, to) / (to - from);
      if (other) share -= count(other, i, from, to) / (to - from);
      token.style.setProperty("--k", shade(Math.abs(share)).toFixed(3));
      token.classList.toggle("o", share < 0);
    });
    const legend = document.getElementById("legend");
    if (other) {
      const steps = [0.1, 0.5, 1];
      legend.replaceChildren(label(`more heads in ${names[mine]}:`), ...steps.flatMap((step) => swatch(step, "--mine")));
      legend.append(label(`in ${names[other]}:`), ...steps.flatMap((step) => swatch(step, "--other")));
    } else {
      legend.replaceChildren(label("share of the heads that keep a token:"));
      legend.append(...[0, 0.02, 0.1, 0.5, 1].flatMap((step) => swatch(step, "--mine")));
    }
  }

  function label(content) {
    const element = document.createElement("span");
    element.textContent = content;
    return element;
  }

  function swatch(step, hue) {
    const box = document.createElement("i");
    box.style.setProperty("--k", shade(step).toFixed(3));
    box.style.setProperty("--hue", `var(${hue})`);
    return [box, label(`${step * 100} %`)];
  }

  function color(name) {
    const probe = document.createElement("i");
    probe.style.color = getComputedStyle(document.documentElement).getPropertyValue(name);
    document.body.append(probe);
    const found = getComputedStyle(probe).color.match(/\d+/g).slice(0, 3).map(Number);
    probe.remove();
    return found;
  }

  function drawMap({ canvas, span }) {
    const scale = window.devicePixelRatio || 1;
    const width = (canvas.width = Math.max(1, Math.round(canvas.clientWidth * scale)));
    const height = (canvas.height = Math.max(1, Math.round(canvas.clientHeight * scale)));
    const lines = rows / span;
    const [mine, other] = mode();
    const colors = { paper: color("--paper"), mine: color("--mine"), other: color("--other") };
    // Where a pixel is narrower than a token, it shows the mean of its tokens.
    const columns = Math.min(width, length);
    const cells = new Float32Array(lines * columns);
    for (let line = 0; line < lines; line++) {
      for (let column = 0; column < columns; column++) {
        const start = Math.floor((column * length) / columns);
        const end = Math.max(start + 1, Math.floor(((column + 1) * length) / columns));
        let sum = 0;
        for (let token = start; token < end; token++) {
          sum += count(mine, token, line * span, (line + 1) * span);
          if (other) sum -= count(other, token, line * span, (line + 1) * span);
        }
        cells[line * columns + column] = sum / (span * (end - start));
      }
    }
    const context = canvas.getContext("2d");
    const image = context.createImageData(width, height);
    for (let y = 0; y < height; y++) {
      const line = Math.floor((y * lines) / height);
      for (let x = 0; x < width; x++) {
        const value = cells[line * columns + Math.floor((x * columns) / width)];
        const ink = value < 0 ? colors.other : colors.mine;
        const weight = shade(Math.abs(value));
        for (let c = 0; c < 3; c++) {
          image.data[(y * width + x) * 4 + c] = colors.paper[c] + (ink[c] - colors.paper[c]) * weight;
        }
        image.data[(y * width + x) * 4 + 3] = 255;
      }
    }
    context.putImageData(image, 0, 0);
    context.strokeStyle = `rgb(${color("--line")})`;
    const step = height / layers.length;
    if (span === 1) for (let l = 1; l < layers.length; l++) context.strokeRect(-1, Math.round(l * step) + 0.5, width + 2, 0);
    if (here < 0) return;
    context.strokeStyle = `rgb(${color("--cursor")})`;
    context.lineWidth = scale;
    const x = ((here + 0.5) * width) / length;
    context.beginPath();
    context.moveTo(x, 0);
    context.lineTo(x, height);
    if (row >= 0) {
      const y = ((Math.floor(row / span) + 0.5) * height) / lines;
      context.moveTo(0, y);
      context.lineTo(width, y);
    }
    context.stroke();
  }

  function describe() {
    if (here < 0) return;
    const [from, to] = allRows();
    const written = JSON.stringify(tokens[here].textContent);
    const parts = mode().map((name) => `${names[name]}: ${count(name, here, from, to)} of ${to - from} heads`);
    let line = `Token ${(here + 1).toLocaleString("en")} of ${length.toLocaleString("en")}, ${written}. Kept by ${parts.join("; ")}.`;
    if (row >= 0) {
      const [mine] = mode();
      const keeps = kept[mine][row * length + here] ? "keeps" : "evicts";
      line += ` Layer ${layers[Math.floor(row / heads)]}, head ${row % heads} ${keeps} it.`;
    }
    status.textContent = line;
  }

  function go(token, newRow) {
    if (here >= 0) tokens[here].classList.remove("here");
    here = Math.min(Math.max(token, 0), length - 1);
    row = newRow;
    tokens[here].classList.add("here");
    const top = tokens[here].offsetTop - text.offsetTop;
    if (top < text.scrollTop + 20 || top > text.scrollTop + text.clientHeight - 40) {
      text.scrollTop = top - text.clientHeight / 2;
    }
    describe();
    maps.forEach(drawMap);
  }

  function redraw() {
    shadeText();
    describe();
    maps.forEach(drawMap);
  }

  // Left and right, Home and End: tokens. Up and down, in a map: layers or heads.
  function onKey(event, span) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const stride = event.shiftKey ? 20 : 1;
    const steps = { ArrowLeft: -stride, ArrowRight: stride, Home: -length, End: length };
    if (event.key in steps) go(here + steps[event.key], row);
    else if (span && event.key === "ArrowDown") go(here, row < 0 ? 0 : Math.min(row + span, rows - 1));
    else if (span && event.key === "ArrowUp") go(here, Math.max(row - span, 0));
    else if (event.key === "Escape") go(here, -1);
    else return;
    event.preventDefault();
  }

  text.addEventListener("keydown", (event) => onKey(event, 0));
  text.addEventListener("click", (event) => {
    const token = tokens.indexOf(event.target);
    if (token >= 0) go(token, row);
  });
  for (const map of maps) {
    map.canvas.addEventListener("keydown", (event) => onKey(event, map.span));
    map.canvas.addEventListener("click", (event) => {
      const box = map.canvas.getBoundingClientRect();
      const line = Math.floor(((event.clientY - box.top) / box.height) * (rows / map.span));
      go(Math.floor(((event.clientX - box.left) / box.width) * length), line * map.span);
    });
  }
  document.querySelector(".controls").addEventListener("change", redraw);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  window.addEventListener("resize", () => maps.forEach(drawMap));
  redraw();
})();
