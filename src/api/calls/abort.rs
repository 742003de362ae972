//! `/v1/abort_requests`: ends running requests, which answer with what they have and the finish reason `abort`.

use serde_json::{Value, json};

use crate::api::fields::{Field, Fields, missing, wrong_type};
use crate::api::running::{Aborted, Running};
use crate::error::Failure;

/// `{"req_ids": […]}` or `{"abort_all": true}` → which were told to end, with the tokens they had, and which are not here: none is a
/// mistake, since it may have ended by itself.
pub fn abort(running: &Running, body: &Value) -> Result<Value, Failure> {
    let fields = Fields::new(body)?;
    let (mut aborted, mut unknown) = (Vec::new(), Vec::new());
    if fields.flag("abort_all")? {
        aborted = running.abort_all();
    } else {
        let field = fields.get("req_ids");
        let field = field.ok_or_else(|| missing("req_ids", "Name the requests to abort in 'req_ids', or set 'abort_all' to true."))?;
        for id in ids(&field)? {
            let found = running.abort(id);
            if found.is_empty() {
                unknown.push(id);
            }
            aborted.extend(found);
        }
    }
    let written = |one: &Aborted| json!({"request_id": one.id, "output_token_count": one.output_tokens});
    let aborted: Vec<Value> = aborted.iter().map(written).collect();
    Ok(json!({"status": "success", "result": {"aborted": aborted, "not_found": unknown}}))
}

/// One id, or several.
fn ids<'a>(field: &Field<'a>) -> Result<Vec<&'a str>, Failure> {
    match field.value {
        Value::String(id) => Ok(vec![id]),
        Value::Array(ids) => {
            let id = |(position, value): (usize, &'a Value)| {
                value.as_str().ok_or_else(|| wrong_type(&Field { name: format!("{}[{position}]", field.name), value }, "a string"))
            };
            ids.iter().enumerate().map(id).collect()
        }
        _ => Err(wrong_type(field, "a list of request ids")),
    }
}
