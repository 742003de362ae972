// Vercel's AI SDK: `node ai-sdk.mjs CASE BASE_URL PROVIDER` prints what it made of the answers, as JSON.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, Output, generateObject, generateText, stepCountIs, streamObject, streamText, tool } from "ai";
import { z } from "zod";

const [name, baseURL, provider] = process.argv.slice(2);
const providers = {
  // The default of @ai-sdk/openai is Responses.
  responses: (id) => createOpenAI({ baseURL, apiKey: "any" })(id),
  chat: (id) => createOpenAI({ baseURL, apiKey: "any" }).chat(id),
  compatible: (id) => createOpenAICompatible({ name: "candle", baseURL, apiKey: "any", supportsStructuredOutputs: true })(id),
};
const model = providers[provider]("default");
const CAPITAL = "What is the capital of France?";
const WEATHER = "What is the weather in Paris?";
const JSON_QUESTION = "Give me a JSON object with a name and an age.";
const settings = { model, temperature: 0, maxRetries: 0 };
const person = z.object({ name: z.string(), age: z.number().int() });
const review = z.object({
  verdict: z.enum(["good", "bad"]).describe("What to think of it"),
  stars: z.number().int().min(1).max(5),
  tags: z.array(z.enum(["a", "b"])).max(2),
  note: z.literal("none").nullable(),
  mail: z.email().max(30),
  counts: z.record(z.enum(["x", "y"]), z.number().int().min(0).max(9)),
});
const asked = [];
const tools = {
  get_weather: tool({
    description: "Current weather of a city",
    inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => (asked.push(city), { weather: "sunny" }),
  }),
};

async function refusal(request) {
  try {
    await generateText({ maxRetries: 0, prompt: CAPITAL, ...request });
  } catch (error) {
    return { class: error.constructor.name, isAPICallError: APICallError.isInstance(error), status: error.statusCode, message: error.message, retryable: error.isRetryable };
  }
  return null;
}

const cases = {
  async text() {
    const { text, finishReason, usage } = await generateText({ ...settings, prompt: CAPITAL });
    return { text, finishReason, usage };
  },
  async stream() {
    const result = streamText({ ...settings, prompt: CAPITAL });
    let text = "";
    for await (const part of result.textStream) text += part;
    return { text, finishReason: await result.finishReason, usage: await result.usage };
  },
  async tools() {
    const { text, steps } = await generateText({ ...settings, prompt: WEATHER, tools, stopWhen: stepCountIs(3) });
    return { text, steps: steps.length, asked };
  },
  async toolsStreamed() {
    const result = streamText({ ...settings, prompt: WEATHER, tools, stopWhen: stepCountIs(3) });
    return { text: await result.text, steps: (await result.steps).length, asked };
  },
  async toolRequired() {
    const choices = ["required", { type: "tool", toolName: "get_weather" }];
    const calls = [];
    for (const toolChoice of choices) {
      const { toolCalls } = await generateText({ ...settings, prompt: WEATHER, tools, toolChoice });
      calls.push(toolCalls.map((call) => [call.toolName, call.input]));
    }
    return { calls };
  },
  async object() {
    const { object } = await generateObject({ ...settings, prompt: JSON_QUESTION, schema: person });
    const { output } = await generateText({ ...settings, prompt: JSON_QUESTION, output: Output.object({ schema: person }) });
    const streamed = streamObject({ ...settings, prompt: JSON_QUESTION, schema: person });
    const parts = [];
    for await (const part of streamed.partialObjectStream) parts.push(part);
    return { object, output, streamed: await streamed.object, last: parts.at(-1) };
  },
  async manyParts() {
    const { object } = await generateObject({ ...settings, prompt: JSON_QUESTION, schema: review });
    return { object };
  },
  async enumeration() {
    const { object } = await generateObject({ ...settings, prompt: CAPITAL, output: "enum", enum: ["red", "blue"] });
    return { object };
  },
  async errors() {
    return {
      model: await refusal({ model: providers[provider]("gpt-none") }),
      long: await refusal({ model, prompt: "word ".repeat(5000) }),
      range: await refusal({ model, temperature: 9 }),
    };
  },
};

console.log(JSON.stringify({ result: await cases[name]() }));
