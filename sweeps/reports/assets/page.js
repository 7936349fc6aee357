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

  const markOverflow = () => {
    for (const block of document.querySelectorAll(".table")) {
      const box = block.querySelector(".scroll");
      block.toggleAttribute("data-more", box.scrollLeft + box.clientWidth < box.scrollWidth - 1);
    }
  };

  for (const block of document.querySelectorAll(".table")) {
    const body = block.querySelector("tbody");
    const heads = [...block.querySelectorAll("th")];
    const rows = [...body.rows];
    const searchText = (row) =>
      [...[...row.cells].map((cell) => cell.textContent), row.dataset.search || ""].join(" ").toLowerCase();
    const texts = new Map(rows.map((row) => [row, searchText(row)]));
    heads.forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
        const keyed = rows.map((row) => [valueOf(row.cells[column]), row]);
        keyed.sort((one, two) => compare(one[0], two[0], sign));
        body.append(...keyed.map(([, row]) => row));
      });
    });

    const input = block.querySelector("input");
    const count = block.querySelector("output");
    const namesOf = ({ dataset: { column }, textContent }) =>
      [column, column.replace(/^params\./, ""), textContent.replace(/\[.*/, "").trim()];
    const columnOf = (name) => heads.findIndex((head) => namesOf(head).some((text) => text.toLowerCase() === name));
    let unknown = [];
    const test = (term) => {
      const [, name, sign, text] = /^([^<>=]+)(<=|>=|<|>|=)(.*)$/.exec(term) || [];
      const column = name === undefined ? -1 : columnOf(name);
      if (name !== undefined && column < 0) unknown.push(name);
      if (column < 0) return (row) => texts.get(row).includes(term);
      const number = Number(text);
      return (row) => {
        const value = valueOf(row.cells[column]);
        if (typeof value === "number" && text !== "") return operators[sign](value, number);
        return sign === "=" && String(value).toLowerCase() === text;
      };
    };
    const filter = () => {
      unknown = [];
      const terms = input.value.toLowerCase().replace(/\s*(<=|>=|<|>|=)\s*/g, "$1").split(/\s+/).filter(Boolean);
      const tests = terms.map(test);
      let shown = 0;
      for (const row of rows) {
        row.hidden = !tests.every((matches) => matches(row));
        shown += !row.hidden;
      }
      count.textContent = `${shown} of ${rows.length}${unknown.map((name) => `, no column ${name} here`).join("")}`;
    };
    if (rows.length > 1) {
      block.querySelector(".filter").hidden = false;
      // On a narrow screen rows are cards without headings to click.
      const order = block.querySelector(".order select");
      heads.forEach((head, column) => {
        for (const [name, arrow] of [["ascending", "\u25b2"], ["descending", "\u25bc"]])
          order.add(new Option(`${head.textContent.trim()} ${arrow}`, `${column} ${name}`));
      });
      order.addEventListener("change", () => {
        const [column, name] = order.value.split(" ");
        if (!name) return body.append(...rows);
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
