/** Requests to the server that this page came from; there are no others. */

const PREFIX = "/app/api";

/** An answer other than 2xx; the message is for people. */
export class ApiError extends Error {
  constructor(
    readonly status: number,
    message: string,
  ) {
    super(message);
  }
}

type Method = "GET" | "POST" | "PUT" | "PATCH" | "DELETE";

/** Ask for something; returns the parsed answer, undefined where it is empty. */
export async function ask<Result = void>(
  method: Method,
  path: string,
  body?: unknown,
): Promise<Result> {
  const response = await send(method, path, body);
  return (response.status === 204 ? undefined : await response.json()) as Result;
}

/** Follow a stream of events until it ends or the signal breaks it off. */
export async function* events<Event>(
  method: Method,
  path: string,
  options: { body?: unknown; signal: AbortSignal },
): AsyncGenerator<Event> {
  const response = await send(method, path, options.body, options.signal);
  const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop()!;
    for (const part of parts) {
      if (part.startsWith("data: ")) yield JSON.parse(part.slice(6)) as Event;
    }
  }
}

/** Exchange the token of the address for a cookie. */
export function openSession(token: string): Promise<void> {
  return ask("POST", "/session", { token });
}

/** Ask for text. */
export async function askText(path: string): Promise<string> {
  return (await send("GET", path)).text();
}

/** Where something can be downloaded. */
export function address(path: string): string {
  return PREFIX + path;
}

/** Send a file as it is. */
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
    // An error without our shape keeps its status as its message.
  }
  throw new ApiError(response.status, message);
}
