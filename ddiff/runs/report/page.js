"use strict";
// Trajectory player and search in the tree of tokens. The page loads nothing.

function make(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;  // text is never read as HTML
  return made;
}

function visible(text) {
  return text.replace(/\n/g, "⏎").replace(/\t/g, "⇥");
}

// States of all steps, from the first states and the changes.
function unfold(trajectory) {
  const states = [trajectory.start];
  for (const changes of trajectory.changes) {
    const next = states[states.length - 1].slice();
    for (const [position, state] of changes) next[position] = state;
    states.push(next);
  }
  return states;
}

// Probability of the present state of each position under the network, when it was drawn.
function unfoldConfidence(trajectory) {
  const rows = [trajectory.start.map(() => null)];
  trajectory.changes.forEach((changes, step) => {
    const next = rows[rows.length - 1].slice();
    const values = trajectory.confidence[step] || [];
    changes.forEach(([position], number) => { next[position] = values[number] ?? null; });
    rows.push(next);
  });
  return rows;
}

function levelOf(trajectory, state) {
  let level = 0;
  let end = trajectory.level_sizes[0];
  while (state >= end && level + 1 < trajectory.level_sizes.length) {
    level += 1;
    end += trajectory.level_sizes[level];
  }
  return level;
}

function isBelow(trajectory, state, node) {
  for (let above = trajectory.parents[state]; above !== undefined; above = trajectory.parents[above]) {
    if (above === node) return true;
  }
  return false;
}

// "refined": one or more levels down the tree, "remasked": up, "corrected": another branch.
function changeOf(trajectory, before, after) {
  if (before === after) return "";
  if (isBelow(trajectory, after, before)) return "refined";
  if (levelOf(trajectory, after) > levelOf(trajectory, before)) return "remasked";
  return "corrected";
}

function drawCells(trajectory, states, confidence, step) {
  const cells = make("div", "cells");
  const now = states[Math.min(step, states.length - 1)];
  const before = step > 0 && step < states.length ? states[step - 1] : now;
  const top = trajectory.level_sizes.length - 1;
  const counts = {refined: 0, remasked: 0, corrected: 0};
  const given = new Set(trajectory.given);
  now.forEach((state, position) => {
    const level = levelOf(trajectory, state);
    const change = changeOf(trajectory, before[position], state);
    if (change) counts[change] += 1;
    const isMask = top > 0 && level === top;
    const cell = make("span", "", isMask ? "·" : visible(trajectory.names[state]));
    if (isMask) cell.classList.add("mask");
    else if (level > 0) cell.classList.add("l" + Math.min(level, 3));
    if (given.has(position)) cell.classList.add("given");
    if (change === "refined") cell.classList.add("new");
    else if (change) cell.classList.add(change);
    const kind = isMask ? "mask" : level === 0 ? "token" : "node of level " + level;
    const sure = confidence[Math.min(step, states.length - 1)][position];
    if (sure !== null) {
      cell.classList.add("sure");
      cell.style.setProperty("--sure", sure);
    }
    cell.title = "position " + position + ": " + kind + (change ? ", " + change : "") +
      (sure === null ? "" : ", drawn with probability " + sure);
    cells.append(cell);
  });
  return [cells, counts];
}

// A field with pictures has one picture per step in place of cells.
function drawPicture(trajectory, step) {
  const picture = make("img", "frame");
  const frame = trajectory.frames[Math.min(step, trajectory.frames.length - 1)];
  picture.src = "data:image/png;base64," + trajectory.pictures[frame];
  picture.alt = trajectory.field + " after step " + step;
  return picture;
}

function startPlayer(root, trajectories) {
  root.textContent = "";
  const all = trajectories.map((trajectory) => (
    trajectory.pictures ? {trajectory, states: trajectory.frames} :
      {trajectory, states: unfold(trajectory), confidence: unfoldConfidence(trajectory)}
  ));
  const title = ({run, target, field, sampler, index}) =>
    [run, target, field, sampler, "sample " + index].filter(Boolean).join(", ");

  const controls = make("div", "controls");
  const back = make("button", "", "◀ step");
  const play = make("button", "main", "Play");
  const forward = make("button", "", "step ▶");
  const scrub = make("input");
  scrub.type = "range";
  scrub.min = 0;
  scrub.setAttribute("aria-label", "step");
  const place = make("span", "note");
  controls.append(back, play, forward, scrub, place);

  const panes = make("div", "panes");
  const shown = [];
  // on the right: the same sample with another sampler or run, if there is one
  const first = all[0].trajectory;
  let second = all.findIndex(({trajectory}, number) => number > 0 && trajectory.index === first.index);
  if (second < 0 && all.length > 1) second = 1;
  for (const chosen of second > 0 ? [0, second] : [0]) {
    const pane = make("div", "pane");
    const select = make("select");
    select.setAttribute("aria-label", "trajectory");
    all.forEach(({trajectory}, number) => {
      const option = make("option", "", title(trajectory));
      option.value = number;
      select.append(option);
    });
    select.value = chosen;
    const body = make("div");
    pane.append(select, body);
    panes.append(pane);
    shown.push({select, body});
  }

  const key = make("div", "key");
  const entries = [["mask", "mask"]];
  const withCells = trajectories.filter((trajectory) => !trajectory.pictures);
  const depth = Math.max(0, ...withCells.map((trajectory) => trajectory.level_sizes.length));
  for (let level = Math.min(depth - 2, 3); level > 0; level -= 1) {
    entries.push(["l" + level, "node of level " + level + ", with its typical tokens"]);
  }
  entries.push(["new", "changed to a more precise state"], ["corrected", "remasked or corrected"]);
  if (withCells.some((trajectory) => trajectory.confidence.length)) {
    entries.push(["sure", "bar: probability of the state under the network when it was drawn"]);
  }
  if (withCells.some((trajectory) => trajectory.given.length)) entries.push(["given", "given"]);
  for (const [name, text] of entries) {
    const entry = make("span");
    entry.append(make("i", name), text);
    key.append(entry);
  }
  root.append(controls, panes, key);

  let timer = null;
  const lastStep = () => Math.max(...shown.map(({select}) => all[select.value].states.length - 1));
  let step = Math.round(lastStep() / 2);  // the first step shows little

  function draw() {
    const last = lastStep();
    step = Math.min(Math.max(step, 0), last);
    scrub.max = last;
    scrub.value = step;
    place.textContent = "step " + step + " of " + last;
    for (const {select, body} of shown) {
      const {trajectory, states, confidence} = all[select.value];
      const time = step > 0 ? trajectory.times[Math.min(step, trajectory.times.length) - 1] : 1;
      const timeText = time === undefined ? "" : "mean time " + time.toFixed(3);
      if (trajectory.pictures) {
        body.replaceChildren(drawPicture(trajectory, step), make("p", "note", timeText));
        continue;
      }
      const [cells, counts] = drawCells(trajectory, states, confidence, step);
      const text = (timeText && timeText + " · ") +
        counts.refined + " refined · " + counts.remasked + " remasked · " +
        counts.corrected + " corrected";
      body.replaceChildren(cells, make("p", "note", text));
    }
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  }

  function advance() {
    if (step >= lastStep()) return stop();
    step += 1;
    draw();
  }

  play.addEventListener("click", () => {
    if (timer !== null) return stop();
    if (step >= lastStep()) step = 0;
    play.textContent = "Pause";
    // about six seconds for a trajectory
    timer = setInterval(advance, Math.min(400, Math.max(60, 6000 / lastStep())));
    draw();
  });
  back.addEventListener("click", () => { stop(); step -= 1; draw(); });
  forward.addEventListener("click", () => { stop(); step += 1; draw(); });
  scrub.addEventListener("input", () => { stop(); step = Number(scrub.value); draw(); });
  for (const {select} of shown) select.addEventListener("change", draw);
  draw();
}

function startSearch(tree) {
  const field = tree.querySelector(".filter");
  field.addEventListener("input", () => {
    const wanted = field.value.toLowerCase();
    for (const word of tree.querySelectorAll("code")) {
      word.classList.toggle("hit", wanted !== "" && word.textContent.toLowerCase().includes(wanted));
    }
    for (const node of tree.querySelectorAll("details")) {
      const hit = wanted === "" || node.querySelector("code.hit") !== null;
      node.hidden = !hit;
      node.open = wanted !== "" && hit;
    }
  });
}

const data = document.getElementById("trajectory-data");
if (data) startPlayer(document.getElementById("player"), JSON.parse(data.textContent));
document.querySelectorAll(".tree").forEach(startSearch);
