//! The OpenAI surface: routes, and requests made ready to run.

use std::sync::Arc;

use crate::api::answer::{self, Dialect};
use crate::api::fields::Fields;
use crate::api::generate::Run;
use crate::api::logprobs::Echo;
use crate::api::options::Options;
use crate::api::{Answer, Call, Service};
use crate::error::{Failure, Kind};

pub mod chat;
pub mod completions;
pub mod models;

/// Which objects a request is answered with.
#[derive(Debug, Clone, PartialEq)]
pub enum Surface {
    /// `chat.completion`, written by `role`.
    Chat { role: String },
    /// `text_completion`.
    Text,
}

/// A request that is checked and tokenized.
pub struct Prepared {
    pub surface: Surface,
    pub prompts: Vec<Arc<Vec<u32>>>,
    /// What each prompt's answers begin with; empty when they begin with nothing.
    pub echoes: Arc<Vec<Echo>>,
    pub options: Options,
}

impl Prepared {
    /// Fails when the request holds more sequences than could ever be admitted together, or `min_tokens` that a prompt leaves no room for.
    pub fn new(
        service: &Service,
        surface: Surface,
        prompts: Vec<Arc<Vec<u32>>>,
        echoes: Vec<Echo>,
        options: Options,
    ) -> Result<Self, Failure> {
        let limits = service.engine.limits();
        options.check_number(prompts.len(), surface == Surface::Text, limits)?;
        prompts.iter().try_for_each(|prompt| options.check_room(prompt.len(), limits))?;
        Ok(Self { surface, prompts, echoes: Arc::new(echoes), options })
    }

    /// Submits it and gives the answer in `dialect`, streamed if the request says so.
    pub async fn answer(self, service: &Service, id: &str, dialect: Dialect) -> Result<Answer, Failure> {
        let run = Run::start(service, id, &self)?;
        let stream = self.options.stream;
        let writer = answer::Writer::new(service, id, dialect, self);
        if stream { Ok(Answer::Stream(writer.stream(run))) } else { writer.whole(run).await.map(Answer::Whole) }
    }
}

#[derive(Debug, Clone, PartialEq)]
enum Route {
    Chat,
    Completions,
    Models,
    Model(String),
    Embeddings,
}

/// The methods of a path, for the `allow` header of a 405; `None` when there is no such path.
pub fn allow(path: &str) -> Option<&'static str> {
    find(path).map(|route| route.method())
}

impl Route {
    fn method(&self) -> &'static str {
        match self {
            Route::Chat | Route::Completions | Route::Embeddings => "POST",
            Route::Models | Route::Model(_) => "GET",
        }
    }
}

/// The path as the client wrote it: with or without a leading slash, `/openai` before it, a slash after it.
fn find(path: &str) -> Option<Route> {
    let path = path.split(['?', '#']).next().unwrap_or_default().trim_matches('/');
    let path = if path == "openai" { "" } else { path.strip_prefix("openai/").unwrap_or(path) };
    match path {
        "" | "v1/chat/completions" | "chat/completions" | "api/v1/chat/completions" => Some(Route::Chat),
        "v1/completions" | "completions" => Some(Route::Completions),
        "v1/models" | "models" => Some(Route::Models),
        "v1/embeddings" | "embeddings" => Some(Route::Embeddings),
        _ => path.strip_prefix("v1/models/").map(|id| Route::Model(percent_decoded(id))),
    }
}

fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let hex = after.get(..2).and_then(|digits| std::str::from_utf8(digits).ok()).filter(|digits| !digits.starts_with('+'));
        match hex.filter(|_| byte == b'%').and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(decoded) => {
                bytes.push(decoded);
                rest = &after[2..];
            }
            None => {
                bytes.push(byte);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// One call, whichever door it came through.
pub async fn call(service: &Arc<Service>, call: Call) -> Result<Answer, Failure> {
    let Some(route) = find(&call.path) else {
        return Err(Failure::new(Kind::NotFound, format!("There is no route {} {}.", call.method, call.path)).code("unknown_route"));
    };
    let allowed = route.method();
    if call.method != allowed && !(allowed == "GET" && call.method == "HEAD") {
        let message = format!("{} does not take {}, only {allowed}.", call.path, call.method);
        return Err(Failure::new(Kind::MethodNotAllowed, message).code("method_not_allowed"));
    }
    let body = call.body;
    let prepared = match route {
        Route::Models => return Ok(Answer::Whole(models::list(service))),
        Route::Model(id) => return models::retrieve(service, &id).map(Answer::Whole),
        Route::Embeddings => {
            service.check_model(&Fields::new(&body)?)?;
            let message = format!("The model `{}` generates text and does not support the Embeddings API.", service.name());
            return Err(Failure::bad_request("model", message).code("unsupported_value"));
        }
        Route::Chat => service.prepare(move |service| chat::prepare(service, &body, false)).await?,
        Route::Completions => service.prepare(move |service| completions::prepare(service, &body)).await?,
    };
    prepared.answer(service, &call.request_id, Dialect::OpenAi).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_as_clients_write_them() {
        for path in [
            "/v1/chat/completions",
            "v1/chat/completions",
            "/openai/v1/chat/completions/",
            "/v1/chat/completions?x=1",
            "/chat/completions",
            "/",
        ] {
            assert_eq!(find(path), Some(Route::Chat), "{path}");
        }
        assert_eq!(find("/openai/v1/models"), Some(Route::Models));
        for path in ["/v1/models/a/b", "/v1/models/a%2Fb", "/v1/models/a%2fb/"] {
            assert_eq!(find(path), Some(Route::Model("a/b".to_owned())), "{path}");
        }
        assert_eq!(find("/v1/models/100%25%zz%"), Some(Route::Model("100%%zz%".to_owned())));
        assert_eq!(find("/v2/chat/completions"), None);
        assert_eq!((allow("/v1/completions"), allow("/v1/models/x"), allow("/nothing")), (Some("POST"), Some("GET"), None));
    }
}
