//! What dialects write of deltas.

use serde_json::{Value, json};

use crate::api::delta::{Delta, DeltaKind, EndReason, ToolCallPart, Usage, by_choice};
use crate::api::dialects::{Prepared, chat, native, tokens};
use crate::api::tests::saying;

const USAGE: Usage = Usage { prompt_tokens: 3, completion_tokens: 4, reasoning_tokens: None, cached_tokens: 0, times: None };

/// A thought, then two calls of tools; each list came at once.
fn calling() -> Vec<Vec<Delta>> {
    let start =
        |index, id: &str, name: &str| DeltaKind::ToolCall { index, part: ToolCallPart::Start { id: id.to_owned(), name: name.to_owned() } };
    let arguments = |index, text: &str| DeltaKind::ToolCall { index, part: ToolCallPart::Arguments(text.to_owned()) };
    let reasoning = |text: &str| DeltaKind::Reasoning(text.to_owned());
    let batches = [
        vec![reasoning("Let me "), reasoning("look.")],
        vec![start(0, "call_1", "weather"), arguments(0, "{\"city\":")],
        vec![arguments(0, "\"Paris\"}"), start(1, "call_2", "time"), arguments(1, "{}")],
        vec![DeltaKind::End(EndReason::Stop)],
    ];
    batches.into_iter().map(|kinds| kinds.into_iter().map(|kind| Delta { choice: 0, kind }).collect()).collect()
}

/// A thought and an answer.
fn thinking() -> Vec<Delta> {
    let kinds = [DeltaKind::Reasoning("Hm.".to_owned()), DeltaKind::Text("Yes.".to_owned()), DeltaKind::End(EndReason::Length)];
    kinds.into_iter().map(|kind| Delta { choice: 0, kind }).collect()
}

/// The items of a stream.
fn stream(prepared: Prepared, batches: Vec<Vec<Delta>>) -> Vec<Value> {
    let mut dialect = prepared.dialect;
    let mut items = Vec::new();
    let last = batches.len() - 1;
    for (place, deltas) in batches.into_iter().enumerate() {
        if place == 0 {
            dialect.open(USAGE);
        }
        dialect.delta(deltas, USAGE);
        if place == last {
            dialect.end(USAGE);
        }
        items.extend(dialect.take());
    }
    items
}

fn messages() -> Value {
    json!({"messages": [{"role": "user", "content": "Hi"}]})
}

#[tokio::test]
async fn chat_writes_thoughts_and_tool_calls_as_openai_and_vllm_do() {
    let world = saying("").await;
    let prepared = || chat::read(world.service.served(), "x", &messages()).unwrap();
    let message = |deltas: Vec<Delta>| {
        let whole = prepared().dialect.whole(by_choice(deltas), USAGE);
        (whole["choices"][0]["message"].clone(), whole["choices"][0]["finish_reason"].clone())
    };
    let call =
        |id: &str, name: &str, arguments: &str| json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
    let calls = json!([call("call_1", "weather", "{\"city\":\"Paris\"}"), call("call_2", "time", "{}")]);
    let called = json!({"role": "assistant", "content": null, "refusal": null, "reasoning_content": "Let me look.", "reasoning": "Let me look.", "tool_calls": calls});
    assert_eq!(message(calling().concat()), (called, json!("tool_calls")));
    let thought = json!({"role": "assistant", "content": "Yes.", "refusal": null, "reasoning_content": "Hm.", "reasoning": "Hm."});
    assert_eq!(message(thinking()), (thought, json!("length")));

    let frames: Vec<Value> = stream(prepared(), calling());
    let events = crate::api::tests::events(&frames);
    let choices: Vec<(&Value, &Value)> =
        events.iter().map(|event| (&event["choices"][0]["delta"], &event["choices"][0]["finish_reason"])).collect();
    let none = Value::Null;
    let first = json!({"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\":"}});
    let rest = json!({"index": 0, "function": {"arguments": "\"Paris\"}"}});
    let second = json!({"index": 1, "id": "call_2", "type": "function", "function": {"name": "time", "arguments": "{}"}});
    assert_eq!(
        choices,
        [
            (&json!({"role": "assistant", "content": ""}), &none),
            (&json!({"reasoning_content": "Let me look.", "reasoning": "Let me look."}), &none),
            (&json!({"tool_calls": [first]}), &none),
            (&json!({"tool_calls": [rest, second]}), &none),
            (&json!({}), &json!("tool_calls")),
        ]
    );
}

#[tokio::test]
async fn native_chunks_carry_them_too() {
    let world = saying("").await;
    let prepared = native::read(world.service.served(), "x", &messages()).unwrap();
    let chunks = stream(prepared, calling());
    let delta = |chunk: usize| &chunks[chunk]["choices"][0]["delta"];
    assert_eq!(delta(0), &json!({"role": "assistant", "reasoning_content": "Let me look.", "reasoning": "Let me look.", "content": ""}));
    assert_eq!(delta(1)["tool_calls"][0]["id"], "call_1");
    let last = &chunks.last().unwrap();
    assert_eq!((&last["choices"][0]["finish_reason"], &last["usage"]["total_tokens"]), (&json!("tool_calls"), &json!(7)));
}

#[tokio::test]
async fn the_older_form_has_the_answer_alone() {
    let world = saying("").await;
    let prepared = tokens::read(world.service.served(), "x", &messages()).unwrap();
    let items = stream(prepared, vec![thinking()]);
    assert_eq!(items, [json!({"choices": [{"tokens": ["Yes."]}], "usage": {"input": 3, "output": 4}})]);
}
