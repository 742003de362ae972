use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use serde_json::{Value, json};

use crate::api::delta::{Delta, DeltaKind, EndReason, ToolCallPart, Usage, by_choice};
use crate::api::dialects::{Prepared, responses};
use crate::api::tests::{World, files, items, named_events, saying, whole, with, world_with};
use crate::api::{Call, Reply};
use crate::config::ApiSettings;
use crate::error::Failure;

const USAGE: Usage = Usage { prompt_tokens: 3, completion_tokens: 4, reasoning_tokens: None, cached_tokens: 1, times: None };

/// A thought, a text, two calls of tools, a text again; each list came at once.
fn batches(end: EndReason) -> Vec<Vec<Delta>> {
    let start =
        |index, id: &str, name: &str| DeltaKind::ToolCall { index, part: ToolCallPart::Start { id: id.to_owned(), name: name.to_owned() } };
    let arguments = |index, text: &str| DeltaKind::ToolCall { index, part: ToolCallPart::Arguments(text.to_owned()) };
    let text = |text: &str| DeltaKind::Text(text.to_owned());
    let batches = [
        vec![DeltaKind::Reasoning("Let me ".to_owned())],
        vec![DeltaKind::Reasoning("look.".to_owned()), text("One "), text("moment.")],
        vec![start(0, "call_1", "weather"), arguments(0, "{\"city\":")],
        vec![arguments(0, "\"Paris\"}"), start(1, "call_2", "time"), arguments(1, "{}")],
        vec![text("Bye."), DeltaKind::End(end)],
    ];
    batches.into_iter().map(|kinds| kinds.into_iter().map(|kind| Delta { choice: 0, kind }).collect()).collect()
}

fn read(world: &World, more: Value) -> Result<Prepared, Failure> {
    responses::read(world.service.served(), "x", &with(json!({"input": "Hi"}), more))
}

/// The frames of a stream of these deltas.
fn frames(prepared: Prepared, batches: Vec<Vec<Delta>>) -> Vec<Value> {
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

/// What the events of a stream add up to, as a client puts it together.
fn put_together(events: &[Value]) -> Vec<Value> {
    let mut items: Vec<Value> = Vec::new();
    let append = |place: &mut Value, text: &Value| *place = json!(format!("{}{}", place.as_str().unwrap(), text.as_str().unwrap()));
    for event in events {
        let index = event["output_index"].as_u64().unwrap_or_default() as usize;
        match event["type"].as_str().unwrap() {
            "response.output_item.added" => {
                assert_eq!(index, items.len());
                items.push(event["item"].clone());
            }
            "response.content_part.added" => items[index]["content"] = json!([event["part"]]),
            "response.output_text.delta" => append(&mut items[index]["content"][0]["text"], &event["delta"]),
            "response.reasoning_text.delta" => {
                if items[index]["content"] == json!([]) {
                    items[index]["content"] = json!([{"type": "reasoning_text", "text": ""}]);
                }
                append(&mut items[index]["content"][0]["text"], &event["delta"]);
            }
            "response.function_call_arguments.delta" => append(&mut items[index]["arguments"], &event["delta"]),
            "response.output_item.done" => {
                items[index]["status"] = event["item"]["status"].clone();
                assert_eq!(items[index], event["item"], "deltas add up to the item");
                continue;
            }
            _ => continue,
        }
        if let Some(id) = event.get("item_id") {
            assert_eq!(items[index]["id"], *id);
        }
    }
    items
}

/// Items without their ids.
fn bare(mut items: Vec<Value>) -> Vec<Value> {
    for item in &mut items {
        item.as_object_mut().unwrap().remove("id");
    }
    items
}

fn output(response: &Value) -> Vec<Value> {
    response["output"].as_array().unwrap().clone()
}

#[tokio::test]
async fn a_stream_adds_up_to_the_whole_answer() {
    let world = saying("").await;
    let prepared = || read(&world, json!({})).unwrap();
    let whole = prepared().dialect.whole(by_choice(batches(EndReason::Stop).concat()), USAGE);
    let message = |text: &str| {
        let part = json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []});
        json!({"type": "message", "status": "completed", "role": "assistant", "content": [part]})
    };
    let call = |id: &str, name: &str, arguments: &str| json!({"type": "function_call", "status": "completed", "call_id": id, "name": name, "arguments": arguments});
    let thought =
        json!({"type": "reasoning", "status": "completed", "summary": [], "content": [{"type": "reasoning_text", "text": "Let me look."}]});
    let expected =
        [thought, message("One moment."), call("call_1", "weather", "{\"city\":\"Paris\"}"), call("call_2", "time", "{}"), message("Bye.")];
    assert_eq!(bare(output(&whole)), expected);
    assert_eq!((&whole["status"], &whole["incomplete_details"], &whole["store"]), (&json!("completed"), &Value::Null, &json!(true)));
    assert_eq!(
        whole["usage"],
        json!({
            "input_tokens": 3, "input_tokens_details": {"cached_tokens": 1},
            "output_tokens": 4, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 7,
        })
    );

    let events = named_events(&frames(prepared(), batches(EndReason::Stop)));
    for (number, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], number);
    }
    let types: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    let message = |deltas: usize| {
        let added = ["response.output_item.added", "response.content_part.added"];
        let done = ["response.output_text.done", "response.content_part.done", "response.output_item.done"];
        added.into_iter().chain(vec!["response.output_text.delta"; deltas]).chain(done).collect::<Vec<_>>()
    };
    let simple = |kind: &'static [&'static str; 2], deltas: usize| {
        let (delta, done) = (kind[0], kind[1]);
        [vec!["response.output_item.added"], vec![delta; deltas], vec![done, "response.output_item.done"]].concat()
    };
    let thought = &["response.reasoning_text.delta", "response.reasoning_text.done"];
    let call = &["response.function_call_arguments.delta", "response.function_call_arguments.done"];
    let order = [
        vec!["response.created", "response.in_progress"],
        simple(thought, 2),
        message(1),
        simple(call, 2),
        simple(call, 1),
        message(1),
        vec!["response.completed"],
    ];
    assert_eq!(types, order.concat());
    let last = &events.last().unwrap()["response"];
    assert_eq!(put_together(&events), output(last));
    assert_eq!(bare(output(last)), expected);
    assert_eq!(events[0]["response"]["id"], last["id"]);
    assert_eq!((&events[0]["response"]["status"], &events[0]["response"]["output"]), (&json!("in_progress"), &json!([])));
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
        let whole = read(&world, json!({})).unwrap().dialect.whole(by_choice(batches.concat()), USAGE);
        let events = named_events(&frames(read(&world, json!({})).unwrap(), batches));
        prop_assert!(events.iter().enumerate().all(|(number, event)| event["sequence_number"] == number));
        prop_assert_eq!(bare(put_together(&events)), bare(output(&whole)));
        Ok(())
    });
    run.unwrap();
}

#[tokio::test]
async fn what_a_limit_cuts_off_is_incomplete() {
    let world = saying("").await;
    let events = named_events(&frames(read(&world, json!({})).unwrap(), batches(EndReason::Length)));
    let last = events.last().unwrap();
    assert_eq!((&last["type"], &last["response"]["status"]), (&json!("response.incomplete"), &json!("incomplete")));
    assert_eq!(last["response"]["incomplete_details"], json!({"reason": "max_output_tokens"}));
    let statuses: Vec<Value> = output(&last["response"]).iter().map(|item| item["status"].clone()).collect();
    assert_eq!(statuses, ["completed", "completed", "completed", "completed", "incomplete"]);
}

#[tokio::test]
async fn an_empty_answer_is_one_empty_message() {
    let world = saying("").await;
    let end = vec![Delta { choice: 0, kind: DeltaKind::End(EndReason::Stop) }];
    let events = named_events(&frames(read(&world, json!({})).unwrap(), vec![end]));
    let items = output(&events.last().unwrap()["response"]);
    assert_eq!((items.len(), &items[0]["content"][0]["text"]), (1, &json!("")));
    assert_eq!(put_together(&events), items);
}

#[tokio::test]
async fn a_failure_midway_ends_the_stream_with_the_response_so_far() {
    let world = saying("").await;
    let mut dialect = read(&world, json!({})).unwrap().dialect;
    dialect.open(USAGE);
    dialect.delta(batches(EndReason::Stop)[1].clone(), USAGE);
    let begun = dialect.take().unwrap();
    let events = named_events(&[begun, dialect.error(&Failure::internal("the engine failed"))]);
    for (number, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], number);
    }
    let [.., error, failed] = events.as_slice() else { unreachable!() };
    assert_eq!(
        (&error["type"], &error["message"], &error["code"]),
        (&json!("error"), &json!("the engine failed"), &json!("internal_error"))
    );
    assert_eq!((&failed["type"], &failed["response"]["status"]), (&json!("response.failed"), &json!("failed")));
    assert_eq!(failed["response"]["error"]["message"], "the engine failed");
    assert_eq!(output(&failed["response"])[1]["status"], "incomplete");
}

#[tokio::test]
async fn the_answer_repeats_its_request() {
    let world = saying("Hello").await;
    let asked = json!({
        "input": "Hi", "instructions": "Be kind.", "max_output_tokens": 9, "temperature": 0.5, "metadata": {"a": "b"}, "user": "u",
        "text": {"verbosity": "low"}, "reasoning": {"summary": "auto"}, "truncation": "auto", "seed": 0, "include": ["reasoning.encrypted_content"],
    });
    let response = world.post("/v1/responses", asked).await.unwrap();
    assert!(response["id"].as_str().unwrap().starts_with("resp_"));
    for (name, value) in [
        ("object", json!("response")),
        ("status", json!("completed")),
        ("model", json!("baidu/ERNIE-test")),
        ("error", Value::Null),
        ("instructions", json!("Be kind.")),
        ("max_output_tokens", json!(9)),
        ("temperature", json!(0.5)),
        ("top_p", json!(1.0)),
        ("metadata", json!({"a": "b"})),
        ("user", json!("u")),
        ("text", json!({"format": {"type": "text"}, "verbosity": "low"})),
        ("reasoning", json!({"effort": null, "summary": "auto"})),
        ("truncation", json!("auto")),
        ("tool_choice", json!("auto")),
        ("tools", json!([])),
        ("parallel_tool_calls", json!(true)),
        ("background", json!(false)),
        ("previous_response_id", Value::Null),
    ] {
        assert_eq!(response[name], value, "{name}");
    }
    assert_eq!(response["output"][0]["content"][0]["text"], "Hello");
    assert!(response["created_at"].is_u64() && response["completed_at"].is_u64());
}

#[tokio::test]
async fn log_probabilities_come_with_the_text() {
    let world = saying("Hello").await;
    let asked = json!({"input": "Hi", "seed": 0, "include": ["message.output_text.logprobs"], "top_logprobs": 2});
    let response = world.post("/v1/responses", asked.clone()).await.unwrap();
    let part = &response["output"][0]["content"][0];
    let tokens = part["logprobs"].as_array().unwrap();
    let text: String = tokens.iter().map(|token| token["token"].as_str().unwrap()).collect();
    assert_eq!((text.as_str(), tokens[0]["top_logprobs"].as_array().unwrap().len()), ("Hello", 2));
    let stream = items(world.call("/v1/responses", with(asked, json!({"stream": true}))).await.unwrap()).await;
    let events = named_events(&stream.into_iter().map(Result::unwrap).collect::<Vec<_>>());
    let told: Vec<Value> = events
        .iter()
        .filter(|event| event["type"] == "response.output_text.delta")
        .flat_map(|event| event["logprobs"].as_array().unwrap().clone())
        .collect();
    assert_eq!(json!(told), part["logprobs"]);
}

#[tokio::test]
async fn a_response_is_kept_continued_and_deleted() {
    let world = saying("Hello").await;
    let first = world.post("/v1/responses", json!({"input": "Hi", "seed": 0})).await.unwrap();
    let id = first["id"].as_str().unwrap();
    assert_eq!(world.call(&format!("/v1/responses/{id}"), Value::Null).await.map(whole).unwrap(), first);
    let asked = json!({"input": [{"role": "user", "content": "Yes"}], "previous_response_id": id, "seed": 0});
    let second = world.post("/v1/responses", asked).await.unwrap();
    assert_eq!(second["previous_response_id"], id);
    assert!(second["usage"]["input_tokens"].as_u64() > first["usage"]["input_tokens"].as_u64());
    let list = |query: &str| format!("/v1/responses/{}/input_items{query}", second["id"].as_str().unwrap());
    let page = world.call(&list("?order=asc"), Value::Null).await.map(whole).unwrap();
    let texts: Vec<&Value> = page["data"].as_array().unwrap().iter().map(|item| &item["content"]).collect();
    assert_eq!((texts[0][0]["text"].as_str(), texts[1][0]["text"].as_str(), texts[2]), (Some("Hi"), Some("Hello"), &json!("Yes")));
    assert_eq!((&page["has_more"], &page["first_id"]), (&json!(false), &page["data"][0]["id"]));
    let newest = world.call(&list("?limit=1"), Value::Null).await.map(whole).unwrap();
    assert_eq!((&newest["has_more"], &newest["data"][0]["content"]), (&json!(true), &json!("Yes")));
    let after = format!("?order=asc&after={}", page["data"][1]["id"].as_str().unwrap());
    assert_eq!(world.call(&list(&after), Value::Null).await.map(whole).unwrap()["data"][0]["content"], "Yes");
    assert_eq!(world.call(&list("?limit=0"), Value::Null).await.err().unwrap().param.as_deref(), Some("limit"));

    let answer = &first["output"][0]["id"];
    let referred = json!({"input": [{"type": "item_reference", "id": answer}, {"role": "user", "content": "Yes"}], "seed": 0});
    assert_eq!(world.post("/v1/responses", referred).await.unwrap()["status"], "completed");

    let delete = |id: String| {
        let call = Call {
            method: "DELETE".to_owned(),
            path: format!("/v1/responses/{id}"),
            body: Value::Null,
            request_id: "r".to_owned(),
            client: None,
        };
        world.service.call(call)
    };
    let deleted = delete(id.to_owned()).await.map(whole).unwrap();
    assert_eq!(deleted, json!({"id": id, "object": "response", "deleted": true}));
    let gone = delete(id.to_owned()).await.err().unwrap();
    assert_eq!((gone.status(), gone.code), (404, Some("response_not_found")));
    let gone = world.post("/v1/responses", json!({"input": "Hi", "previous_response_id": id})).await.unwrap_err();
    assert_eq!((gone.status(), gone.code, gone.param.as_deref()), (404, Some("previous_response_not_found"), Some("previous_response_id")));
}

#[tokio::test]
async fn what_is_not_to_be_kept_is_not() {
    let world = saying("Hello").await;
    let response = world.post("/v1/responses", json!({"input": "Hi", "store": false})).await.unwrap();
    assert_eq!(response["store"], false);
    let path = format!("/v1/responses/{}", response["id"].as_str().unwrap());
    assert_eq!(world.call(&path, Value::Null).await.err().unwrap().status(), 404);

    let settings = ApiSettings { responses_store: Some(false), ..ApiSettings::default() };
    let world = world_with(&[vec![]], settings, files(&[]), std::time::Duration::ZERO).await.unwrap();
    let response = world.post("/v1/responses", json!({"input": "Hi"})).await.unwrap();
    assert_eq!(response["store"], false);
    let failure = world.post("/v1/responses", json!({"input": "Hi", "previous_response_id": response["id"]})).await.unwrap_err();
    assert!(failure.status() == 404 && failure.message.contains("another worker"), "{failure}");
}

#[tokio::test]
async fn what_is_not_in_the_background_cannot_be_cancelled() {
    let world = saying("Hello").await;
    let first = world.post("/v1/responses", json!({"input": "Hi", "seed": 0})).await.unwrap();
    let path = format!("/v1/responses/{}/cancel", first["id"].as_str().unwrap());
    let failure = world.call(&path, json!({})).await.err().unwrap();
    assert_eq!((failure.status(), failure.message.as_str()), (400, "Cannot cancel a synchronous response."));
    assert_eq!(world.service.job(json!({"openai_route": path}), "j").await.err().unwrap().status(), 400);
    let failure = world.call("/v1/responses/resp_x/cancel", json!({})).await.err().unwrap();
    assert_eq!((failure.status(), failure.code), (404, Some("response_not_found")));
    assert_eq!(world.call(&path, Value::Null).await.err().unwrap().status(), 405);
}

#[tokio::test]
async fn a_job_carries_every_method() {
    let world = saying("Hello").await;
    let first = world.job(json!({"openai_route": "/v1/responses", "openai_input": {"input": "Hi", "seed": 0}})).await.unwrap();
    let path = format!("/v1/responses/{}", first["id"].as_str().unwrap());
    assert_eq!(world.job(json!({"openai_route": path})).await.unwrap(), first);
    assert_eq!(world.job(json!({"route": path, "method": "GET"})).await.unwrap(), first);
    assert_eq!(world.job(json!({"route": path, "method": "DELETE"})).await.unwrap()["deleted"], true);
    assert_eq!(world.service.job(json!({"openai_route": path}), "j").await.err().unwrap().status(), 404);
    let stream =
        world.job_stream(json!({"openai_route": "/v1/responses", "openai_input": {"input": "Hi", "seed": 0, "stream": true}})).await;
    assert_eq!(named_events(&stream).last().unwrap()["type"], "response.completed");
}

#[tokio::test]
async fn mistakes_are_told_by_the_names_of_the_caller() {
    let world = saying("Hello").await;
    let long = "x".repeat(500);
    let cases = [
        (json!({}), 400, Some("input"), Some("missing_required_parameter")),
        (json!({"input": 5}), 400, Some("input"), None),
        (json!({"input": []}), 400, Some("input"), Some("missing_required_parameter")),
        (json!({"input": "Hi", "model": "nobody"}), 404, Some("model"), Some("model_not_found")),
        (json!({"input": "Hi", "max_output_tokens": 0}), 400, Some("max_output_tokens"), Some("invalid_value")),
        (json!({"input": "Hi", "temperature": 3}), 400, Some("temperature"), Some("invalid_value")),
        (json!({"input": "Hi", "background": true}), 400, Some("background"), Some("unsupported_parameter")),
        (json!({"input": "Hi", "conversation": "c"}), 400, Some("conversation"), Some("unsupported_parameter")),
        (json!({"input": "Hi", "n": 2}), 400, Some("n"), Some("unsupported_parameter")),
        (json!({"input": "Hi", "tools": [{"type": "web_search"}]}), 400, Some("tools[0]"), Some("unsupported_value")),
        (json!({"input": "Hi", "tools": [{"type": "function"}]}), 400, Some("tools[0].name"), Some("missing_required_parameter")),
        (json!({"input": "Hi", "tool_choice": {"type": "file_search"}}), 400, Some("tool_choice"), Some("unsupported_value")),
        (json!({"input": "Hi", "text": {"format": {}}}), 400, Some("text.format.type"), Some("missing_required_parameter")),
        (json!({"input": "Hi", "reasoning": {"effort": "huge"}}), 400, Some("reasoning.effort"), Some("invalid_value")),
        (json!({"input": "Hi", "include": ["x"]}), 400, Some("include[0]"), Some("invalid_value")),
        (json!({"input": "Hi", "truncation": "x"}), 400, Some("truncation"), Some("invalid_value")),
        (json!({"input": "Hi", "metadata": {"a": 1}}), 400, Some("metadata.a"), None),
        (json!({"input": "Hi", "top_logprobs": -1}), 400, Some("top_logprobs"), Some("invalid_value")),
        (json!({"input": [{"type": "item_reference", "id": "x"}]}), 400, Some("input[0].id"), Some("invalid_value")),
        (json!({"input": long}), 400, Some("input"), Some("context_length_exceeded")),
    ];
    for (body, status, param, code) in cases {
        let failure = world.call("/v1/responses", body.clone()).await.err().unwrap();
        assert_eq!((failure.status(), failure.param.as_deref(), failure.code), (status, param, code), "{body}: {failure}");
    }
    assert!(matches!(world.call("/v1/responses", json!({"input": "Hi", "stream": true})).await, Ok(Reply::Stream(_))));
}
