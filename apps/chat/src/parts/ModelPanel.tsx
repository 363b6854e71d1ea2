import { useEffect, useState } from "preact/hooks";

import { chooseModel, localModels } from "../engine";
import * as state from "../state";
import { counted } from "../words";

const DEFAULT = "";
const FOLDER = " folder";

/** The loaded model and adapter, and a form to load others. */
export function ModelPanel() {
  const [local, setLocal] = useState<{ models: string[]; adapters: string[] } | null>(null);
  const chosen = state.engine.value?.chosen;
  const [model, setModel] = useState(chosen?.model ?? DEFAULT);
  const [adapter, setAdapter] = useState(chosen?.adapter_path ?? DEFAULT);
  const [failed, setFailed] = useState("");
  useEffect(() => {
    localModels().then(setLocal, () => setLocal({ models: [], adapters: [] }));
  }, []);
  const busy = state.engine.value?.state === "loading" || state.engine.value?.state === "restarting";
  return (
    <form
      class="fields"
      onSubmit={(event) => {
        event.preventDefault();
        void chooseModel(model.trim() || null, adapter.trim() || null).then(setFailed);
      }}
    >
      <Status />
      <Choice
        label="Model"
        defaultLabel="Built-in model"
        names={local?.models ?? []}
        value={model}
        set={setModel}
      />
      <Choice
        label="Adapter"
        defaultLabel="Default for the model"
        names={local?.adapters ?? []}
        value={adapter}
        set={setAdapter}
      />
      <p class="muted">
        The lists show the local Hugging Face cache. You can also enter the path of a folder. Nothing is
        downloaded.
      </p>
      <button type="submit" class="primary" disabled={busy}>
        Load
      </button>
      {failed && (
        <p class="bad" role="alert">
          {failed}
        </p>
      )}
    </form>
  );
}

function Choice(props: {
  label: string;
  defaultLabel: string;
  names: string[];
  value: string;
  set: (value: string) => void;
}) {
  const listed = props.value === DEFAULT || props.names.includes(props.value);
  const [typing, setTyping] = useState(!listed);
  return (
    <>
      <label>
        {props.label}
        <select
          value={typing && !listed ? FOLDER : props.value}
          onChange={(event) => {
            const value = event.currentTarget.value;
            setTyping(value === FOLDER);
            props.set(value === FOLDER ? " " : value);
          }}
        >
          <option value={DEFAULT}>{props.defaultLabel}</option>
          {props.names.map((name) => (
            <option key={name} value={name}>
              {name}
            </option>
          ))}
          <option value={FOLDER}>Folder…</option>
        </select>
      </label>
      {typing && !listed && (
        <label>
          {props.label} folder
          <input value={props.value.trimStart()} onInput={(event) => props.set(event.currentTarget.value || " ")} />
        </label>
      )}
    </>
  );
}

function Status() {
  const [seconds, setSeconds] = useState(0);
  const engine = state.engine.value;
  const loading = engine?.state === "loading" || engine?.state === "restarting";
  useEffect(() => {
    if (!loading) return;
    const start = Date.now();
    setSeconds(0);
    const timer = setInterval(() => setSeconds(Math.round((Date.now() - start) / 1000)), 500);
    return () => clearInterval(timer);
  }, [loading]);
  if (!engine) return <p class="muted">Connecting</p>;
  return (
    <div aria-live="polite">
      {loading ? (
        <>
          <label>
            Loading, {seconds} s
            <progress />
          </label>
        </>
      ) : (
        <p>
          <strong>{engine.model?.name ?? "No model"}</strong>
          {engine.model &&
            (engine.model.adapter
              ? `, up to ${counted(engine.model.num_draft_tokens, "draft token")} per step`
              : ", no adapter")}
        </p>
      )}
      {engine.error && <p class="bad">{engine.error}</p>}
    </div>
  );
}
