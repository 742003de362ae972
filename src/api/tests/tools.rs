//! What a chat template writes of a call is read back as that call; what requests say of tools reaches the template and the parser.

use super::*;
use crate::api::delta::{Delta, by_choice};
use crate::api::parse::answer::Parsing;
use crate::api::parse::tools::request::{Tool, ToolChoice, ToolRequest};
use crate::api::parse::tools::table;
use crate::api::prompt::template::ChatTemplate;

/// The part of each family's template that writes the calls of an assistant's message, in our own words.
const TEMPLATES: &[(&str, &str)] = &[
    (
        "hermes",
        "{% for c in calls %}{{ '<tool_call>\n{\"name\": \"' + c.function.name + '\", \"arguments\": ' + (c.function.arguments | tojson) + '}\n</tool_call>\n' }}{% endfor %}",
    ),
    (
        "qwen3_coder",
        "{% for c in calls %}{{ '<tool_call>\n<function=' + c.function.name + '>\n' }}{% for k, v in c.function.arguments | items %}{{ '<parameter=' + k + '>\n' }}{{ v if v is string else v | tojson }}{{ '\n</parameter>\n' }}{% endfor %}{{ '</function>\n</tool_call>\n' }}{% endfor %}",
    ),
    (
        "llama3_json",
        "{% for c in calls[:1] %}{{ '{\"name\": \"' + c.function.name + '\", \"parameters\": ' + (c.function.arguments | tojson) + '}' }}{% endfor %}",
    ),
    ("mistral", "{{ '[TOOL_CALLS] [' }}{% for c in calls %}{{ c.function | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}]"),
    (
        "deepseek_v3",
        "{{ '<｜tool▁calls▁begin｜>' }}{% for c in calls %}{{ '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + c.function.name + '\n```json\n' + (c.function.arguments | tojson) + '\n```<｜tool▁call▁end｜>' }}{{ '\n' if not loop.last }}{% endfor %}{{ '<｜tool▁calls▁end｜>' }}",
    ),
    (
        "deepseek_v31",
        "{{ '<｜tool▁calls▁begin｜>' }}{% for c in calls %}{{ '<｜tool▁call▁begin｜>' + c.function.name + '<｜tool▁sep｜>' + (c.function.arguments | tojson) + '<｜tool▁call▁end｜>' }}{% endfor %}{{ '<｜tool▁calls▁end｜>' }}",
    ),
    (
        "glm45",
        "{% for c in calls %}{{ '\n<tool_call>' + c.function.name }}{% for k, v in c.function.arguments | items %}\n<arg_key>{{ k }}</arg_key>\n<arg_value>{{ v if v is string else v | tojson }}</arg_value>{% endfor %}{{ '\n</tool_call>' }}{% endfor %}",
    ),
    (
        "kimi_k2",
        "{{ '<|tool_calls_section_begin|>' }}{% for c in calls %}{{ '<|tool_call_begin|>functions.' + c.function.name + ':0<|tool_call_argument_begin|>' + (c.function.arguments | tojson) + '<|tool_call_end|>' }}{% endfor %}{{ '<|tool_calls_section_end|>' }}",
    ),
    ("granite", "{{ '<|tool_call|>[' }}{% for c in calls %}{{ c.function | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}]"),
    (
        "minimax_m2",
        "{{ '<minimax:tool_call>\n' }}{% for c in calls %}{{ '<invoke name=\"' + c.function.name + '\">\n' }}{% for k, v in c.function.arguments | items %}{{ '<parameter name=\"' + k + '\">' }}{{ v if v is string else v | tojson }}{{ '</parameter>\n' }}{% endfor %}{{ '</invoke>\n' }}{% endfor %}{{ '</minimax:tool_call>' }}",
    ),
];

#[test]
fn what_a_template_writes_is_read_back() {
    let schema = json!({"properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "more": {"type": "object"}}});
    let arguments = json!({"city": "Zürich \"old\" <b>\n{x}", "days": 3, "more": {"a": [1, null]}});
    let calls = json!([{"function": {"name": "get_weather", "arguments": arguments}}, {"function": {"name": "get_time", "arguments": {}}}]);
    for (name, template) in TEMPLATES {
        let variables = serde_json::Map::from_iter([("calls".to_owned(), calls.clone())]);
        let text = ChatTemplate::compile(template).unwrap().render(&variables).unwrap();
        let tool = |name: &str| Tool {
            name: name.to_owned(),
            parameters: schema.clone(),
            strict: false,
            place: String::new(),
            definition: Value::Null,
        };
        let tools = vec![tool("get_weather"), tool("get_time")];
        let request = ToolRequest { tools, choice: ToolChoice::Auto, parallel: true, format: table::find(name) };
        let (mut parser, mut deltas) = (Parsing { tools: Some(Arc::new(request)), ..Parsing::default() }.parser(), Vec::new());
        parser.push(text.clone(), &mut deltas);
        parser.finish(&mut deltas);
        let update = by_choice(deltas.into_iter().map(|kind| Delta { choice: 0, kind }).collect()).pop().unwrap();
        assert_eq!(update.text, "", "{name}: {text}");
        let (_, called) = update.tool_calls[0].start.clone().unwrap();
        assert_eq!(called, "get_weather", "{name}");
        assert_eq!(serde_json::from_str::<Value>(&update.tool_calls[0].arguments).unwrap(), arguments, "{name}: {text}");
        assert_eq!(update.tool_calls.get(1).map_or("{}", |call| call.arguments.as_str()), "{}", "{name}");
    }
}

/// A template that knows Hermes calls and thoughts, whose marks are special tokens of the vocabulary.
async fn calling(text: &'static str, settings: ApiSettings) -> World {
    let mut tokenizer: Value = serde_json::from_str(&tokenizer_json()).unwrap();
    let added = tokenizer["added_tokens"].as_array_mut().unwrap();
    let mut token = added.last().unwrap().clone();
    for mark in ["</think>", "<tool_call>", "</tool_call>", "<|pad|>"] {
        (token["content"], token["id"], token["special"]) = (json!(mark), json!(token["id"].as_u64().unwrap() + 1), json!(true));
        added.push(token.clone());
    }
    let template = "{% for t in tools or [] %}{{ t.function.name }};{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}{# <tool_call> #}{% if enable_thinking %}<think>{% endif %}";
    let config = json!({"bos_token": "<s>", "chat_template": template}).to_string();
    let files = files(&[("tokenizer.json", tokenizer.to_string().as_str()), ("tokenizer_config.json", config.as_str())]);
    world_with(&[vec![Say::Text(text)]], settings, files, Duration::ZERO).await.unwrap()
}

fn tools() -> Value {
    json!([{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}])
}

#[tokio::test]
async fn marks_that_are_special_tokens_reach_the_parser_and_others_stay_hidden() {
    const CALL: &str = "<think>a</think>b<|pad|><tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>";
    let world = calling(CALL, ApiSettings::default()).await;
    let answer = world.chat(json!({"tools": tools()})).await.unwrap();
    let (message, usage) = (&answer["choices"][0]["message"], &answer["usage"]);
    assert_eq!((&message["content"], &message["reasoning"]), (&json!("b"), &json!("a")));
    assert_eq!(message["tool_calls"][0]["function"], json!({"name": "f", "arguments": "{}"}));
    assert_eq!(answer["choices"][0]["finish_reason"], "tool_calls");
    assert_eq!(usage["completion_tokens_details"]["reasoning_tokens"], 3, "the thought and its two marks");
    let plain = world.chat(json!({})).await.unwrap();
    assert_eq!(
        plain["choices"][0]["message"]["content"], "b{\"name\": \"f\", \"arguments\": {}}",
        "without tools their marks are hidden, as ever"
    );
}

#[tokio::test]
async fn an_open_thought_in_the_prompt_is_where_the_answer_begins() {
    let world = calling("a</think>b", ApiSettings::default()).await;
    let message = world.chat(json!({"enable_thinking": true})).await.unwrap()["choices"][0]["message"].clone();
    assert_eq!((&message["content"], &message["reasoning_content"]), (&json!("b"), &json!("a")));
}

#[tokio::test]
async fn a_demanded_call_of_a_format_with_tags_needs_no_opening_in_the_prompt() {
    const CALL: &str = "<tool_call>f\n<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>";
    let settings = ApiSettings { tool_call_parser: Some("glm45".to_owned()), ..ApiSettings::default() };
    let world = calling(CALL, settings).await;
    let named = json!({"tools": tools(), "tool_choice": {"type": "function", "function": {"name": "f"}}, "return_token_ids": true});
    let answer = world.chat(named).await.unwrap();
    assert_eq!(answer["choices"][0]["message"]["tool_calls"][0]["function"], json!({"name": "f", "arguments": "{\"a\": \"1\"}"}));
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["prompt_token_ids"], json!(world.ids("f;Hi", Special::Control)));
}

#[tokio::test]
async fn a_demanded_call_comes_behind_the_thought() {
    const CALL: &str = "<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>";
    let named = json!({"tools": tools(), "tool_choice": {"type": "function", "function": {"name": "f"}}, "return_token_ids": true});
    let world = calling(CALL, ApiSettings::default()).await;
    let answer = world.chat(named.clone()).await.unwrap();
    assert_eq!(answer["choices"][0]["message"]["tool_calls"][0]["function"], json!({"name": "f", "arguments": "{}"}));
    assert_eq!(answer["prompt_token_ids"], json!(world.ids("f;Hi", Special::Control)), "nothing is put into the model's mouth");
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
}

#[tokio::test]
async fn budgets_of_thinking_go_by_many_names_and_need_a_format_of_thoughts() {
    let world = calling("abcdef</think>b", ApiSettings::default()).await;
    for wish in [
        json!({"thinking_token_budget": 2}),
        json!({"reasoning_max_tokens": 2}),
        json!({"metadata": {"reasoning_max_tokens": 2}}),
        json!({"thinking_budget": 2}),
        json!({"thinking_budget_tokens": 2}),
        json!({"thinking": {"type": "enabled", "budget_tokens": 2}}),
        json!({"reasoning": {"enabled": true, "max_tokens": 2}}),
    ] {
        let answer = world.chat(with(json!({"enable_thinking": true}), wish.clone())).await.unwrap();
        let message = &answer["choices"][0]["message"];
        assert_eq!(message["reasoning_content"], "ab", "{wish}");
        // The script goes on where the forced tokens end.
        assert!("abcdef</think>b".ends_with(message["content"].as_str().unwrap()), "{wish}: {message}");
    }
    let free = world.chat(json!({"enable_thinking": true, "thinking_budget": -1})).await.unwrap();
    assert_eq!(free["choices"][0]["message"]["reasoning_content"], "abcdef");
    for (wish, param) in
        [(json!({"thinking_budget": -2}), "thinking_budget"), (json!({"reasoning": {"max_tokens": "a"}}), "reasoning.max_tokens")]
    {
        assert_eq!(world.chat(wish).await.unwrap_err().param.as_deref(), Some(param));
    }
    let none = saying("A").await.chat(json!({"reasoning_max_tokens": 5})).await.unwrap_err();
    assert_eq!((none.param.as_deref(), none.code), (Some("reasoning_max_tokens"), Some("unsupported_parameter")));
    assert!(none.message.contains("REASONING_PARSER"), "{none}");
}

#[tokio::test]
async fn settings_choose_the_parsers() {
    let settings = |tool: &str, reasoning: &str| ApiSettings {
        tool_call_parser: Some(tool.to_owned()),
        reasoning_parser: Some(reasoning.to_owned()),
        ..ApiSettings::default()
    };
    let world = calling("<think>a", settings("none", "none")).await;
    assert_eq!(world.chat(json!({"tools": tools()})).await.unwrap()["choices"][0]["message"]["content"], "<think>a");
    let refused = world.chat(json!({"tools": tools(), "tool_choice": "required"})).await.unwrap_err();
    assert_eq!((refused.param.as_deref(), refused.code), (Some("tool_choice"), Some("unsupported_value")));
    for settings in [settings("nothing", "none"), settings("none", "nothing")] {
        let failure = world_with(&[], settings, files(&[]), Duration::ZERO).await.err().unwrap();
        assert!(failure.message.contains("\"nothing\" is no parser") && failure.message.contains("qwen3"), "{failure}");
    }
    let world = calling("A", ApiSettings { refuse_auto_tools: true, ..ApiSettings::default() }).await;
    assert_eq!(world.chat(json!({"tools": tools()})).await.unwrap_err().param.as_deref(), Some("tools"));
}
