"use strict";
// Tabs, sorting and filtering. Without scripts all parts of the page are shown, one after another.
(() => {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  const show = (tab) => {
    for (const other of tabs) {
      const chosen = other === tab;
      other.setAttribute("aria-selected", String(chosen));
      other.tabIndex = chosen ? 0 : -1;
      document.getElementById(other.getAttribute("aria-controls")).hidden = !chosen;
    }
  };
  const fromFragment = () => tabs.find((tab) => `#${tab.id}` === location.hash) || tabs[0];
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => {
      history.replaceState(null, "", `#${tab.id}`);
      show(tab);
    });
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = tabs[(i + step + tabs.length) % tabs.length];
      next.focus();
      next.click();
    });
  });
  if (tabs.length > 1) {
    document.querySelector("nav[role=tablist]").hidden = false;
    show(fromFragment());
    addEventListener("hashchange", () => show(fromFragment()));
  }

  const valueOf = (cell) => (cell.dataset.number === undefined ? cell.textContent : Number(cell.dataset.number));
  const isEmpty = (value) => value === "" || Number.isNaN(value);
  // Numbers before texts; empty cells come last in either order.
  const compare = (a, b, sign) => {
    if (isEmpty(a) || isEmpty(b)) return isEmpty(a) - isEmpty(b);
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    return sign * (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
  };
  const operators = {
    ">": (a, b) => a > b,
    "<": (a, b) => a < b,
    ">=": (a, b) => a >= b,
    "<=": (a, b) => a <= b,
    "=": (a, b) => a === b,
  };

  // Rows of a table: those of its markup, or of its data, of which only a part is shown.
  const PART = 100;
  const searchText = (texts, search) => [...texts, search || ""].join(" ").toLowerCase();
  const rowsOfMarkup = (body) =>
    [...body.rows].map((row) => {
      const text = searchText([...row.cells].map((cell) => cell.textContent), row.dataset.search);
      return { value: (column) => valueOf(row.cells[column]), text: () => text, element: () => row };
    });
  const rowsOfData = (data) => {
    const expand = ({ values, of, at }) => (i) => (values ? values[i] : of[at.length ? at[i] : 0]);
    const texts = data.columns.map(expand);
    const search = expand(data.search);
    const best = new Set(data.best);
    const numeric = data.columns.map((column) => column.numeric);
    const valueAt = (i, column) => {
      const found = texts[column](i);
      const isNumber = numeric[column] && found !== "" && !Number.isNaN(Number(found));
      return isNumber ? Number(found) : found;
    };
    const element = (i) => {
      const row = document.createElement("tr");
      row.classList.toggle("best", best.has(i));
      texts.forEach((text, column) => {
        const cell = row.insertCell();
        cell.textContent = text(i);
        if (typeof valueAt(i, column) === "number") cell.dataset.number = valueAt(i, column);
        else if (cell.textContent.length > 32) cell.className = "long";
      });
      return row;
    };
    const textOf = (i) => searchText(texts.map((text) => text(i)), search(i));
    return Array.from({ length: data.rows }, (_, i) => {
      let kept;
      return { value: (column) => valueAt(i, column), text: () => (kept ??= textOf(i)), element: () => element(i) };
    });
  };

  const markOverflow = () => {
    for (const block of document.querySelectorAll(".table")) {
      const box = block.querySelector(".scroll");
      block.toggleAttribute("data-more", box.scrollLeft + box.clientWidth < box.scrollWidth - 1);
    }
  };

  for (const block of document.querySelectorAll(".table")) {
    const body = block.querySelector("tbody");
    const heads = [...block.querySelectorAll("th")];
    const data = block.querySelector("script[type='application/json']");
    const rows = data ? rowsOfData(JSON.parse(data.textContent)) : rowsOfMarkup(body);
    let matching = rows;
    let order = [...rows];
    let begin = 0;
    const draw = () => {
      const shown = new Set(matching);
      if (!data) {
        for (const row of rows) row.element().hidden = !shown.has(row);
        return body.append(...order.map((row) => row.element()));
      }
      const kept = order.filter((row) => shown.has(row));
      const last = Math.max(0, Math.ceil(kept.length / PART) - 1) * PART;
      begin = Math.min(Math.max(begin, 0), last);
      const part = kept.slice(begin, begin + PART);
      body.replaceChildren(...part.map((row) => row.element()));
      const [first, back, next, end] = block.querySelectorAll(".pages button");
      for (const [button, to] of [[first, 0], [back, begin - PART], [next, begin + PART], [end, last]]) {
        button.hidden = false;
        button.disabled = to === begin || to < 0 || to > last;
        button.onclick = () => {
          begin = to;
          draw();
          block.querySelector(".scroll").scrollTop = 0;
        };
      }
      const place = kept.length ? `rows ${begin + 1} to ${begin + part.length} of ${kept.length}` : "no rows";
      block.querySelector(".pages output").textContent = place;
      markOverflow();
    };
    const sortBy = (keyed) => {
      order = keyed;
      begin = 0;
      draw();
    };
    heads.forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
        const keyed = rows.map((row) => [row.value(column), row]);
        keyed.sort((one, two) => compare(one[0], two[0], sign));
        sortBy(keyed.map(([, row]) => row));
      });
    });

    const input = block.querySelector("input");
    const count = block.querySelector(".filter output");
    const namesOf = ({ dataset: { column }, textContent }) =>
      [column, column.replace(/^params\./, ""), textContent.replace(/\[.*/, "").trim()];
    const columnOf = (name) => heads.findIndex((head) => namesOf(head).some((text) => text.toLowerCase() === name));
    let unknown = [];
    const test = (term) => {
      const [, name, sign, text] = /^([^<>=]+)(<=|>=|<|>|=)(.*)$/.exec(term) || [];
      const column = name === undefined ? -1 : columnOf(name);
      if (name !== undefined && column < 0) unknown.push(name);
      if (column < 0) return (row) => row.text().includes(term);
      const number = Number(text);
      return (row) => {
        const value = row.value(column);
        if (typeof value === "number" && text !== "") return operators[sign](value, number);
        return sign === "=" && String(value).toLowerCase() === text;
      };
    };
    const filter = () => {
      unknown = [];
      const terms = input.value.toLowerCase().replace(/\s*(<=|>=|<|>|=)\s*/g, "$1").split(/\s+/).filter(Boolean);
      const tests = terms.map(test);
      matching = rows.filter((row) => tests.every((matches) => matches(row)));
      begin = 0;
      draw();
      count.textContent = `${matching.length} of ${rows.length}${unknown.map((name) => `, no column ${name} here`).join("")}`;
    };
    if (rows.length > 1) {
      block.querySelector(".filter").hidden = false;
      // On a narrow screen rows are cards without headings to click.
      const select = block.querySelector(".order select");
      heads.forEach((head, column) => {
        for (const [name, arrow] of [["ascending", "\u25b2"], ["descending", "\u25bc"]])
          select.add(new Option(`${head.textContent.trim()} ${arrow}`, `${column} ${name}`));
      });
      select.addEventListener("change", () => {
        const [column, name] = select.value.split(" ");
        if (!name) return sortBy([...rows]);
        if (name === "descending") heads[column].setAttribute("aria-sort", "ascending");
        else heads[column].removeAttribute("aria-sort");
        heads[column].querySelector("button").click();
      });
      input.addEventListener("input", filter);
      filter();
    }
    block.querySelector(".scroll").addEventListener("scroll", markOverflow, { passive: true });
  }
  tabs.forEach((tab) => tab.addEventListener("click", markOverflow));
  addEventListener("hashchange", markOverflow);
  addEventListener("resize", markOverflow);
  markOverflow();
})();
