import { useEffect, useState } from "preact/hooks";

/** Take files that are dropped anywhere on the page; returns whether one is held over it. */
export function useDrop(take: (file: File) => Promise<void>): boolean {
  const [held, setHeld] = useState(false);
  useEffect(() => {
    const over = (event: DragEvent) => {
      if (!event.dataTransfer?.types.includes("Files")) return;
      event.preventDefault();
      setHeld(true);
    };
    const leave = (event: DragEvent) => {
      if (!event.relatedTarget) setHeld(false);
    };
    const drop = (event: DragEvent) => {
      setHeld(false);
      const file = event.dataTransfer?.files[0];
      if (!file) return;
      event.preventDefault();
      void take(file);
    };
    addEventListener("dragover", over);
    addEventListener("dragleave", leave);
    addEventListener("drop", drop);
    return () => {
      removeEventListener("dragover", over);
      removeEventListener("dragleave", leave);
      removeEventListener("drop", drop);
    };
  }, []);
  return held;
}
