//! The API as an OpenAPI 3.1 document: `GET /openapi.json`. Its paths are the rows of [`operations`], the fields of requests those of the
//! tables of fields, the objects of answers those of `answers.json`.

use std::sync::LazyLock;

use serde_json::{Map, Value, json};

use crate::api::failure::ErrorForm;

pub mod operations;
mod schemas;

use operations::{AnswerShape, Body, OPERATIONS, Operation};

/// Schemas of what is answered.
const ANSWERS: &str = include_str!("answers.json");

/// The document, made once.
pub fn document() -> &'static Value {
    static DOCUMENT: LazyLock<Value> = LazyLock::new(made);
    &DOCUMENT
}

fn made() -> Value {
    let mut paths = Map::new();
    for operation in OPERATIONS {
        let path = paths.entry(operation.path).or_insert_with(|| json!({}));
        path[operation.method.to_ascii_lowercase()] = of_operation(operation);
        // The probes are at the root alone.
        if !operation.path.starts_with("/v1/") && operation.is_open {
            path["servers"] = json!([{"url": "/"}]);
        }
    }
    let mut components = schemas::components();
    components.extend(serde_json::from_str::<Map<String, Value>>(ANSWERS).unwrap_or_default());
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "worker-candle",
            "version": env!("CARGO_PKG_VERSION"),
            "summary": "Open language models behind OpenAI's API and those of its relatives.",
            "description": "`null` is the same as absent, and unknown fields are accepted. The same routes are jobs of a RunPod queue.",
            "license": {"name": "Apache-2.0 OR MIT"},
        },
        "servers": [{"url": "/"}, {"url": "/openai", "description": "The same routes, as RunPod's gateway names them."}],
        "security": [{"bearer": []}, {"key": []}, {}],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "Where the server has keys (`API_KEY`, `API_KEYS_FILE`)."},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
            "schemas": components,
            "responses": {
                "Failure": failure("What went wrong, in OpenAI's envelope.", "Error"),
                "AnthropicFailure": failure("What went wrong, in Anthropic's form.", "AnthropicError"),
            },
        },
    })
}

fn failure(description: &str, schema: &str) -> Value {
    json!({
        "description": description,
        "headers": {
            "x-request-id": {"schema": {"type": "string"}},
            "retry-after": {"description": "Seconds after which another try makes sense.", "schema": {"type": "string"}},
        },
        "content": {"application/json": {"schema": reference(schema)}},
    })
}

fn reference(schema: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{schema}")})
}

fn of_operation(operation: &Operation) -> Value {
    let mut description = operation.summary.replace("](#", "](https://github.com/worker-candle/worker-candle/blob/main/docs/api.md#");
    if !operation.also.is_empty() {
        let also: Vec<String> = operation.also.iter().map(|path| format!("`{path}`")).collect();
        description += &format!(" Also at {}.", also.join(", "));
    }
    let mut value = json!({
        "operationId": id(operation),
        "tags": [operation.tag],
        "summary": plain(operation.summary),
        "description": description,
        "responses": responses(operation),
    });
    let parameters = parameters(operation);
    if !parameters.is_empty() {
        value["parameters"] = Value::Array(parameters);
    }
    if operation.is_open {
        value["security"] = json!([]);
    }
    if operation.body != Body::Nothing {
        value["requestBody"] = json!({
            "required": true,
            "content": {"application/json": {"schema": schemas::of_body(operation.body), "examples": examples(operation)}},
        });
    }
    value
}

/// `post_v1_chat_completions`.
fn id(operation: &Operation) -> String {
    let path: String = operation.path.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    format!("{}_{}", operation.method.to_ascii_lowercase(), path.trim_matches('_').replace("__", "_"))
}

/// Markdown without the addresses of its links.
fn plain(text: &str) -> String {
    let mut plain = String::new();
    let mut rest = text;
    while let Some((before, link)) = rest.split_once('[') {
        let (words, after) = link.split_once("](").unwrap_or((link, ""));
        plain.push_str(before);
        plain.push_str(words);
        rest = after.split_once(')').map_or("", |(_, after)| after);
    }
    plain + rest
}

fn parameters(operation: &Operation) -> Vec<Value> {
    let names = operation.path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
    let mut parameters: Vec<Value> =
        names.map(|name| json!({"name": name, "in": "path", "required": true, "schema": {"type": "string", "minLength": 1}})).collect();
    if operation.path.ends_with("/input_items") {
        let query = |name: &str, schema: Value| json!({"name": name, "in": "query", "schema": schema});
        parameters.push(query("limit", json!({"type": "integer", "minimum": 1, "maximum": 100, "default": 20})));
        parameters.push(query("order", json!({"enum": ["asc", "desc"], "default": "desc"})));
        parameters.push(query("after", json!({"type": "string"})));
    }
    parameters
}

fn examples(operation: &Operation) -> Map<String, Value> {
    let example = |example: &operations::Example| {
        let body: Value = serde_json::from_str(example.body).unwrap_or_default();
        (
            example.name.to_owned(),
            json!({"summary": format!("{} → {}", example.name, example.status), "value": body, "x-status": example.status}),
        )
    };
    operation.examples.iter().map(example).collect()
}

/// A server-sent event.
fn event_of(schema: &str) -> Value {
    json!({
        "type": "object",
        "description": format!("Each event's data is a `{schema}`, but for OpenAI's last, `[DONE]`."),
        "properties": {
            "event": {"type": "string"},
            "data": {"type": "string"},
        },
        "required": ["data"],
        "x-data": reference(schema),
    })
}

/// The statuses of failures, by what a request is.
fn failures(operation: &Operation) -> &'static [(u16, &'static str)] {
    match (operation.method, operation.is_open) {
        (_, true) => &[(503, "Loading, draining or failed.")],
        ("POST", _) => &[
            (400, "A field is wrong; `param` names it."),
            (401, "No key, or a wrong one."),
            (403, "The key may not use this model."),
            (404, "No such model."),
            (413, "The body is too large."),
            (415, "The body is compressed in a way that is not read."),
            (429, "The queue is full, or the key's limits are reached."),
            (500, "A fault of the server."),
            (503, "Loading, draining or failed."),
            (504, "The request's time is over."),
        ],
        _ => {
            &[(400, "A parameter is wrong."), (401, "No key, or a wrong one."), (404, "Not there."), (503, "Loading, draining or failed.")]
        }
    }
}

fn responses(operation: &Operation) -> Map<String, Value> {
    let mut responses = Map::new();
    let id_header = json!({"x-request-id": {"schema": {"type": "string"}}});
    let ok = |content: Value, description: &str| json!({"description": description, "headers": id_header, "content": content});
    match operation.answer {
        AnswerShape::Json(schema) => {
            responses.insert("200".to_owned(), ok(json!({"application/json": {"schema": reference(schema)}}), "The answer."));
            if operation.path == "/ping" {
                responses.insert("204".to_owned(), json!({"description": "Loading."}));
            }
        }
        AnswerShape::Streamed(whole, event) => {
            let content = json!({
                "application/json": {"schema": reference(whole)},
            "text/event-stream": {"schema": event_of(event)},
            });
            responses.insert("200".to_owned(), ok(content, "The answer; with `stream` as events."));
        }
        AnswerShape::Text(words) => {
            let kind = match operation.path {
                "/docs" => "text/html",
                _ => "text/plain",
            };
            responses.insert("200".to_owned(), ok(json!({kind: {"schema": {"type": "string"}}}), words));
        }
        AnswerShape::Never => {}
    }
    let form = match operation.errors {
        ErrorForm::Anthropic => "AnthropicFailure",
        ErrorForm::OpenAi | ErrorForm::Responses => "Failure",
    };
    let with_body = !matches!(operation.path, "/ping" | "/health");
    for (status, words) in failures(operation) {
        let mut failure = json!({"description": words});
        if with_body {
            failure = json!({"$ref": format!("#/components/responses/{form}"), "description": words});
        }
        responses.insert(status.to_string(), failure);
    }
    responses
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::fmt::Write;

    use super::*;
    use crate::api::routes::{self, Route};

    /// Answered by the server itself, not by the service.
    const SERVERS: &[&str] = &["/ping", "/health", "/metrics", "/docs"];

    #[test]
    fn every_row_is_a_route() {
        for operation in OPERATIONS.iter().filter(|operation| !SERVERS.contains(&operation.path)) {
            let path = operation.path.replace("{model}", "m").replace("{id}", "i");
            let route = routes::find(&path).unwrap_or_else(|| panic!("{path}"));
            assert!(route.takes(operation.method), "{} {path}", operation.method);
            assert_eq!(routes::error_form(&path), operation.errors, "{path}");
            for also in operation.also {
                assert_eq!(routes::find(also), Some(route.clone()), "{also}");
            }
        }
    }

    /// Where a route is in the table. A new one does not compile until it is named here; then [`every`] wants it, too.
    fn place(route: &Route) -> &'static str {
        match route {
            Route::Chat => "/v1/chat/completions",
            Route::Completions => "/v1/completions",
            Route::Infill => "/infill",
            Route::Models => "/v1/models",
            Route::Model(_) => "/v1/models/{model}",
            Route::Embeddings => "/v1/embeddings",
            Route::Responses => "/v1/responses",
            Route::Response(_) => "/v1/responses/{id}",
            Route::CancelResponse(_) => "/v1/responses/{id}/cancel",
            Route::InputItems { .. } => "/v1/responses/{id}/input_items",
            Route::Messages => "/v1/messages",
            Route::CountTokens => "/v1/messages/count_tokens",
            Route::FastChat => "/api/v1/chat/completions",
            Route::Tokenize => "/tokenize",
            Route::Detokenize => "/detokenize",
            Route::ApplyTemplate => "/apply-template",
            Route::Render => "/v1/chat/completions/render",
            Route::TokenCheck => "/api/v1/token_check",
            Route::Abort => "/v1/abort_requests",
            Route::Version => "/version",
            Route::Load => "/load",
            Route::Document => "/openapi.json",
        }
    }

    fn every() -> Vec<Route> {
        let id = || "i".to_owned();
        let with_ids =
            [Route::Model(id()), Route::Response(id()), Route::CancelResponse(id()), Route::InputItems { id: id(), query: String::new() }];
        let openai = [Route::Chat, Route::Completions, Route::Models, Route::Embeddings, Route::Responses, Route::Document];
        let of_others = [
            Route::Infill,
            Route::Messages,
            Route::CountTokens,
            Route::FastChat,
            Route::TokenCheck,
            Route::Abort,
            Route::Version,
            Route::Load,
        ];
        let of_tokens = [Route::Tokenize, Route::Detokenize, Route::ApplyTemplate, Route::Render];
        with_ids.into_iter().chain(openai).chain(of_others).chain(of_tokens).collect()
    }

    #[test]
    fn every_route_has_a_row_for_each_of_its_methods() {
        for route in every() {
            for method in route.methods().split(", ") {
                let has = |operation: &&Operation| operation.method == method && operation.path == place(&route);
                assert_eq!(OPERATIONS.iter().filter(has).count(), 1, "{method} {route:?}");
            }
        }
    }

    #[test]
    fn the_data_files_are_json_and_what_is_named_is_there() {
        let document = document();
        assert!(serde_json::from_str::<Map<String, Value>>(ANSWERS).is_ok());
        let text = document.to_string();
        for part in text.split("\"#/components/").skip(1) {
            let pointer = format!("/components/{}", part.split('"').next().unwrap());
            assert!(document.pointer(&pointer).is_some(), "{pointer}");
        }
        let ids: HashSet<String> = OPERATIONS.iter().map(id).collect();
        assert_eq!(ids.len(), OPERATIONS.len());
        for example in OPERATIONS.iter().flat_map(|operation| operation.examples) {
            assert!(serde_json::from_str::<Map<String, Value>>(example.body).is_ok(), "{}", example.name);
        }
        for operation in OPERATIONS.iter().filter(|operation| operation.body != Body::Nothing) {
            assert!(!operation.examples.is_empty(), "{}", operation.path);
        }
        assert_eq!(plain("a [b](#c) d"), "a b d");
    }

    fn page() -> String {
        let mut text = String::from("| Route | Also | What |\n|---|---|---|\n");
        for operation in OPERATIONS {
            let also: Vec<String> = operation.also.iter().map(|path| format!("`{path}`")).collect();
            writeln!(text, "| `{} {}` | {} | {} |", operation.method, operation.path, also.join(", "), operation.summary).unwrap();
        }
        text
    }

    /// `UPDATE_DOCS=1` writes the table anew.
    #[test]
    fn the_table_of_routes_in_the_documentation_is_true() {
        const BEGIN: &str = "<!-- routes: made from src/api/openapi/operations.rs; do not edit -->\n";
        const END: &str = "<!-- end of routes -->";
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/api.md");
        let text = std::fs::read_to_string(&path).unwrap();
        let (before, rest) = text.split_once(BEGIN).expect("docs/api.md has the mark before the routes");
        let (table, after) = rest.split_once(END).expect("docs/api.md has the mark after the routes");
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(&path, format!("{before}{BEGIN}{}{END}{after}", page())).unwrap();
        } else {
            assert!(table == page(), "the routes of docs/api.md are not those of the table: run this test with UPDATE_DOCS=1");
        }
    }
}
