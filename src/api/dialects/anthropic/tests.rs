use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use serde_json::{Value, json};

use crate::api::Reply;
use crate::api::delta::{Delta, DeltaKind, EndReason, ToolCallPart, Usage, by_choice};
use crate::api::dialects::anthropic::{messages, read};
use crate::api::dialects::{Prepared, anthropic, chat_form};
use crate::api::fields::dialect_tables::MESSAGES;
use crate::api::fields::rows::Rows;
use crate::api::tests::{World, items, named_events, saying, with};
use crate::error::Failure;

const USAGE: Usage = Usage { prompt_tokens: 5, completion_tokens: 4, reasoning_tokens: None, cached_tokens: 2, times: None };

/// A thought, a text, two calls of tools; each list came at once.
fn batches(end: EndReason) -> Vec<Vec<Delta>> {
    let start =
        |index, id: &str, name: &str| DeltaKind::ToolCall { index, part: ToolCallPart::Start { id: id.to_owned(), name: name.to_owned() } };
    let arguments = |index, text: &str| DeltaKind::ToolCall { index, part: ToolCallPart::Arguments(text.to_owned()) };
    let text = |text: &str| DeltaKind::Text(text.to_owned());
    let batches = [
        vec![DeltaKind::Reasoning("Let me ".to_owned())],
        vec![DeltaKind::Reasoning("look.".to_owned()), text("One "), text("moment.")],
        vec![start(0, "call_1", "weather"), arguments(0, "{\"city\":")],
        vec![arguments(0, "\"Paris\"}"), start(1, "call_2", "time")],
        vec![DeltaKind::End(end)],
    ];
    batches.into_iter().map(|kinds| kinds.into_iter().map(|kind| Delta { choice: 0, kind }).collect()).collect()
}

fn hi(more: Value) -> Value {
    with(json!({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20, "seed": 0}), more)
}

fn prepared(world: &World) -> Prepared {
    anthropic::read(world.service.served(), "x", &hi(json!({}))).unwrap()
}

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
    named_events(&items)
}

/// The message that a client puts together of the events.
fn put_together(events: &[Value]) -> Value {
    let mut message = events[0]["message"].clone();
    let mut inputs = std::collections::HashMap::<u64, String>::new();
    let append = |place: &mut Value, text: &Value| *place = json!(format!("{}{}", place.as_str().unwrap(), text.as_str().unwrap()));
    for event in &events[1..] {
        let index = event["index"].as_u64().unwrap_or_default();
        match event["type"].as_str().unwrap() {
            "content_block_start" => {
                let blocks = message["content"].as_array_mut().unwrap();
                assert_eq!(index as usize, blocks.len());
                blocks.push(event["content_block"].clone());
            }
            "content_block_delta" => {
                let (block, delta) = (&mut message["content"][index as usize], &event["delta"]);
                match delta["type"].as_str().unwrap() {
                    "text_delta" => append(&mut block["text"], &delta["text"]),
                    "thinking_delta" => append(&mut block["thinking"], &delta["thinking"]),
                    "signature_delta" => block["signature"] = delta["signature"].clone(),
                    "input_json_delta" => inputs.entry(index).or_default().push_str(delta["partial_json"].as_str().unwrap()),
                    other => panic!("{other}"),
                }
            }
            "message_delta" => {
                message["stop_reason"] = event["delta"]["stop_reason"].clone();
                message["stop_sequence"] = event["delta"]["stop_sequence"].clone();
                message["usage"] = event["usage"].clone();
            }
            _ => {}
        }
    }
    for (index, input) in inputs {
        let input = serde_json::from_str(&input).ok().filter(Value::is_object);
        message["content"][index as usize]["input"] = input.unwrap_or_else(|| json!({}));
    }
    message
}

#[tokio::test]
async fn a_stream_adds_up_to_the_whole_answer() {
    let world = saying("").await;
    let whole = prepared(&world).dialect.whole(by_choice(batches(EndReason::Stop).concat()), USAGE);
    assert_eq!(
        whole,
        json!({
            "id": "msg_x", "type": "message", "role": "assistant", "model": "baidu/ERNIE-test",
            "content": [
                {"type": "thinking", "thinking": "Let me look.", "signature": ""},
                {"type": "text", "text": "One moment."},
                {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Paris"}},
                {"type": "tool_use", "id": "call_2", "name": "time", "input": {}},
            ],
            "stop_reason": "tool_use", "stop_sequence": null,
            "usage": {"input_tokens": 3, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 2, "output_tokens": 4},
        })
    );
    let events = stream(prepared(&world), batches(EndReason::Stop));
    assert_eq!(put_together(&events), whole);
    let types: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    let block = |deltas: usize| [vec!["content_block_start"], vec!["content_block_delta"; deltas], vec!["content_block_stop"]].concat();
    // A thought ends with its signature, and the last call has no arguments.
    let blocks = [block(3), block(1), block(2), block(0)].concat();
    assert_eq!(types, [vec!["message_start", "ping"], blocks, vec!["message_delta", "message_stop"]].concat());
    assert_eq!(events[0]["message"]["usage"]["output_tokens"], 0);
}

/// Deltas of any kinds, cut into lists in any way.
fn any_batches() -> impl Strategy<Value = Vec<Vec<Delta>>> {
    prop::collection::vec((0..4_u8, "[a-zé ]{0,3}", any::<bool>()), 1..24).prop_map(|steps| {
        let (mut batches, mut calls) = (vec![Vec::new()], 0);
        for (kind, text, cut) in steps {
            let kind = match kind {
                0 => DeltaKind::Text(text),
                1 => DeltaKind::Reasoning(text),
                2 if calls > 0 => DeltaKind::ToolCall { index: calls - 1, part: ToolCallPart::Arguments(text) },
                _ => {
                    calls += 1;
                    let part = ToolCallPart::Start { id: format!("call_{calls}"), name: "f".to_owned() };
                    DeltaKind::ToolCall { index: calls - 1, part }
                }
            };
            batches.last_mut().unwrap().push(Delta { choice: 0, kind });
            if cut {
                batches.push(Vec::new());
            }
        }
        batches.last_mut().unwrap().push(Delta { choice: 0, kind: DeltaKind::End(EndReason::Stop) });
        batches
    })
}

#[tokio::test]
async fn any_stream_adds_up_to_the_whole_answer() {
    let world = saying("").await;
    let run = TestRunner::default().run(&any_batches(), |batches| {
        let whole = prepared(&world).dialect.whole(by_choice(batches.concat()), USAGE);
        prop_assert_eq!(put_together(&stream(prepared(&world), batches)), whole);
        Ok(())
    });
    run.unwrap();
}

#[tokio::test]
async fn reasons_to_stop() {
    let world = saying("").await;
    let text = |end| vec![vec![Delta { choice: 0, kind: DeltaKind::Text("x".to_owned()) }, Delta { choice: 0, kind: DeltaKind::End(end) }]];
    for (end, reason, sequence) in [
        (EndReason::Stop, "end_turn", Value::Null),
        (EndReason::StopToken(7), "end_turn", Value::Null),
        (EndReason::Length, "max_tokens", Value::Null),
        (EndReason::StopText("###".to_owned()), "stop_sequence", json!("###")),
    ] {
        let message = put_together(&stream(prepared(&world), text(end)));
        assert_eq!((&message["stop_reason"], &message["stop_sequence"]), (&json!(reason), &sequence));
    }
    let nothing = stream(prepared(&world), vec![vec![Delta { choice: 0, kind: DeltaKind::End(EndReason::Stop) }]]);
    assert_eq!(put_together(&nothing)["content"], json!([{"type": "text", "text": ""}]));
}

#[tokio::test]
async fn a_failure_midway_is_an_error_event() {
    let world = saying("").await;
    let mut dialect = prepared(&world).dialect;
    dialect.open(USAGE);
    let events = named_events(&[dialect.take().unwrap(), dialect.error(&Failure::internal("the engine failed"))]);
    let error = json!({"type": "error", "error": {"type": "api_error", "message": "the engine failed"}});
    assert_eq!(events.last(), Some(&error));
}

fn conversation(body: Value) -> Result<(Vec<Value>, Vec<String>), Failure> {
    let conversation = messages::read(&Rows::new(MESSAGES, &body)?)?;
    Ok((conversation.messages, conversation.origins))
}

#[test]
fn blocks_become_messages_of_a_chat() {
    let body = json!({
        "system": [{"type": "text", "text": "x-anthropic-billing-header: cc_version=1;"}, {"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "Look.", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "One moment."},
                {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Paris"}},
            ]},
            {"role": "user", "content": [
                {"type": "text", "text": "And tomorrow?"},
                {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "no city"}], "is_error": true},
                {"type": "document", "title": "Plan", "source": {"type": "text", "media_type": "text/plain", "data": "Walk"}},
            ]},
        ],
    });
    let (messages, origins) = conversation(body).unwrap();
    let text = |text: &str| json!({"type": "text", "text": text});
    let call = json!({"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\":\"Paris\"}"}});
    assert_eq!(
        messages,
        [
            json!({"role": "system", "content": "Be kind."}),
            json!({"role": "user", "content": "Weather?"}),
            json!({"role": "assistant", "content": [text("One moment.")], "reasoning_content": "Look.", "tool_calls": [call]}),
            json!({"role": "tool", "tool_call_id": "c1", "content": [text("Error:"), text("no city")], "name": "weather"}),
            json!({"role": "user", "content": [text("And tomorrow?"), text("Plan"), text("Walk")]}),
        ]
    );
    assert_eq!(origins, ["system", "messages[0]", "messages[1]", "messages[2].content[1]", "messages[2]"]);
    let (messages, _) =
        conversation(json!({"system": "x-anthropic-billing-header: 1\nBe kind.", "messages": [{"role": "user", "content": ""}]})).unwrap();
    assert_eq!(messages[0]["content"], "Be kind.");
    let (messages, _) =
        conversation(json!({"system": "x-anthropic-billing-header: 1", "messages": [{"role": "user", "content": ""}]})).unwrap();
    assert_eq!(messages, [json!({"role": "user", "content": ""})]);
}

#[tokio::test]
async fn an_answer_and_its_count() {
    let world = saying("Hello world").await;
    let message = world.post("/v1/messages", hi(json!({"stop_sequences": [" w"]}))).await.unwrap();
    assert_eq!((&message["content"], &message["stop_reason"]), (&json!([{"type": "text", "text": "Hello"}]), &json!("stop_sequence")));
    assert_eq!((&message["stop_sequence"], &message["id"]), (&json!(" w"), &json!("msg_r1")));
    let mut body = hi(json!({}));
    body.as_object_mut().unwrap().remove("max_tokens");
    let count = world.post("/v1/messages/count_tokens", body.clone()).await.unwrap();
    assert_eq!(count, json!({"input_tokens": message["usage"]["input_tokens"]}));
    assert_eq!(world.post("/v1/messages", body).await.unwrap_err().param.as_deref(), Some("max_tokens"));
    let stream = items(world.call("/v1/messages", hi(json!({"stream": true}))).await.unwrap()).await;
    let events = named_events(&stream.into_iter().map(Result::unwrap).collect::<Vec<_>>());
    assert_eq!(put_together(&events)["content"][0]["text"], "Hello world");
    let job = json!({"openai_route": "/v1/messages", "openai_input": hi(json!({}))});
    assert_eq!(world.job(job).await.unwrap()["content"][0]["text"], "Hello world");
}

#[tokio::test]
async fn an_answer_goes_on_where_the_assistant_stopped() {
    let world = saying("Hello").await;
    let served = world.service.served();
    let messages = |last: Value| json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": last}]);
    let ids = |last: Value| {
        let body = json!({"messages": messages(last), "max_tokens": 1});
        read::translate(&body, true).unwrap().request(served).unwrap().prompts[0].ids.clone()
    };
    let chat = |more: Value| {
        let request = chat_form::request(served, &with(json!({"messages": messages(json!("He"))}), more)).unwrap();
        request.prompts[0].ids.clone()
    };
    let continued = chat(json!({"continue_final_message": true}));
    assert_eq!(ids(json!("He")), continued);
    assert_eq!(ids(json!([{"type": "text", "text": "He"}, {"type": "text", "text": ""}])), continued);
    assert_ne!(continued, chat(json!({})));
    // Nothing to go on with: a thought alone, or a call.
    let call = json!([{"type": "text", "text": "He"}, {"type": "tool_use", "id": "c", "name": "f", "input": {}}]);
    assert_ne!(ids(call), continued);
}

#[tokio::test]
async fn mistakes_are_told_by_the_names_of_the_caller() {
    let world = saying("Hello").await;
    let user = |content: Value| json!({"messages": [{"role": "user", "content": content}]});
    let image = json!([{"type": "text", "text": "a"}, {"type": "image", "source": {"type": "url", "url": "x"}}]);
    let assistant = |content: Value| json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": content}]});
    let cases = [
        (json!({"messages": null}), 400, "messages", Some("missing_required_parameter")),
        (json!({"messages": []}), 400, "messages", Some("missing_required_parameter")),
        (json!({"messages": "Hi"}), 400, "messages", None),
        (json!({"messages": [{"role": "tool", "content": "x"}]}), 400, "messages[0].role", Some("invalid_value")),
        (json!({"messages": [{"role": "user"}]}), 400, "messages[0].content", Some("missing_required_parameter")),
        (user(image), 400, "messages[0].content[1]", Some("unsupported_value")),
        (user(json!([{"type": "tool_result"}])), 400, "messages[0].content[0].tool_use_id", Some("missing_required_parameter")),
        (
            user(json!([{"type": "document", "source": {"type": "base64", "data": "x"}}])),
            400,
            "messages[0].content[0].source",
            Some("unsupported_value"),
        ),
        (assistant(json!([{"type": "tool_use", "name": "f"}])), 400, "messages[1].content[0].id", Some("missing_required_parameter")),
        (assistant(json!([{"type": "tool_use", "id": "c", "name": "f", "input": "x"}])), 400, "messages[1].content[0].input", None),
        (json!({"system": 5}), 400, "system", None),
        (json!({"model": "nobody"}), 404, "model", Some("model_not_found")),
        (json!({"max_tokens": 0}), 400, "max_tokens", Some("invalid_value")),
        (json!({"temperature": -1}), 400, "temperature", Some("invalid_value")),
        (json!({"stop_sequences": [""]}), 400, "stop_sequences", Some("invalid_value")),
        (json!({"mcp_servers": [{}]}), 400, "mcp_servers", Some("unsupported_parameter")),
        (json!({"tools": [{"type": "bash_20250124", "name": "bash"}]}), 400, "tools[0]", Some("unsupported_value")),
        (json!({"tools": [{"input_schema": {}}]}), 400, "tools[0].name", Some("missing_required_parameter")),
        (json!({"tool_choice": {"type": "some"}}), 400, "tool_choice.type", Some("invalid_value")),
        (json!({"tool_choice": {"type": "tool"}}), 400, "tool_choice.name", Some("missing_required_parameter")),
        (json!({"thinking": {"type": "enabled"}}), 400, "thinking.budget_tokens", Some("missing_required_parameter")),
        (json!({"thinking": {"type": "enabled", "budget_tokens": 5}}), 400, "thinking.budget_tokens", Some("invalid_value")),
        (json!({"thinking": {"type": "enabled", "budget_tokens": 2000}}), 400, "thinking.budget_tokens", Some("invalid_value")),
        (
            json!({"thinking": {"type": "enabled", "budget_tokens": 2000}, "max_tokens": 3000}),
            400,
            "thinking.budget_tokens",
            Some("unsupported_parameter"),
        ),
        (json!({"thinking": {"type": "sometimes"}}), 400, "thinking.type", Some("invalid_value")),
        (json!({"output_config": {"effort": "huge"}}), 400, "output_config.effort", Some("invalid_value")),
        (json!({"output_config": {"format": {"type": "xml"}}}), 400, "output_config.format.type", Some("invalid_value")),
        (json!({"output_format": {"type": "json_schema"}}), 400, "output_format.schema", Some("missing_required_parameter")),
    ];
    for (more, status, param, code) in cases {
        let failure = world.call("/v1/messages", hi(more.clone())).await.err().unwrap();
        assert_eq!((failure.status(), failure.param.as_deref(), failure.code), (status, Some(param), code), "{more}: {failure}");
        let quoted = failure.message.contains(&format!("'{param}'")) || param == "messages" || status == 404;
        assert!(quoted, "{failure}");
    }
    for more in
        [json!({"thinking": {"type": "adaptive"}}), json!({"thinking": {"type": "disabled"}}), json!({"output_config": {"effort": "low"}})]
    {
        assert!(matches!(world.call("/v1/messages", hi(more)).await, Ok(Reply::Whole(_))));
    }
}
