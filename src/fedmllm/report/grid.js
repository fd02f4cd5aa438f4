// Sorting and filtering of the table of runs. No library, nothing fetched.
(function () {
  "use strict";
  var table = document.getElementById("runs-table");
  var body = table.tBodies[0];
  var rows = Array.prototype.slice.call(body.rows);
  var selects = Array.prototype.slice.call(document.querySelectorAll("select[data-filter]"));
  var search = document.getElementById("search");
  var count = document.getElementById("count");

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
  }

  function key(row, column) {
    var value = row.cells[column].dataset.value;
    return value === undefined ? row.cells[column].textContent.trim() : value === "" ? null : +value;
  }

  function sort(button) {
    var head = button.closest("th");
    var column = head.cellIndex;
    var down = head.getAttribute("aria-sort") === "ascending";
    Array.prototype.forEach.call(table.tHead.rows[0].cells, function (cell) {
      cell.removeAttribute("aria-sort");
    });
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    rows.sort(function (a, b) {
      var x = key(a, column), y = key(b, column);
      if (x === null || y === null) { return (x === null) - (y === null); } // gaps come last
      var order = typeof x === "number" ? x - y : x.localeCompare(y, "en", { numeric: true });
      return down ? -order : order;
    });
    rows.forEach(function (row) { body.appendChild(row); });
  }

  table.tHead.addEventListener("click", function (event) {
    var button = event.target.closest("button");
    if (button) { sort(button); }
  });
  selects.forEach(function (select) { select.addEventListener("change", filter); });
  search.addEventListener("input", filter);
  document.getElementById("clear").addEventListener("click", function () {
    selects.forEach(function (select) { select.value = ""; });
    search.value = "";
    filter();
  });
  // a mean leads to the runs that it is the mean of
  document.addEventListener("click", function (event) {
    var mean = event.target.closest("a[data-arm]");
    if (!mean) { return; }
    search.value = "";
    selects.forEach(function (select) {
      var wanted = mean.dataset[select.dataset.filter] || "";
      var known = Array.prototype.some.call(select.options, function (o) { return o.value === wanted; });
      select.value = known ? wanted : "";
    });
    filter();
    if (count.textContent.indexOf("0 of") === 0) { // a run that stands for several settings
      document.querySelector("select[data-filter=setting]").value = "";
      filter();
    }
  });
  filter();
})();
