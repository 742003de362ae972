//! The paths of the OpenAI surface.

use percent_encoding::percent_decode_str;

use crate::api::failure::ErrorForm;

/// What a path stands for.
#[derive(Debug, Clone, PartialEq)]
pub enum Route {
    Chat,
    Completions,
    /// llama.cpp's.
    Infill,
    Models,
    Model(String),
    Embeddings,
    Responses,
    /// A stored response.
    Response(String),
    /// To end a stored response while it is made in the background.
    CancelResponse(String),
    /// What a stored response was an answer to. The query says which page of it.
    InputItems {
        id: String,
        query: String,
    },
    /// Anthropic's.
    Messages,
    /// Anthropic's.
    CountTokens,
    /// FastChat's chat, with defaults of its own.
    FastChat,
    Tokenize,
    Detokenize,
    ApplyTemplate,
    Render,
    TokenCheck,
    Abort,
    Version,
    Load,
    /// The description of this API.
    Document,
}

/// The methods of a path, for the `allow` header of a 405; `None` when there is no such path.
pub fn allow(path: &str) -> Option<&'static str> {
    find(path).map(|route| route.methods())
}

/// A POST to this path says all there is to say: it needs no body.
pub fn needs_no_body(path: &str) -> bool {
    matches!(find(path), Some(Route::CancelResponse(_)))
}

/// How the failures of a path are written, whether or not there is such a path.
pub fn error_form(path: &str) -> ErrorForm {
    let path = bare(path);
    let is_under = |root: &str| path.strip_prefix(root).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    if is_under("v1/messages") {
        ErrorForm::Anthropic
    } else if is_under("v1/responses") {
        ErrorForm::Responses
    } else {
        ErrorForm::OpenAi
    }
}

impl Route {
    /// The methods that it takes, joined by a comma and a space.
    pub fn methods(&self) -> &'static str {
        match self {
            Route::Models | Route::Model(_) | Route::Version | Route::Load | Route::Document | Route::InputItems { .. } => "GET",
            Route::Response(_) => "GET, DELETE",
            _ => "POST",
        }
    }

    /// Whether it takes this method. A HEAD is a GET.
    pub fn takes(&self, method: &str) -> bool {
        self.methods().split(", ").any(|taken| taken == method || (taken == "GET" && method == "HEAD"))
    }
}

/// A path without its query, slashes around it, and `openai` before it.
fn bare(path: &str) -> &str {
    let path = path.split(['?', '#']).next().unwrap_or_default().trim_matches('/');
    if path == "openai" { "" } else { path.strip_prefix("openai/").unwrap_or(path) }
}

/// The path as the client wrote it: with or without a leading slash, `/openai` before it, a slash after it.
pub fn find(path: &str) -> Option<Route> {
    let query = path.split_once('?').map_or("", |(_, query)| query);
    let path = bare(path);
    if let Some((_, of_engine)) = engine(path) {
        return find(of_engine);
    }
    match path {
        "" | "v1/chat/completions" | "chat/completions" => Some(Route::Chat),
        "api/v1/chat/completions" => Some(Route::FastChat),
        "v1/completions" | "completions" => Some(Route::Completions),
        "infill" | "v1/infill" => Some(Route::Infill),
        "v1/models" | "models" => Some(Route::Models),
        "v1/embeddings" | "embeddings" => Some(Route::Embeddings),
        "v1/responses" | "responses" => Some(Route::Responses),
        "v1/messages" => Some(Route::Messages),
        "v1/messages/count_tokens" => Some(Route::CountTokens),
        "tokenize" | "v1/tokenize" => Some(Route::Tokenize),
        "detokenize" | "v1/detokenize" => Some(Route::Detokenize),
        "apply-template" | "v1/apply-template" => Some(Route::ApplyTemplate),
        "v1/chat/completions/render" => Some(Route::Render),
        "api/v1/token_check" => Some(Route::TokenCheck),
        "v1/abort_requests" | "abort_requests" => Some(Route::Abort),
        "version" | "v1/version" => Some(Route::Version),
        "load" | "v1/load" => Some(Route::Load),
        "openapi.json" | "v1/openapi.json" => Some(Route::Document),
        _ => {
            if let Some(id) = path.strip_prefix("v1/models/") {
                return Some(Route::Model(decoded(id)));
            }
            let rest = path.strip_prefix("v1/responses/")?;
            match rest.split_once('/') {
                None => Some(Route::Response(decoded(rest))),
                Some((id, "input_items")) => Some(Route::InputItems { id: decoded(id), query: query.to_owned() }),
                Some((id, "cancel")) => Some(Route::CancelResponse(decoded(id))),
                Some(_) => None,
            }
        }
    }
}

/// The model that the path names: `/v1/engines/MODEL/completions`. The body's `model` comes before it.
pub fn model(path: &str) -> Option<String> {
    engine(bare(path)).map(|(model, _)| decoded(model))
}

/// The model of an engine's path, and the route below it. A model's name may hold slashes.
fn engine(path: &str) -> Option<(&str, &'static str)> {
    let rest = path.strip_prefix("v1/engines/")?;
    let below = |route: &'static str| Some((rest.strip_suffix(route)?.strip_suffix('/')?, route));
    ["chat/completions", "completions", "embeddings"].into_iter().find_map(below).filter(|(model, _)| !model.is_empty())
}

fn decoded(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
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
        assert_eq!(find("/openai/v1/responses/"), Some(Route::Responses));
        assert_eq!(find("/v1/responses/resp_1"), Some(Route::Response("resp_1".to_owned())));
        let items = Route::InputItems { id: "resp_1".to_owned(), query: "limit=2".to_owned() };
        assert_eq!(find("/v1/responses/resp_1/input_items?limit=2"), Some(items));
        let cancel = "/v1/responses/resp_1/cancel";
        assert_eq!((find(cancel), allow(cancel)), (Some(Route::CancelResponse("resp_1".to_owned())), Some("POST")));
        assert_eq!((find("/v1/responses/resp_1/other"), allow("/v1/responses/resp_1")), (None, Some("GET, DELETE")));
        assert_eq!(find("/v1/messages?beta=true"), Some(Route::Messages));
        assert_eq!(find("/openai/v1/messages/count_tokens"), Some(Route::CountTokens));
        for (path, form) in [
            ("/openai/v1/messages?beta=true", ErrorForm::Anthropic),
            ("/v1/messages/batches", ErrorForm::Anthropic),
            ("/v1/responses/x/input_items", ErrorForm::Responses),
            ("/v1/messages_of_ours", ErrorForm::OpenAi),
            ("/v1/chat/completions", ErrorForm::OpenAi),
        ] {
            assert_eq!(error_form(path), form, "{path}");
        }
        assert_eq!((find("/api/v1/chat/completions"), find("/openai/tokenize/")), (Some(Route::FastChat), Some(Route::Tokenize)));
        assert_eq!((allow("/load"), allow("/v1/chat/completions/render"), find("/v1/render")), (Some("GET"), Some("POST"), None));
    }

    #[test]
    fn engines_are_models_in_the_path() {
        for (path, route, name) in [
            ("/v1/engines/demo/completions", Route::Completions, "demo"),
            ("/v1/engines/a/b/chat/completions/", Route::Chat, "a/b"),
            ("/openai/v1/engines/a%2Fb/embeddings?x=1", Route::Embeddings, "a/b"),
        ] {
            assert_eq!((find(path), model(path).as_deref()), (Some(route), Some(name)), "{path}");
        }
        for path in ["/v1/engines", "/v1/engines/completions", "/v1/engines/a/models", "/v1/engines//completions"] {
            assert_eq!((find(path), model(path)), (None, None), "{path}");
        }
        assert_eq!(model("/v1/completions"), None);
    }

    #[test]
    fn methods() {
        assert_eq!((allow("/v1/completions"), allow("/v1/models/x"), allow("/nothing")), (Some("POST"), Some("GET"), None));
    }
}
