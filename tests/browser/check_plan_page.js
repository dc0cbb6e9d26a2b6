// Behind the page's own script: uses the page as a reader does, and leaves what it saw in the document.
const wrong = [];
const wide = where => { if (document.documentElement.scrollWidth > innerWidth) wrong.push(`${where}: wider than ${innerWidth}`); };
for (const id of ["tiles", "memory", "points", "mesh", "layer", "collectives", "plan"])
  if (byId(id).innerText.trim().length < 40) wrong.push(`${id} is empty`);
for (const point of [...data.points, asked]) {
  choose({ tp: point.sizes.tp, sequence: point.about.sequence, mode: point.about.checkpointing });
  wide(keyOf(point));
  if (byId("found").hidden) wrong.push(`${keyOf(point)} is hidden`);
}
for (const input of document.querySelectorAll("input[type=range]"))
  for (let stop = 0; stop <= Number(input.max); stop++) {
    input.value = stop; input.dispatchEvent(new Event("input"));
    if (!input.getAttribute("aria-valuetext")) wrong.push("a slider says nothing");
  }
choose({ tp: asked.sizes.tp, sequence: asked.about.sequence, mode: asked.about.checkpointing });
const cells = document.querySelectorAll(".node i");
cells[cells.length - 1].click();
if (!byId("mesh").innerText.includes(`node ${Math.floor((cells.length - 1) / data.gpus_per_node)}`)) wrong.push("a rank cannot be chosen");
state.rank = 0; draw(); controls();
for (const element of document.querySelectorAll("button, input, select"))
  if (!(element.innerText || element.getAttribute("aria-label") || element.labels?.length)) wrong.push(`${element.id} has no label`);
for (const name of ["light", "dark", "auto"]) { byId("theme").click(); if ((document.documentElement.dataset.theme || "auto") !== name) wrong.push("theme"); }
document.body.append(h("pre", { id: "checked", hidden: true }, JSON.stringify({ wrong, width: innerWidth, background: getComputedStyle(document.body).backgroundColor })));
