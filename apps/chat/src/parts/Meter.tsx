import { useEffect, useRef } from "preact/hooks";
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";

import { settings } from "../state";

const HEIGHT = 130;

/** A line chart of tokens per step, averaged over the last 16 steps. */
export function Meter({ values }: { values: number[] }) {
  const box = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | null>(null);
  useEffect(() => {
    const element = box.current!;
    plot.current = new uPlot(options(element), [[], []], element);
    const resized = new ResizeObserver(() =>
      plot.current?.setSize({ width: element.clientWidth, height: HEIGHT }),
    );
    resized.observe(element);
    return () => {
      resized.disconnect();
      plot.current?.destroy();
    };
  }, []);
  useEffect(() => {
    const redraw = () => plot.current?.redraw(false, true);
    const system = matchMedia("(prefers-color-scheme: dark)");
    redraw();
    system.addEventListener("change", redraw);
    return () => system.removeEventListener("change", redraw);
  }, [settings.value.theme]);
  useEffect(() => {
    plot.current?.setData([values.map((_, index) => index + 1), values]);
  }, [values]);
  const last = values.at(-1);
  const label = last === undefined ? "no steps yet" : `${last.toFixed(2)} on average over the last 16 steps`;
  return <div class="meter" ref={box} role="img" aria-label={`Tokens per step: ${label}`} />;
}

function options(element: HTMLElement): uPlot.Options {
  const colour = (name: string) => () => getComputedStyle(element).getPropertyValue(name);
  const axis = { stroke: colour("--muted"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false } };
  return {
    width: element.clientWidth,
    height: HEIGHT,
    legend: { show: false },
    cursor: { show: false },
    scales: { x: { time: false }, y: { range: (_plot, _low, high) => [0, Math.max(2, high * 1.1)] } },
    axes: [
      { ...axis, size: 28 },
      { ...axis, size: 28 },
    ],
    series: [{}, { stroke: colour("--accent"), width: 2, points: { show: false } }],
  };
}
