//! Frames of server-sent events: how named ones are written, and which of them end a stream.

use serde_json::Value;

/// Events that nothing follows in their stream. Streams of chunks end with `data: [DONE]`, llama.cpp's with a chunk that says so last.
const LAST: [&str; 5] = ["response.completed", "response.incomplete", "response.failed", "message_stop", "error"];

/// One frame of a named event.
pub fn event(name: &str, data: &Value) -> String {
    format!("event: {name}\ndata: {data}\n\n")
}

/// Whether whole frames end their stream.
pub fn end_stream(frames: &str) -> bool {
    let last = frames.trim_end().rsplit("\n\n").next().unwrap_or_default();
    let stops = || last.starts_with("data: {") && last.ends_with("\"stop\":true}");
    last == "data: [DONE]"
        || stops()
        || last.lines().next().and_then(|line| line.strip_prefix("event: ")).is_some_and(|name| LAST.contains(&name))
}

/// How many named events there are in whole frames.
pub fn count_events(frames: &str) -> usize {
    frames.lines().filter(|line| line.starts_with("event: ")).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn ends_are_told_by_the_last_frame() {
        let text = event("response.output_text.delta", &json!({"delta": "data: [DONE]\n\nevent: error\n"}));
        assert!(!end_stream(&text) && !end_stream("") && !end_stream("data: {\"x\":\"[DONE]\"}\n\n"));
        assert_eq!(count_events(&text), 1);
        for name in LAST {
            let text = format!("{text}{}", event(name, &json!({})));
            assert!(end_stream(&text), "{name}");
            assert_eq!(count_events(&text), 2);
        }
        assert!(end_stream("data: {}\n\ndata: [DONE]\n\n"));
        assert!(end_stream("data: {\"content\":\"\",\"stop\":true}\n\n"));
        assert!(!end_stream(&format!("data: {}\n\n", json!({"content": "\"stop\":true}"}))));
        assert!(!end_stream(&format!("{}{text}", event("error", &json!({})))));
    }
}
