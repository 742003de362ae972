//! `/v1/responses`: items in, a `response` with items out; in a stream, named and numbered events.
//!
//! A request is translated into a chat request (`read`, `items`), and the deltas of its answer into items (`write`). What was answered is
//! kept in the [`response_store::ResponseStore`], where the settings say so.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::api::dialects::Prepared;
use crate::api::response_store;
use crate::api::served::ServedModel;
use crate::error::Failure;

mod items;
mod read;
#[cfg(test)]
mod tests;
mod write;

pub fn read(served: &ServedModel, _: &str, body: &Value) -> Result<Prepared, Failure> {
    let read::Translated { chat, input, store, repeated } = read::translate(body, served.responses.as_deref())?;
    let request = chat.request(served)?;
    let kept = served.responses.clone().filter(|_| store).map(|store| (store, input));
    let dialect = Box::new(write::Writer::new(served, &request, repeated, kept));
    Ok(Prepared { request, dialect })
}

/// `GET /v1/responses/{id}`.
pub fn retrieve(served: &ServedModel, id: &str) -> Result<Value, Failure> {
    Ok(response_store::find(served.responses.as_deref(), id)?.response.clone())
}

/// `DELETE /v1/responses/{id}`.
pub fn delete(served: &ServedModel, id: &str) -> Result<Value, Failure> {
    response_store::find(served.responses.as_deref(), id)?;
    if let Some(store) = &served.responses {
        store.remove(id);
    }
    Ok(json!({"id": id, "object": "response", "deleted": true}))
}

/// `POST /v1/responses/{id}/cancel`: only what is made in the background can be cancelled, and nothing is here.
pub fn cancel(served: &ServedModel, id: &str) -> Result<Value, Failure> {
    response_store::find(served.responses.as_deref(), id)?;
    Err(Failure::bad_request("response_id", "Cannot cancel a synchronous response.").code("unsupported_value"))
}

/// `GET /v1/responses/{id}/input_items`: a page of them, the newest first unless `order` says otherwise.
pub fn input_items(served: &ServedModel, id: &str, query: &str) -> Result<Value, Failure> {
    let stored = response_store::find(served.responses.as_deref(), id)?;
    let page = Page::read(query)?;
    let mut items: Vec<&Value> = stored.input.iter().map(Arc::as_ref).collect();
    if page.newest_first {
        items.reverse();
    }
    if let Some(after) = &page.after {
        let place = items.iter().position(|item| item["id"] == after.as_str()).ok_or_else(|| {
            Failure::bad_request("after", format!("'after' is '{after}', which is no input item of this response.")).code("invalid_value")
        })?;
        items.drain(..=place);
    }
    let has_more = items.len() > page.limit;
    items.truncate(page.limit);
    let end = |item: Option<&&Value>| item.map_or(Value::Null, |item| item["id"].clone());
    Ok(json!({
        "object": "list",
        "first_id": end(items.first()),
        "last_id": end(items.last()),
        "has_more": has_more,
        "data": items,
    }))
}

/// Which part of a list is wanted.
struct Page {
    limit: usize,
    newest_first: bool,
    after: Option<String>,
}

impl Page {
    fn read(query: &str) -> Result<Self, Failure> {
        let mut page = Self { limit: 20, newest_first: true, after: None };
        let wrong = |name: &str, value: &str, expected: &str| {
            Err(Failure::bad_request(name, format!("'{name}' is '{value}'. It must be {expected}.")).code("invalid_value"))
        };
        for pair in query.split('&') {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = percent_encoding::percent_decode_str(value).decode_utf8_lossy();
            match (name, value.as_ref()) {
                ("limit", text) => match text.parse() {
                    Ok(limit @ 1..=100) => page.limit = limit,
                    _ => return wrong(name, text, "a number from 1 to 100"),
                },
                ("order", "asc") => page.newest_first = false,
                ("order", "desc") => page.newest_first = true,
                ("order", other) => return wrong(name, other, "asc or desc"),
                ("after", id) => page.after = Some(id.to_owned()),
                _ => {}
            }
        }
        Ok(page)
    }
}
