for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const head = button.parentNode, body = head.closest("table").tBodies[0], rising = head.ariaSort !== "ascending";
  const text = row => row.cells[head.cellIndex].textContent.trim();
  const number = text => text.startsWith("–") ? -Infinity : parseFloat(text.replace("−", "-"));
  const numeric = (a, b) => number(text(a)) - number(text(b)), words = (a, b) => text(a).localeCompare(text(b));
  const order = (a, b) => head.classList.contains("n") && numeric(a, b) || words(a, b);
  for (const other of head.parentNode.cells) other.ariaSort = null;
  head.ariaSort = rising ? "ascending" : "descending";
  body.append(...[...body.rows].sort((a, b) => (rising ? 1 : -1) * order(a, b)));
};
