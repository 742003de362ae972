// The official Node SDK: `node cases.mjs CASE BASE_URL QUESTION_JSON` prints what the SDK made of the answers, as JSON.
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const [name, baseURL, question] = process.argv.slice(2);
const { messages } = JSON.parse(question);
const sent = [];
const person = z.object({ name: z.string(), age: z.number().int() });
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
  async parse() {
    const request = { model: await model(), temperature: 0 };
    const whole = await client.chat.completions.parse({ ...request, messages, response_format: zodResponseFormat(person, "person") });
    const stream = client.chat.completions.stream({ ...request, messages, response_format: zodResponseFormat(person, "person") });
    const final = await stream.finalChatCompletion();
    const response = await client.responses.parse({
      ...request,
      input: messages.at(-1).content,
      text: { format: zodTextFormat(person, "person") },
    });
    return { whole: whole.choices[0].message.parsed, final: final.choices[0].message.parsed, response: response.output_parsed };
  },
  async runTools() {
    const asked = [];
    const get_weather = {
      type: "function",
      function: {
        name: "get_weather",
        description: "Current weather of a city",
        parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
        parse: JSON.parse,
        function: ({ city }) => (asked.push(city), { weather: "sunny" }),
      },
    };
    const request = { model: await model(), messages, temperature: 0, tools: [get_weather] };
    const whole = await client.chat.completions.runTools(request).finalContent();
    const streamed = await client.chat.completions.runTools({ ...request, stream: true }).finalContent();
    return { whole, streamed, asked };
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
