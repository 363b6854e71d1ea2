/** Requests to the server that this page was loaded from; the page makes no others. */

const PREFIX = "/app/api";

/** A response other than 2xx; the message is shown to the user. */
export class ApiError extends Error {
  constructor(
    readonly status: number,
    message: string,
  ) {
    super(message);
  }
}

type Method = "GET" | "POST" | "PUT" | "PATCH" | "DELETE";

/** Send a request; returns the parsed response, or undefined if it is empty. */
export async function ask<Result = void>(
  method: Method,
  path: string,
  body?: unknown,
): Promise<Result> {
  const response = await send(method, path, body);
  return (response.status === 204 ? undefined : await response.json()) as Result;
}

/** Read a stream of events until it ends or the signal aborts it. */
export async function* events<Event>(
  method: Method,
  path: string,
  options: { body?: unknown; signal: AbortSignal },
): AsyncGenerator<Event> {
  const response = await send(method, path, options.body, options.signal);
  const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (pending + value).split("\n\n");
    pending = parts.pop()!;
    for (const part of parts) {
      if (part.startsWith("data: ")) yield JSON.parse(part.slice(6)) as Event;
    }
  }
}

/** Exchange the token of the address for a cookie. */
export function openSession(token: string): Promise<void> {
  return ask("POST", "/session", { token });
}

/** Request text. */
export async function askText(path: string): Promise<string> {
  return (await send("GET", path)).text();
}

/** The address of a download. */
export function address(path: string): string {
  return PREFIX + path;
}

/** Upload a file unchanged. */
export async function upload<Result>(path: string, file: Blob): Promise<Result> {
  const response = await checked(
    await fetch(PREFIX + path, { method: "POST", body: file, credentials: "same-origin" }),
  );
  return (await response.json()) as Result;
}

async function send(
  method: Method,
  path: string,
  body?: unknown,
  signal?: AbortSignal,
): Promise<Response> {
  const init: RequestInit = { method, credentials: "same-origin" };
  if (signal) init.signal = signal;
  if (body !== undefined) {
    init.body = JSON.stringify(body);
    init.headers = { "Content-Type": "application/json" };
  }
  let response: Response;
  try {
    response = await fetch(PREFIX + path, init);
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError(0, "mlx-mtp app is not responding. Is it still running?");
  }
  return checked(response);
}

async function checked(response: Response): Promise<Response> {
  if (response.ok) return response;
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // A response that is not one of our errors is reported by its status.
  }
  throw new ApiError(response.status, message);
}
