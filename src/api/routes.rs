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
}

/// The methods of a path, for the `allow` header of a 405; `None` when there is no such path.
pub fn allow(path: &str) -> Option<&'static str> {
    find(path).map(|route| route.method())
}

impl Route {
    /// The method that it takes.
    pub fn method(&self) -> &'static str {
        match self {
            Route::Chat | Route::Completions | Route::Embeddings => "POST",
            Route::Models | Route::Model(_) => "GET",
        }
    }
}

/// The path as the client wrote it: with or without a leading slash, `/openai` before it, a slash after it.
pub fn find(path: &str) -> Option<Route> {
    let path = path.split(['?', '#']).next().unwrap_or_default().trim_matches('/');
    let path = if path == "openai" { "" } else { path.strip_prefix("openai/").unwrap_or(path) };
    match path {
        "" | "v1/chat/completions" | "chat/completions" | "api/v1/chat/completions" => Some(Route::Chat),
        "v1/completions" | "completions" => Some(Route::Completions),
        "v1/models" | "models" => Some(Route::Models),
        "v1/embeddings" | "embeddings" => Some(Route::Embeddings),
        _ => path.strip_prefix("v1/models/").map(|id| Route::Model(percent_decode_str(id).decode_utf8_lossy().into_owned())),
    }
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
