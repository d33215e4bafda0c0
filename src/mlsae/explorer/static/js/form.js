// The form of the pages that run the language model: a text, what else a page asks for, a button.
import { html, useEffect, useState } from "../vendor/preact-htm.module.js";
import { isHeld } from "./state.js";

/** A value that is typed before it is sent; follows the address on back and forward. */
export function useDraft(value) {
  const [draft, set] = useState(value);
  const key = JSON.stringify(value);
  useEffect(() => set(value), [key]);
  return [draft, set];
}

/** A text area that sends with Ctrl+Enter. */
export function TextBox({ name, label, value, onInput, rows = 3, placeholder }) {
  const onKeyDown = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      event.target.form.requestSubmit();
    }
  };
  return html`<label class="field">${label}<textarea name=${name} rows=${rows} spellcheck="false" placeholder=${placeholder} value=${value} onInput=${(e) => onInput(e.target.value)} onKeyDown=${onKeyDown}></textarea></label>`;
}

/** The form: `onRun` is called with a text that is not empty. */
export function PromptForm({ text, setText, run, onRun, children, extra }) {
  const submit = (event) => {
    event.preventDefault();
    if (text !== "") onRun();
  };
  return html`<form class="stack" onSubmit=${submit}>
    <${TextBox} name="text" label="Text" value=${text} onInput=${setText} placeholder="Type or paste a text" />
    ${children}
    <div class="row"><button type="submit" class="main" disabled=${text === ""}>${run}</button>${extra}<span class="soft small push">${isHeld() ? "This text is too long for a link: it stays in this tab." : html`<kbd>Ctrl Enter</kbd>`}</span></div>
  </form>`;
}
