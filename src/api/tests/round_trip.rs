//! What real chat templates make of calls is read back as those calls. `rendered_calls.json` holds what they made of them; with
//! `CHAT_TEMPLATES` naming a folder of templates (llama.cpp has one, `models/templates`) it is made anew, and the formats are found anew.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::api::delta::{Delta, by_choice};
use crate::api::parse::answer::Parsing;
use crate::api::parse::tools::request::{Tool, ToolChoice, ToolRequest};
use crate::api::parse::tools::table;
use crate::api::prompt::template::ChatTemplate;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/api/tests/rendered_calls.json");

/// Of a prompt's end so many characters are kept.
const PROMPT_CHARS: usize = 40;

/// Names and arguments of what is called.
fn calls() -> [(&'static str, Value); 2] {
    let arguments = json!({"city": "Paris", "days": 4, "code": "if a < b:\n\t\"x\"", "options": {"units": ["C", "F"], "deep": true}});
    [("get_weather", arguments), ("get_time", json!({"zone": "UTC+1"}))]
}

fn tools() -> Vec<Tool> {
    let of = |name: &str, parameters: Value| {
        let function = json!({"name": name, "description": "What it does.", "parameters": parameters});
        let definition = json!({"type": "function", "function": function});
        Tool { name: name.to_owned(), parameters, strict: false, place: String::new(), definition }
    };
    let weather =
        json!({"city": {"type": "string"}, "days": {"type": "integer"}, "code": {"type": "string"}, "options": {"type": "object"}});
    let object = |properties: Value| json!({"type": "object", "properties": properties, "required": []});
    vec![of("get_weather", object(weather)), of("get_time", object(json!({"zone": {"type": "string"}})))]
}

/// What the template makes of so many calls: the end of the prompt, and the text behind it. Or why it takes no such message.
fn rendered(template: &ChatTemplate, count: usize) -> Result<(String, String), String> {
    let user = json!({"role": "user", "content": "How is the weather?"});
    let render = |messages: Value, prompt: bool| {
        let definitions: Vec<Value> = tools().into_iter().map(|tool| tool.definition).collect();
        let variables =
            json!({"messages": messages, "tools": definitions, "add_generation_prompt": prompt, "bos_token": "<s>", "eos_token": "</s>"});
        template.render(variables.as_object().unwrap_or(&Map::new())).map_err(|failure| failure.message)
    };
    let before = render(json!([user]), true)?;
    let called = |as_text: bool, content: Value| {
        let call = |(at, (name, arguments)): (usize, &(&str, Value))| {
            let arguments = if as_text { json!(arguments.to_string()) } else { arguments.clone() };
            json!({"id": format!("call0000{at}"), "type": "function", "function": {"name": name, "arguments": arguments}})
        };
        let calls: Vec<Value> = calls().iter().take(count).enumerate().map(call).collect();
        render(json!([user, {"role": "assistant", "content": content, "tool_calls": calls}]), false)
    };
    let mut whole = Err("it says nothing of them".to_owned());
    for (as_text, content) in [(false, json!("")), (false, Value::Null), (true, json!("")), (true, Value::Null)] {
        match called(as_text, content) {
            // Not all of them, or twice escaped: it wants them the other way.
            Ok(text) if !(text.contains("Paris") && (count < 2 || text.contains("UTC"))) || text.contains("\\\\n") => {}
            Ok(text) => {
                whole = Ok(text);
                break;
            }
            Err(error) => whole = Err(error),
        }
    }
    let whole = whole?;
    let mut same = before.chars().zip(whole.chars()).take_while(|(a, b)| a == b).map(|(c, _)| c.len_utf8()).sum::<usize>();
    // A prompt that opens a thought, and a message without one, may differ within a mark.
    if let Some(mark) = whole[..same].rfind('<').filter(|mark| !whole[*mark..same].contains('>')) {
        same = mark;
    }
    let start = before[..same].char_indices().rev().nth(PROMPT_CHARS).map_or(0, |(at, _)| at);
    Ok((before[start..same].to_owned(), whole[same..].to_owned()))
}

fn read(format: &str, prompt: &str, text: &str) -> Vec<(String, Value)> {
    let format = table::find(format);
    assert!(format.is_some());
    let request = ToolRequest { tools: tools(), choice: ToolChoice::Auto, parallel: true, format };
    let mut parsing = Parsing { tools: Some(Arc::new(request)), ..Parsing::default() };
    parsing.begin(prompt);
    let mut parser = parsing.parser();
    let mut deltas = Vec::new();
    parser.push(text.to_owned(), &mut deltas);
    parser.finish(&mut deltas);
    let update = by_choice(deltas.into_iter().map(|kind| Delta { choice: 0, kind }).collect()).pop().unwrap_or_default();
    let call = |call: crate::api::delta::ToolCall| {
        let arguments = serde_json::from_str(&call.arguments).unwrap_or_else(|_| Value::String(call.arguments.clone()));
        (call.start.map(|(_, name)| name).unwrap_or_default(), arguments)
    };
    update.tool_calls.into_iter().map(call).collect()
}

/// By template: the format that it shows, and what it makes of one call and of two.
type Rendered = BTreeMap<String, (String, Vec<Option<(String, String)>>)>;

fn of_folder(folder: &std::ffi::OsStr) -> Rendered {
    let mut all = Rendered::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let source = std::fs::read_to_string(&path).unwrap_or_default();
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let Some(format) = table::detect(&source) else {
            eprintln!("{name}: no format");
            continue;
        };
        match ChatTemplate::compile(&source) {
            Ok(template) => {
                let texts =
                    [1, 2].map(|count| rendered(&template, count).map_err(|why| eprintln!("{name}: {}, {count}: {why}", format.name)).ok());
                let texts = texts.to_vec();
                if texts.iter().all(Option::is_none) {
                    continue;
                }
                all.insert(name, (format.name.to_owned(), texts));
            }
            Err(error) => eprintln!("{name}: {error}"),
        }
    }
    all
}

#[test]
fn calls_as_real_templates_render_them_are_read_back() {
    let all = match std::env::var_os("CHAT_TEMPLATES") {
        Some(folder) => {
            let all = of_folder(&folder);
            std::fs::write(FILE, serde_json::to_string_pretty(&all).unwrap() + "\n").unwrap();
            all
        }
        None => serde_json::from_str(&std::fs::read_to_string(FILE).unwrap()).unwrap(),
    };
    let mut wrong = Vec::new();
    for (name, (format, texts)) in &all {
        for (text, count) in texts.iter().zip([1, 2]) {
            let Some((prompt, text)) = text else { continue };
            let expected: Vec<_> = calls().into_iter().take(count).map(|(name, arguments)| (name.to_owned(), arguments)).collect();
            let found = read(format, prompt, text);
            if found != expected {
                wrong.push(format!("{name} ({format}):\n{text}\n{found:?}\n"));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), all.len(), wrong.join("\n"));
    assert!(all.len() >= 30, "{}", all.len());
}
