// Asks the server whose address is the argument, with the openai package; prints what came back.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: "none" });
const model = (await client.models.list()).data[0].id;
const messages = [{ role: "user", content: "hello" }];

const whole = await client.chat.completions.create({ model, messages, max_tokens: 20 });
const pieces = [];
let accepted = null;
const stream = await client.chat.completions.create({
  model, messages, max_tokens: 20, stream: true, stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  if (chunk.choices.length) pieces.push(chunk.choices[0].delta.content ?? "");
  accepted = chunk.usage?.completion_tokens_details.accepted_prediction_tokens ?? accepted;
}
const text = await client.completions.create({ model, prompt: "hello", max_tokens: 20 });
const response = await client.responses.create({ model, input: "hello" });
const kinds = [];
for await (const event of await client.responses.create({ model, input: "hello", stream: true })) {
  kinds.push(event.type);
}
let refused = null;
try {
  await client.chat.completions.create({ model, messages, temperature: 9 });
} catch (error) {
  refused = { status: error.status, param: error.param };
}
console.log(JSON.stringify({
  whole: whole.choices[0].message.content,
  streamed: pieces.join(""),
  pieces: pieces.filter((piece) => piece).length,
  accepted,
  text: text.choices[0].text,
  response: response.output_text,
  last: kinds.at(-1),
  refused,
}));
