// Sorting and filtering of tables of runs. No library, nothing fetched.
// A box [data-runs] holds a bar .filters and a table.runs; a link a[data-arm] to a box shows its runs.
(function () {
  "use strict";
  function list(items) { return Array.prototype.slice.call(items); }

  function key(row, column) {
    var cell = row.cells[column], value = cell.dataset.value;
    if (value === undefined) { return cell.dataset.text || cell.textContent.trim(); }
    return value === "" ? null : +value;
  }

  function setUp(box) {
    var table = box.querySelector("table.runs");
    var body = table.tBodies[0];
    var head = table.tHead.rows[table.tHead.rows.length - 1];
    var rows = list(body.rows);
    var bar = box.querySelector(".filters");
    var selects = list(bar.querySelectorAll("select[data-filter]"));
    var search = bar.querySelector("input[type=search]");
    var count = bar.querySelector("[role=status]");

    function filter() {
      var words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      var shown = 0;
      rows.forEach(function (row) {
        var fits = selects.every(function (select) {
          return !select.value || row.dataset[select.dataset.filter] === select.value;
        });
        var text = row.textContent.toLowerCase();
        fits = fits && words.every(function (word) { return text.indexOf(word) >= 0; });
        row.hidden = !fits;
        shown += fits;
      });
      count.textContent = shown + " of " + rows.length + " runs";
      return shown;
    }

    function sort(button) {
      var cell = button.closest("th");
      var down = cell.getAttribute("aria-sort") === "ascending";
      list(head.cells).forEach(function (other) { other.removeAttribute("aria-sort"); });
      cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      rows.sort(function (a, b) {
        var x = key(a, cell.cellIndex), y = key(b, cell.cellIndex);
        if (x === null || y === null) { return (x === null) - (y === null); } // gaps come last
        var order = typeof x === "number" ? x - y : x.localeCompare(y, "en", { numeric: true });
        return down ? -order : order;
      });
      rows.forEach(function (row) { body.appendChild(row); });
    }

    // shows the runs that a link names; where no run is of its setting, the one that stands for it
    box.show = function (wanted) {
      search.value = "";
      selects.forEach(function (select) {
        var value = wanted[select.dataset.filter] || "";
        var known = list(select.options).some(function (o) { return o.value === value; });
        select.value = known ? value : "";
      });
      if (!filter()) {
        selects.forEach(function (s) { if (s.dataset.filter === "setting") { s.value = ""; } });
        filter();
      }
    };

    head.addEventListener("click", function (event) {
      var button = event.target.closest("button");
      if (button) { sort(button); }
    });
    selects.forEach(function (select) { select.addEventListener("change", filter); });
    search.addEventListener("input", filter);
    bar.querySelector("button").addEventListener("click", function () { box.show({}); });
    bar.hidden = false;
    filter();
  }

  list(document.querySelectorAll("[data-runs]")).forEach(setUp);
  document.addEventListener("click", function (event) {
    var mean = event.target.closest("a[data-arm]");
    if (mean) { document.querySelector(mean.getAttribute("href")).show(mean.dataset); }
  });
})();
