// Asks the server whose address is the argument, with Anthropic's SDK; prints what came back.
import Anthropic from "@anthropic-ai/sdk";

const client = new Anthropic({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const messages = [{ role: "user", content: "hello" }];

const whole = await client.messages.create({ model, messages, max_tokens: 20 });
const pieces = [];
const stream = client.messages.stream({ model, messages, max_tokens: 20 });
stream.on("text", (text) => pieces.push(text));
const streamed = await stream.finalMessage();
const count = await client.messages.countTokens({ model, messages });
let refused = null;
try {
  await client.messages.create({ model, messages, max_tokens: 0 });
} catch (error) {
  refused = { status: error.status, type: error.error.error.type };
}
console.log(JSON.stringify({
  model: (await client.models.retrieve(model)).id,
  whole: whole.content[0].text,
  streamed: streamed.content[0].text,
  pieces: pieces.length,
  counted: count.input_tokens > 0,
  refused,
}));
