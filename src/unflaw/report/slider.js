for (const box of document.querySelectorAll(".slider")) {
  const known = JSON.parse(box.querySelector("script").textContent);
  const range = box.querySelector("input"), [counts, command] = box.querySelectorAll("output");
  const above = (scores, t) => scores.filter(score => score > t).length;
  const share = (n, all) => all ? `${n} of ${all} (${(100 * n / all).toFixed(1)} %)` : "none";
  const show = () => {
    const t = range.value === known.start ? known.threshold : parseFloat(range.value);
    const review = known.review === null ? t : Math.min(known.review, t);
    const alarms = above(known.good, t), found = above(known.defective, t);
    const good = above(known.good, review) - alarms, defective = above(known.defective, review) - found;
    const missed = known.defective.length - found - defective;
    counts.textContent = `Threshold ${t.toPrecision(4)}: false alarms ${share(alarms, known.good.length)}, `
      + `missed ${share(missed, known.defective.length)}, for review ${good} good and ${defective} defective`;
    command.textContent = `unflaw threshold ${known.model}${known.category} ${t.toPrecision(6)}`;
  };
  known.start = range.value;
  range.oninput = show;
  show();
}
