//! FastChat's `/api/v1/chat/completions`: chat, with sampling defaults of its own in place of the model's.

use serde_json::{Value, json};

use crate::api::dialects::Prepared;
use crate::api::dialects::objects::{Objects, Surface};
use crate::api::dialects::sse::Sse;
use crate::api::fields::Fields;
use crate::api::logprobs::LogprobsForm;
use crate::api::prompt::chat;
use crate::api::served::ServedModel;
use crate::error::Failure;

/// What holds where the request says nothing.
fn defaults() -> [(&'static str, Value); 6] {
    [
        ("temperature", json!(0.7)),
        ("top_p", json!(1.0)),
        ("top_k", json!(-1)),
        ("presence_penalty", json!(0.0)),
        ("frequency_penalty", json!(0.0)),
        ("repetition_penalty", json!(1.0)),
    ]
}

pub fn read(served: &ServedModel, id: &str, body: &Value) -> Result<Prepared, Failure> {
    let body = &with_defaults(body)?;
    let fields = Fields::new(body)?;
    served.check_model(&fields)?;
    let options = served.options(&fields, LogprobsForm::Chat)?;
    let request = chat::request(served, &fields, options)?;
    let objects = Objects::new(served, id, Surface::chat(served), &request);
    Ok(Prepared { dialect: Box::new(Sse::new(objects, &request.options)), request })
}

/// The body with the defaults that none of its layers overrules.
fn with_defaults(body: &Value) -> Result<Value, Failure> {
    let fields = Fields::new(body)?;
    let absent = defaults().into_iter().filter(|(name, _)| fields.get(name).is_none()).map(|(name, value)| (name.to_owned(), value));
    let mut whole = body.as_object().cloned().unwrap_or_default();
    whole.extend(absent);
    // A plain string is the finished prompt.
    if whole.get("messages").is_some_and(Value::is_string) && fields.get("disable_chat_template").is_none() {
        whole.insert("disable_chat_template".to_owned(), json!(true));
    }
    Ok(Value::Object(whole))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_request_says_anywhere_comes_first() {
        let body = json!({"messages": "x", "top_p": null, "sampling_params": {"temperature": 0.2}});
        let whole = with_defaults(&body).unwrap();
        assert_eq!((&whole["top_p"], &whole["repetition_penalty"], whole.get("temperature")), (&json!(1.0), &json!(1.0), None));
        assert_eq!(Fields::new(&whole).unwrap().number("temperature").unwrap(), Some(0.2));
    }
}
