//! The types of the `async-openai` crate, which refuse an answer that lacks a field or has a wrong one: what they write is sent to the binary with the
//! demo model, on the direct door and through the queue, and what comes back is read into them.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use async_openai::error::WrappedError;
use async_openai::types::chat::{
    ChatCompletionMessageToolCalls, CreateChatCompletionRequest, CreateChatCompletionResponse, CreateChatCompletionStreamResponse,
    FinishReason,
};
use async_openai::types::completions::{CreateCompletionRequest, CreateCompletionResponse};
use async_openai::types::models::{ListModelResponse, Model};
use async_openai::types::responses::{CreateResponse, OutputItem, OutputMessageContent, Response, ResponseStreamEvent, Status};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

const CAPITAL: &str = "What is the capital of France?";
const WEATHER: &str = "What is the weather in Paris?";

/// The binary with the demo model; it ends with the test.
struct Server {
    process: Child,
    base: String,
    http: reqwest::Client,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Server {
    async fn start() -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let process = Command::new(env!("CARGO_BIN_EXE_worker-candle"))
            .args(["serve", "--model", "demo", "--host", "127.0.0.1", "--port", &port.to_string()])
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let server =
            Self { process, base: format!("http://127.0.0.1:{port}"), http: reqwest::Client::builder().no_proxy().build().unwrap() };
        for _ in 0..1200 {
            let ready = server.http.get(format!("{}/ping", server.base)).send().await;
            if ready.is_ok_and(|ready| ready.status() == 200) {
                return server;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("the server does not become ready");
    }

    fn doors(&self) -> [String; 2] {
        [format!("{}/v1", self.base), format!("{}/v2/local/openai/v1", self.base)]
    }

    async fn get<T: DeserializeOwned>(&self, url: String) -> T {
        read(&self.http.get(url).send().await.unwrap().text().await.unwrap())
    }

    async fn text<Q: Serialize>(&self, url: String, body: Q) -> String {
        self.http.post(url).json(&body).send().await.unwrap().text().await.unwrap()
    }

    async fn post<Q: Serialize, T: DeserializeOwned>(&self, url: String, body: Q) -> T {
        read(&self.text(url, body).await)
    }
}

#[track_caller]
fn read<T: DeserializeOwned>(text: &str) -> T {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// A request as the crate writes it.
fn request<Q: DeserializeOwned>(value: Value) -> Q {
    serde_json::from_value(value).unwrap()
}

fn chat(text: &str, more: Value) -> CreateChatCompletionRequest {
    let mut body = json!({"model": "default", "messages": [{"role": "user", "content": text}], "temperature": 0.0});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    request(body)
}

fn response(text: &str, more: Value) -> CreateResponse {
    let mut body = json!({"model": "default", "input": text, "temperature": 0.0});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    request(body)
}

fn tools() -> Value {
    let parameters = json!({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]});
    json!([{"type": "function", "function": {"name": "get_weather", "description": "Current weather of a city", "parameters": parameters}}])
}

/// The data of server-sent events; `[DONE]` is not among them.
fn events<T: DeserializeOwned>(text: &str) -> Vec<T> {
    text.lines().filter_map(|line| line.strip_prefix("data: ")).filter(|data| *data != "[DONE]").map(read).collect()
}

#[tokio::test]
async fn answers_have_the_types_of_async_openai() {
    let server = Server::start().await;
    for door in server.doors() {
        models(&server, &door).await;
        chats(&server, &door).await;
        tool_calls(&server, &door).await;
        completions(&server, &door).await;
        responses(&server, &door).await;
        errors(&server, &door).await;
    }
}

async fn models(server: &Server, door: &str) {
    let models: ListModelResponse = server.get(format!("{door}/models")).await;
    let model: Model = server.get(format!("{door}/models/{}", models.data[0].id)).await;
    assert_eq!((model.object.as_str(), &model.id), ("model", &models.data[0].id));
}

async fn chats(server: &Server, door: &str) {
    let url = format!("{door}/chat/completions");
    let answer: CreateChatCompletionResponse =
        server.post(url.clone(), chat(CAPITAL, json!({"logprobs": true, "top_logprobs": 2, "n": 2, "seed": 1}))).await;
    assert_eq!(answer.choices.len(), 2);
    assert_eq!(answer.choices[0].message.content.as_deref(), Some("Paris."));
    assert_eq!(answer.choices[0].finish_reason, Some(FinishReason::Stop));
    assert!(answer.choices[0].logprobs.is_some() && answer.usage.is_some());

    let format = json!({"type": "json_schema", "json_schema": {"name": "p", "strict": true, "schema":
        {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["name", "age"], "additionalProperties": false}}});
    let ask = chat("Give me a JSON object with a name and an age.", json!({"response_format": format}));
    let answer: CreateChatCompletionResponse = server.post(url.clone(), ask).await;
    let written: Value = read(answer.choices[0].message.content.as_deref().unwrap());
    assert_eq!(written, json!({"name": "Ada", "age": 36}));

    let ask = chat(CAPITAL, json!({"stream": true, "stream_options": {"include_usage": true}, "logprobs": true}));
    let chunks: Vec<CreateChatCompletionStreamResponse> = events(&server.text(url, ask).await);
    let said: String = chunks.iter().flat_map(|chunk| &chunk.choices).filter_map(|choice| choice.delta.content.clone()).collect();
    assert_eq!(said, "Paris.");
    assert!(chunks.last().unwrap().usage.is_some());
}

async fn tool_calls(server: &Server, door: &str) {
    let url = format!("{door}/chat/completions");
    let answer: CreateChatCompletionResponse = server.post(url.clone(), chat(WEATHER, json!({"tools": tools()}))).await;
    assert_eq!(answer.choices[0].finish_reason, Some(FinishReason::ToolCalls));
    let calls = answer.choices[0].message.tool_calls.clone().unwrap();
    let [ChatCompletionMessageToolCalls::Function(call)] = calls.as_slice() else { panic!("{calls:?}") };
    assert_eq!(read::<Value>(&call.function.arguments), json!({"city": "Paris"}));

    let messages = json!([{"role": "user", "content": WEATHER}, {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "tool_call_id": call.id, "content": "{\"weather\": \"sunny\"}"}]);
    let answer: CreateChatCompletionResponse =
        server.post(url.clone(), chat(WEATHER, json!({"tools": tools(), "messages": messages}))).await;
    assert_eq!(answer.choices[0].message.content.as_deref(), Some("It is sunny there."));

    let chunks: Vec<CreateChatCompletionStreamResponse> =
        events(&server.text(url, chat(WEATHER, json!({"tools": tools(), "stream": true}))).await);
    let parts = chunks.iter().flat_map(|chunk| &chunk.choices).flat_map(|choice| choice.delta.tool_calls.iter().flatten());
    let arguments: String = parts.filter_map(|part| part.function.as_ref()?.arguments.clone()).collect();
    assert_eq!(read::<Value>(&arguments), json!({"city": "Paris"}));
}

async fn completions(server: &Server, door: &str) {
    let url = format!("{door}/completions");
    let ask = |stream: bool| -> CreateCompletionRequest {
        request(
            json!({"model": "default", "prompt": "The quick brown fox", "max_tokens": 8, "temperature": 0.0, "logprobs": 2, "stream": stream}),
        )
    };
    let answer: CreateCompletionResponse = server.post(url.clone(), ask(false)).await;
    let chunks: Vec<CreateCompletionResponse> = events(&server.text(url, ask(true)).await);
    let said: String = chunks.iter().flat_map(|chunk| &chunk.choices).map(|choice| choice.text.clone()).collect();
    assert!(!said.is_empty());
    assert_eq!(said, answer.choices[0].text);
}

async fn responses(server: &Server, door: &str) {
    let url = format!("{door}/responses");
    let answer: Response = server.post(url.clone(), response(CAPITAL, json!({}))).await;
    assert_eq!(answer.status, Status::Completed);
    let Some(OutputItem::Message(message)) = answer.output.last() else { panic!("{answer:?}") };
    let [OutputMessageContent::OutputText(text)] = message.content.as_slice() else { panic!("{message:?}") };
    assert_eq!(text.text, "Paris.");

    let tool = &tools()[0]["function"];
    let tool = json!({"type": "function", "name": "get_weather", "description": tool["description"], "parameters": tool["parameters"], "strict": false});
    let events: Vec<ResponseStreamEvent> =
        events(&server.text(url, response(WEATHER, json!({"tools": [tool], "tool_choice": "auto", "stream": true}))).await);
    let Some(ResponseStreamEvent::ResponseCompleted(end)) = events.last() else { panic!("{events:?}") };
    let Some(OutputItem::FunctionCall(call)) = end.response.output.last() else { panic!("{end:?}") };
    assert_eq!(read::<Value>(&call.arguments), json!({"city": "Paris"}));
}

async fn errors(server: &Server, door: &str) {
    for (route, body) in [
        ("chat/completions", json!(chat(CAPITAL, json!({"model": "gpt-none"})))),
        ("responses", json!(response(CAPITAL, json!({"model": "gpt-none"})))),
    ] {
        let error: WrappedError = server.post(format!("{door}/{route}"), body).await;
        assert_eq!(error.error.code.as_deref(), Some("model_not_found"));
        assert_eq!(error.error.param.as_deref(), Some("model"));
    }
}
