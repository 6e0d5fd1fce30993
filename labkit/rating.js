// Shows a pair of responses and sends the vote with the number of the pair that it was cast on.
// Texts are set as text content, never as HTML. Until the next pair comes, no vote is taken.

const CHOICES = [["A is better", "A", "a"], ["B is better", "B", "b"], ["Tie", "tie", "t"],
  ["Both bad", "both bad", "x"], ["Skip", "skip", "s"], ["Undo", "undo", "u"]];

function add(parent, tag, className = "", text = "") {
  const element = parent.appendChild(document.createElement(tag));
  element.className = className;
  element.textContent = text;
  return element;
}

function render({ model, el }) {
  const box = add(el, "div", "labkit-rating");
  box.tabIndex = 0;
  const status = add(box, "div", "status"), progress = add(status, "span"), hint = add(status, "span");
  const bar = add(box, "progress"), texts = add(box, "div", "texts"), row = add(box, "div", "buttons");
  const panes = ["Prompt", "A", "B"].map((name) => {
    const pane = add(texts, "div", name.toLowerCase());
    add(pane, "div", "name", name);
    return add(pane, "div", "text");
  });
  const buttons = CHOICES.map(([label, choice, key]) => {
    const button = add(row, "button", "", label);
    add(button, "kbd", "", key.toUpperCase());
    button.addEventListener("click", () => { send(choice); box.focus(); });
    return button;
  });
  let waiting = false;

  function send(choice) {
    const { number, total } = model.get("shown");
    if (waiting || (choice === "undo" ? number === 0 : number === total)) return;
    waiting = true;
    model.send({ number, choice });
    draw();
  }

  function draw() {
    const { number, total, prompt, responses, file, error } = model.get("shown");
    const done = number === total;
    progress.textContent = done ? `All ${total} pairs are rated` : `Pair ${number + 1} of ${total}`;
    hint.textContent = waiting ? "Saving …" : error ? error : done ? file
      : box.contains(document.activeElement) ? "Keys are on" : "Click here to vote by key";
    [bar.max, bar.value] = [total, number];
    texts.hidden = done;
    texts.style.display = done ? "none" : "";
    [prompt, ...(responses || [])].forEach((text, i) => { panes[i].textContent = text ?? ""; });
    buttons.forEach((button, i) => {
      button.disabled = waiting || (CHOICES[i][1] === "undo" ? number === 0 : done);
    });
  }

  function press(event) {
    if (!box.contains(event.target) || event.ctrlKey || event.metaKey || event.altKey) return;
    // An input method for Chinese hides the letter; then the key's place has to do.
    const key = event.isComposing || event.key === "Process" ? event.code.slice(3) : event.key;
    if (key.length !== 1 || key === " ") return;
    event.preventDefault();
    event.stopImmediatePropagation();
    const found = CHOICES.find((choice) => choice[2] === key.toLowerCase());
    if (found && !event.repeat) send(found[1]);
  }
  // In JupyterLab "a" and "x" would add and cut cells. It listens at the document: come before it.
  window.addEventListener("keydown", press, true);
  for (const name of ["focusin", "focusout"]) box.addEventListener(name, () => setTimeout(draw));
  model.on("change:shown", () => { waiting = false; draw(); panes.forEach((p) => { p.scrollTop = 0; }); });
  draw();
  return () => window.removeEventListener("keydown", press, true);
}

export default { render };
