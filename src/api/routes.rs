//! The paths of the OpenAI surface.

use percent_encoding::percent_decode_str;

/// What a path stands for.
#[derive(Debug, Clone, PartialEq)]
pub enum Route {
    Chat,
    Completions,
    Models,
    Model(String),
    Embeddings,
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
}

/// The methods of a path, for the `allow` header of a 405; `None` when there is no such path.
pub fn allow(path: &str) -> Option<&'static str> {
    find(path).map(|route| route.method())
}

impl Route {
    /// The method that it takes.
    pub fn method(&self) -> &'static str {
        match self {
            Route::Models | Route::Model(_) | Route::Version | Route::Load => "GET",
            _ => "POST",
        }
    }
}

/// The path as the client wrote it: with or without a leading slash, `/openai` before it, a slash after it.
pub fn find(path: &str) -> Option<Route> {
    let path = own_part(path);
    if let Some((_, of_engine)) = engine(path) {
        return find(of_engine);
    }
    match path {
        "" | "v1/chat/completions" | "chat/completions" => Some(Route::Chat),
        "api/v1/chat/completions" => Some(Route::FastChat),
        "v1/completions" | "completions" => Some(Route::Completions),
        "v1/models" | "models" => Some(Route::Models),
        "v1/embeddings" | "embeddings" => Some(Route::Embeddings),
        "tokenize" | "v1/tokenize" => Some(Route::Tokenize),
        "detokenize" | "v1/detokenize" => Some(Route::Detokenize),
        "apply-template" | "v1/apply-template" => Some(Route::ApplyTemplate),
        "v1/chat/completions/render" => Some(Route::Render),
        "api/v1/token_check" => Some(Route::TokenCheck),
        "v1/abort_requests" | "abort_requests" => Some(Route::Abort),
        "version" | "v1/version" => Some(Route::Version),
        "load" | "v1/load" => Some(Route::Load),
        _ => path.strip_prefix("v1/models/").map(|id| Route::Model(decoded(id))),
    }
}

/// The model that the path names: `/v1/engines/MODEL/completions`. The body's `model` comes before it.
pub fn model(path: &str) -> Option<String> {
    engine(own_part(path)).map(|(model, _)| decoded(model))
}

/// A path without what clients write around it.
fn own_part(path: &str) -> &str {
    let path = path.split(['?', '#']).next().unwrap_or_default().trim_matches('/');
    if path == "openai" { "" } else { path.strip_prefix("openai/").unwrap_or(path) }
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
