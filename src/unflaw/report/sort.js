for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const head = button.parentNode, body = head.closest("table").tBodies[0];
  const rising = head.ariaSort !== "ascending", text = row => row.cells[head.cellIndex].dataset.value ?? row.cells[head.cellIndex].textContent;
  const order = (a, b) => isNaN(a - b) ? a.localeCompare(b) : a - b;
  for (const other of head.parentNode.cells) other.ariaSort = null;
  head.ariaSort = rising ? "ascending" : "descending";
  body.append(...[...body.rows].sort((a, b) => (rising ? 1 : -1) * order(text(a), text(b))));
};
