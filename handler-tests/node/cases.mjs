// The official Node SDK: `node cases.mjs CASE BASE_URL QUESTION_JSON` prints what the SDK made of the answers, as JSON.
import OpenAI from "openai";

const [name, baseURL, question] = process.argv.slice(2);
const { messages } = JSON.parse(question);
const sent = [];
const client = new OpenAI({
  baseURL,
  apiKey: "any",
  maxRetries: 0,
  timeout: 120_000,
  fetch: (...call) => (sent.push(String(call[0])), fetch(...call)),
});

async function model() {
  for await (const one of client.models.list()) return one.id;
}

async function refusal(request) {
  try {
    const answer = await client.chat.completions.create({ model: "default", messages, ...request });
    if (request.stream) for await (const _ of answer);
  } catch (error) {
    const { status, code, param, type, message, requestID } = error;
    return { class: error.constructor.name, status, code, param, type, message, requestID };
  }
  return null;
}

const cases = {
  async models() {
    const id = await model();
    const retrieved = await client.models.retrieve(id);
    let missing = null;
    try {
      await client.models.retrieve("nobody/no-such-model");
    } catch (error) {
      missing = { class: error.constructor.name, code: error.code };
    }
    return { id, retrieved: retrieved.id, missing };
  },
  async plain() {
    return client.chat.completions.create({ model: await model(), messages, temperature: 0 });
  },
  async logprobs() {
    const request = { model: await model(), messages, temperature: 0, logprobs: true, top_logprobs: 2 };
    const whole = await client.chat.completions.create(request);
    const final = await client.chat.completions.stream({ ...request, stream: true }).finalChatCompletion();
    return { whole: whole.choices[0], streamed: final.choices[0] };
  },
  async responses() {
    const request = { model: await model(), input: messages.at(-1).content, temperature: 0 };
    const whole = await client.responses.create(request);
    const stream = client.responses.stream(request);
    let text = "";
    stream.on("response.output_text.delta", (event) => (text += event.delta));
    const final = await stream.finalResponse();
    const next = await client.responses.create({ ...request, previous_response_id: final.id });
    return { whole, final, text, next };
  },
  async stream() {
    const stream = await client.chat.completions.create({ model: await model(), messages, temperature: 0, stream: true });
    const chunks = [];
    for await (const chunk of stream) chunks.push(chunk);
    return chunks;
  },
  async helper() {
    const stream = client.chat.completions.stream({
      model: await model(),
      messages,
      temperature: 0,
      stream_options: { include_usage: true },
    });
    let text = "";
    stream.on("content", (delta) => (text += delta));
    const final = await stream.finalChatCompletion();
    return { text, final };
  },
  async choices() {
    return client.chat.completions.stream({ model: await model(), messages, temperature: 0, n: 3 }).finalChatCompletion();
  },
  async errors() {
    return {
      model: await refusal({ model: "gpt-none" }),
      range: await refusal({ temperature: 9 }),
      stream: await refusal({ top_p: 7, stream: true }),
      empty: await refusal({ messages: [] }),
    };
  },
  async aborted() {
    const stream = await client.chat.completions.create({ messages, model: "default", ignore_eos: true, stream: true });
    for await (const _ of stream) break;
    return { aborted: stream.controller.signal.aborted };
  },
};

console.log(JSON.stringify({ result: await cases[name](), sent: sent.length }));
