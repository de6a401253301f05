"use strict";
// Reads out the charts' values and copies commands. The page says everything without it. Texts only become text nodes.
(() => {
  const { charts, box } = JSON.parse(document.getElementById("charts").textContent);

  function element(name, text, className) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  function shown(value) {
    return value === null ? "–" : String(value);
  }

  function attach(id, chart) {
    const plot = document.getElementById(id).querySelector(".plot");
    const svg = plot.querySelector("svg");
    const cursor = plot.querySelector(".cursor");
    const values = plot.querySelector(".values");
    const [first, last] = chart.range;
    const place = (step) => box.left + ((step - first) / (last - first)) * (box.width - box.left - box.right);
    let row = null;

    function hide() {
      row = null;
      values.hidden = true;
      plot.classList.remove("reading");
    }

    function show(wanted) {
      row = Math.max(0, Math.min(chart.steps.length - 1, wanted));
      const x = place(chart.steps[row]);
      cursor.setAttribute("transform", `translate(${x},0)`);
      plot.classList.add("reading");
      values.replaceChildren(element("b", `step ${chart.steps[row]}`));
      chart.names.forEach((name, column) => {
        const line = element("span", undefined, `c${chart.colours[column]}`);
        const text = element("em");
        text.append(element("bdi", name), ` ${shown(chart.values[column][row])}`);
        line.append(element("i"), text);
        values.append(line);
      });
      values.hidden = false;
      const right = x > box.width / 2;
      const gap = 100 * (right ? 1 - x / box.width : x / box.width) + 3;
      values.style.right = right ? `${gap}%` : "auto";
      values.style.left = right ? "auto" : `${gap}%`;
    }

    function nearest(step) {
      let low = 0;
      let high = chart.steps.length - 1;
      while (low < high) {
        const middle = (low + high) >> 1;
        if (chart.steps[middle] < step) low = middle + 1;
        else high = middle;
      }
      return low > 0 && step - chart.steps[low - 1] < chart.steps[low] - step ? low - 1 : low;
    }

    function follow(event) {
      const frame = svg.getBoundingClientRect();
      const x = ((event.clientX - frame.left) / frame.width) * box.width;
      show(nearest(first + ((x - box.left) / (box.width - box.left - box.right)) * (last - first)));
    }

    plot.addEventListener("pointermove", follow);
    plot.addEventListener("pointerdown", follow);
    plot.addEventListener("pointerleave", () => { if (document.activeElement !== plot) hide(); });
    plot.addEventListener("focus", () => { if (row === null) show(chart.steps.length - 1); });
    plot.addEventListener("blur", hide);
    plot.addEventListener("keydown", (event) => {
      const far = Math.max(1, Math.round(chart.steps.length / 10));
      const at = row === null ? chart.steps.length - 1 : row;
      const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, PageUp: at - far, PageDown: at + far, Home: 0, End: Infinity };
      if (event.key === "Escape") hide();
      else if (event.key in moves) {
        event.preventDefault();
        show(moves[event.key]);
      }
    });
  }

  Object.entries(charts).forEach(([id, chart]) => attach(id, chart));

  async function copy(code) {
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch {  // not every browser gives a local file the clipboard
      getSelection().selectAllChildren(code);
      if (!document.execCommand("copy")) return false;
      getSelection().removeAllRanges();
    }
    return true;
  }

  document.querySelectorAll(".copy").forEach((button) => {
    button.hidden = false;
    const label = button.firstChild;
    button.addEventListener("click", async () => {
      label.data = (await copy(button.parentElement.querySelector("code"))) ? "Copied" : "Press Ctrl+C";
      setTimeout(() => { label.data = "Copy"; }, 2000);
    });
  });
  document.documentElement.dataset.ready = "yes";
})();
