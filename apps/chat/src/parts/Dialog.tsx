import type { ComponentChildren } from "preact";
import { useEffect, useRef } from "preact/hooks";

/** A modal dialog: it traps the focus, Esc closes it, and closing restores the focus. */
export function Dialog(props: {
  title: string;
  close: () => void;
  wide?: boolean;
  children: ComponentChildren;
}) {
  const box = useRef<HTMLDialogElement>(null);
  useEffect(() => {
    const previous = document.activeElement;
    const dialog = box.current!;
    dialog.showModal();
    return () => {
      // The cleanup can run late, when the user has already moved the focus elsewhere.
      const active = document.activeElement ?? document.body;
      if (active !== document.body && !dialog.contains(active)) return;
      if (previous instanceof HTMLElement && previous.isConnected) previous.focus();
    };
  }, []);
  return (
    <dialog
      ref={box}
      class={props.wide ? "wide" : ""}
      aria-labelledby="dialog-title"
      onCancel={(event) => {
        event.preventDefault();
        props.close();
      }}
      onClick={(event) => event.target === box.current && props.close()}
    >
      <div class="dialog-body">
        <div class="dialog-head">
          <h2 id="dialog-title">{props.title}</h2>
          <button type="button" class="quiet" onClick={props.close}>
            Close
          </button>
        </div>
        {props.children}
      </div>
    </dialog>
  );
}
