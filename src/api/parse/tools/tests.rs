//! Every format: what models write, and what is read of it, however it is cut.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::request::{Tool, ToolChoice};
use super::*;
use crate::api::delta::by_choice;
use crate::api::parse::Parser;
use crate::api::parse::answer::{Parsing, Reasoning};
use crate::api::parse::reasoning::{Start, find_format};

/// What a text is read as.
#[derive(Debug, PartialEq, Clone)]
struct Answer {
    content: String,
    reasoning: String,
    /// Names and arguments.
    calls: Vec<(String, String)>,
}

fn tool(name: &str) -> Tool {
    let parameters = json!({"type": "object", "properties": {
        "city": {"type": "string"}, "days": {"type": "integer"}, "options": {"type": "object"}, "code": {"type": "string"},
    }});
    Tool { name: name.to_owned(), parameters, strict: false, place: String::new(), definition: Value::Null }
}

fn parsing(format: &str, reasoning: Option<(&str, Start)>) -> Parsing {
    let tools = ToolRequest {
        tools: vec![tool("get_weather"), tool("get_time")],
        choice: ToolChoice::Auto,
        parallel: true,
        format: table::find(format),
    };
    assert!(tools.format.is_some(), "{format}");
    let reasoning = reasoning.map(|(name, start)| Reasoning { format: find_format(name).unwrap(), start, apart: true, shown: true });
    Parsing { tools: Some(Arc::new(tools)), reasoning, ..Parsing::default() }
}

fn read<'t>(parsing: &Parsing, pieces: impl IntoIterator<Item = &'t str>) -> Answer {
    let (mut parser, mut deltas): (Box<dyn Parser>, _) = (parsing.parser(), Vec::new());
    for piece in pieces {
        parser.push(piece.to_owned(), &mut deltas);
    }
    parser.finish(&mut deltas);
    let deltas = deltas.into_iter().map(|kind| crate::api::delta::Delta { choice: 0, kind });
    let update = by_choice(deltas.collect()).pop().unwrap_or_default();
    let calls = update.tool_calls.into_iter().enumerate().map(|(place, call)| {
        assert_eq!(call.index, place);
        (call.start.expect("a start").1, call.arguments)
    });
    Answer { content: update.text, reasoning: update.reasoning, calls: calls.collect() }
}

/// A format, what the model writes, the content, and the calls.
type Sample = (&'static str, &'static str, &'static str, &'static [(&'static str, &'static str)]);

const PARIS: (&str, &str) = ("get_weather", "{\"city\": \"Paris\"}");
const TIME: (&str, &str) = ("get_time", "{}");

#[rustfmt::skip]
const SAMPLES: &[Sample] = &[
    ("hermes", "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>", "", &[PARIS]),
    ("hermes", "Let me look.\n\n<tool_call>{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}</tool_call>\n<tool_call>\n{\"name\": \"get_time\"}\n</tool_call>\n", "Let me look.", &[PARIS, TIME]),
    ("hermes", "<tool_call>{\"arguments\": {\"city\": \"Paris\"}, \"name\": \"get_weather\", \"id\": 5}</tool_call>Done.", "Done.", &[PARIS]),
    ("hermes", "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}", "", &[PARIS]),
    ("hermes", "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}\n</tool_call>", "", &[PARIS]),
    ("hermes", "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"\n</tool_call> so", "so", &[("get_weather", "{\"city\": \"Paris\"\n}")]),
    ("hermes", "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": \"{\\\"city\\\": \\\"Paris\\\"}\"}\n</tool_call>", "", &[PARIS]),
    ("hermes", "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"</tool_call>\\n}\"}}}\n</tool_call>", "", &[("get_weather", "{\"city\": \"</tool_call>\\n}\"}")]),
    ("hermes", "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"x\ny\"}}\n</tool_call>", "", &[("f", "{\"a\": \"x\\ny\"}")]),
    ("hermes", "<tool_call>\n{'name': 'f'}\n</tool_call>", "<tool_call>\n{'name': 'f'}\n</tool_call>", &[]),
    ("hermes", "To call, write <tool_call> and </tool_call>. \n", "To call, write <tool_call> and </tool_call>. \n", &[]),
    ("hermes", "<tool_call>", "<tool_call>", &[]),
    ("hermes", "a < b, <tool", "a < b, <tool", &[]),
    ("hermes", "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"cut of", "", &[("f", "{\"a\": \"cut of")]),
    ("hermes", "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": [1, 2", "", &[("f", "{\"a\": [1, 2]}")]),
    ("hermes", "<tool_call>\n{\"name\": \"f\", \"arguments\": {'a': 1}}\n</tool_call>!", "!", &[("f", "{'a': 1}}\n")]),
    ("ernie_x1", "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}\n</tool_call>\n<tool_call>\n{\"name\": \"get_time\", \"arguments\": {}}\n</tool_call>\n", "", &[PARIS, TIME]),
    ("qwen3_coder", "Sure.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n<parameter=options>\n{\"a\": [1]}\n</parameter>\n</function>\n</tool_call>", "Sure.", &[("get_weather", "{\"city\": \"Paris\", \"days\": 3, \"options\": {\"a\": [1]}}")]),
    ("qwen3_coder", "<function=get_time>\n</function>\n</tool_call>\n<tool_call>\n<function=get_weather>\n<parameter=code>\n\nif a < b:\n\t\"x\"\n\n</parameter>\n</function>\n</tool_call>\nBye", "Bye", &[TIME, ("get_weather", "{\"code\": \"\\nif a < b:\\n\\t\\\"x\\\"\\n\"}")]),
    ("qwen3_coder", "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis</function>\n</tool_call>", "", &[PARIS]),
    ("qwen3_coder", "<tool_call>\nnothing", "<tool_call>\nnothing", &[]),
    ("seed_oss", "<seed:tool_call>\n<function=get_weather>\n<parameter=city>Paris</parameter>\n</function>\n</seed:tool_call>", "", &[PARIS]),
    ("minimax_m2", "<minimax:tool_call>\n<invoke name=\"get_weather\">\n<parameter name=\"city\">Paris</parameter>\n<parameter name=\"days\">2</parameter>\n</invoke>\n<invoke name=\"get_time\">\n</invoke>\n</minimax:tool_call>", "", &[("get_weather", "{\"city\": \"Paris\", \"days\": 2}"), TIME]),
    ("deepseek_v32", "<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"get_weather\">\n<｜DSML｜parameter name=\"city\" string=\"true\">Paris</｜DSML｜parameter>\n<｜DSML｜parameter name=\"n\" string=\"false\">[1, 2]</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>", "", &[("get_weather", "{\"city\": \"Paris\", \"n\": [1, 2]}")]),
    ("deepseek_v3", "Yes.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{\"city\": \"Paris\"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_time\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>", "Yes.", &[PARIS, TIME]),
    ("deepseek_v31", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{\"city\": \"Paris\"}<｜tool▁call▁end｜><｜tool▁call▁begin｜>get_time<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>", "", &[PARIS, TIME]),
    ("kimi_k2", "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{\"city\": \"Paris\"}<|tool_call_end|><|tool_call_begin|>functions.get_time:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>", "", &[PARIS, TIME]),
    ("kimi_k2", "<|tool_calls_section_begin|> none", "<|tool_calls_section_begin|> none", &[]),
    ("mistral", "[TOOL_CALLS] [{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}, {\"name\": \"get_time\", \"arguments\": {}}]", "", &[PARIS, TIME]),
    ("mistral", "Hm. [TOOL_CALLS]get_weather[ARGS]{\"city\": \"Paris\"}[TOOL_CALLS]get_time[CALL_ID]abcdefghi[ARGS]{}", "Hm.", &[PARIS, TIME]),
    ("mistral", "see [TOOL] or [1]", "see [TOOL] or [1]", &[]),
    ("glm45", "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n<arg_value>4</arg_value>\n</tool_call>\n<tool_call>get_time\n</tool_call>", "", &[("get_weather", "{\"city\": \"Paris\", \"days\": 4}"), TIME]),
    ("glm45", "<tool_call>get_time</tool_call>", "", &[TIME]),
    ("functionary", "Hm. <function=get_weather>{\"city\": \"Paris\"}</function><function=get_time>{}</function>", "Hm.", &[PARIS, TIME]),
    ("openai", " to=functions.get_weather<|channel|>commentary json<|message|>{\"city\": \"Paris\"}<|call|>", "", &[PARIS]),
    ("openai", "to do", "to do", &[]),
    ("glm4", "get_weather\n{\"city\": \"Paris\"}", "", &[PARIS]),
    ("glm4", "get_weather is a tool", "get_weather is a tool", &[]),
    ("olmo3", "<function_calls>get_weather(city=\"Paris\")\nget_time()</function_calls>", "", &[PARIS, TIME]),
    ("lfm2", "<|tool_call_start|>[get_weather(city=\"Paris\"), get_time()]<|tool_call_end|>There.", "There.", &[PARIS, TIME]),
    ("pythonic", "[get_weather(city='Paris'), get_time()]", "", &[PARIS, TIME]),
    ("pythonic", " [link](http://x) and [f(x)]", " [link](http://x) and [f(x)]", &[]),
    ("pythonic", "[see(1)] this", "[see(1)] this", &[]),
    ("functiongemma", "<start_function_call>call:get_weather{city:<escape>Paris<escape>}<end_function_call>", "", &[PARIS]),
    ("gemma4", "<|tool_call>call:get_weather{city:<|\"|>Paris<|\"|>}<tool_call|><|tool_call>call:get_time{}<tool_call|>", "", &[PARIS, TIME]),
    ("internlm", "I see.<|action_start|><|plugin|>{\"name\": \"get_weather\", \"parameters\": {\"city\": \"Paris\"}}<|action_end|>", "I see.", &[PARIS]),
    ("command", "<|START_ACTION|>[\n    {\"tool_call_id\": \"0\", \"tool_name\": \"get_weather\", \"parameters\": {\"city\": \"Paris\"}}\n]<|END_ACTION|>", "", &[PARIS]),
    ("nemotron_json", "<TOOLCALL>[{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}]</TOOLCALL>", "", &[PARIS]),
    ("hunyuan_a13b", "<tool_calls>[{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}]</tool_calls>", "", &[PARIS]),
    ("minimax", "<tool_calls>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}\n{\"name\": \"get_time\", \"arguments\": {}}\n</tool_calls>", "", &[PARIS, TIME]),
    ("phi4_mini_json", "functools[{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}]", "", &[PARIS]),
    ("phi4_mini_json", "python has functools.", "python has functools.", &[]),
    ("granite", "<|tool_call|>[{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}, {\"name\": \"get_time\", \"arguments\": {}}]", "", &[PARIS, TIME]),
    ("llama3_json", "{\"name\": \"get_weather\", \"parameters\": {\"city\": \"Paris\"}}; {\"name\": \"get_time\", \"parameters\": {}}", "", &[PARIS, TIME]),
    ("llama3_json", "<|python_tag|>{\"type\": \"function\", \"name\": \"get_weather\", \"parameters\": {\"city\": \"Paris\"}}", "", &[PARIS]),
    ("llama3_json", "{\"name\": \"Paris\", \"people\": 2}", "{\"name\": \"Paris\", \"people\": 2}", &[]),
    ("llama3_json", "{\"answer\": {\"name\": \"f\", \"parameters\": {}}}", "{\"answer\": {\"name\": \"f\", \"parameters\": {}}}", &[]),
    ("llama3_json", "Like {\"name\": \"f\", \"parameters\": {}}", "Like {\"name\": \"f\", \"parameters\": {}}", &[]),
    ("xlam", "[{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Paris\"}}]", "", &[PARIS]),
    ("xlam", "[1, 2] is a list", "[1, 2] is a list", &[]),
    ("openai", "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{\"city\": \"Paris\"}<|call|>", "", &[PARIS]),
    ("openai", "<|channel|>final<|message|>Hello.<|return|>", "Hello.", &[]),
];

#[test]
fn every_sample_is_read() {
    for (format, text, content, calls) in SAMPLES {
        let answer = read(&parsing(format, None), [*text]);
        let calls: Vec<_> = calls.iter().map(|(name, arguments)| ((*name).to_owned(), (*arguments).to_owned())).collect();
        assert_eq!((answer.content.as_str(), answer.calls), (*content, calls), "{format}: {text}");
    }
    let formats: Vec<&str> = table::FORMATS.iter().map(|format| format.name).collect();
    for name in formats {
        assert!(SAMPLES.iter().any(|sample| table::find(sample.0).unwrap().name == name), "no sample of {name}");
    }
}

/// Thoughts before, and in the middle of things.
#[rustfmt::skip]
const THOUGHTS: &[(&str, Start, &str, &str, &str, &str, usize)] = &[
    ("qwen3", Start::Undecided, "hermes", "<think>\nHm.\n\nWell.\n</think>\n\nYes.", "Hm.\n\nWell.", "Yes.", 0),
    ("qwen3", Start::Undecided, "hermes", "\n <think></think></think> \n\nYes.\n", "", "Yes.\n", 0),
    ("qwen3", Start::Undecided, "hermes", " Yes <think>no</think>", "", " Yes <think>no</think>", 0),
    ("qwen3", Start::Reasoning, "hermes", "Hm <b>.\n</think>\n<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>", "Hm <b>.", "", 1),
    ("qwen3", Start::Reasoning, "hermes", "<think>\nHm <tool_call>{\"name\": \"f\"}</tool_call> \n", "Hm <tool_call>{\"name\": \"f\"}</tool_call>", "", 0),
    ("qwen3", Start::Reasoning, "qwen3_coder", "Hm\n<tool_call>\n<function=f>\n</function>\n</tool_call>", "Hm", "", 1),
    ("qwen3", Start::Content, "hermes", "a </think> b", "", "a </think> b", 0),
    ("deepseek_r1", Start::Reasoning, "deepseek_v3", "All of it", "All of it", "", 0),
    ("ernie_x1", Start::Reasoning, "ernie45", "Hm\n</think>\n\n<response>\nThe answer.\n\nMore.\n</response>\n", "Hm", "The answer.\n\nMore.", 0),
    ("ernie_x1", Start::Reasoning, "ernie45", "Hm\n</think>\n\n<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>\n", "Hm", "", 1),
    ("hunyuan", Start::Undecided, "hunyuan_a13b", "<think>\nHm\n</think>\n<answer>\nYes.\n</answer>", "Hm", "Yes.", 0),
    ("granite", Start::Undecided, "granite", "Here is my thought process: one, two.\n\nHere is my response: three.", "one, two.", "three.", 0),
    ("granite", Start::Undecided, "granite", "Here is my dog.", "", "Here is my dog.", 0),
    ("mistral", Start::Undecided, "mistral", "[THINK]Hm[/THINK]Yes [1].[TOOL_CALLS]f[ARGS]{}", "Hm", "Yes [1].", 1),
    ("seed_oss", Start::Undecided, "seed_oss", "<seed:think>Hm</seed:think>Yes", "Hm", "Yes", 0),
    ("command", Start::Undecided, "command", "<|START_THINKING|>Hm<|END_THINKING|><|START_RESPONSE|>Yes<|END_RESPONSE|>", "Hm", "Yes", 0),
    ("openai", Start::Undecided, "openai", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>I look. <|end|><|start|>assistant to=functions.f<|channel|>commentary json<|message|><|call|>", "Hm.", "I look. ", 1),
    ("openai", Start::Undecided, "openai", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>a < b", "Hm.", "a < b", 0),
];

#[test]
fn thoughts_are_told_from_the_answer() {
    for (reasoning, start, tools, text, thought, content, calls) in THOUGHTS {
        let answer = read(&parsing(tools, Some((reasoning, *start))), [*text]);
        assert_eq!((answer.reasoning.as_str(), answer.content.as_str(), answer.calls.len()), (*thought, *content, *calls), "{text}");
    }
}

/// All texts with what reads them.
fn all() -> Vec<(Parsing, &'static str)> {
    let plain = SAMPLES.iter().map(|(format, text, ..)| (parsing(format, None), *text));
    let thinking = SAMPLES.iter().map(|(format, text, ..)| (parsing(format, Some(("qwen3", Start::Undecided))), *text));
    let thoughts = THOUGHTS.iter().map(|(reasoning, start, tools, text, ..)| (parsing(tools, Some((reasoning, *start))), *text));
    plain.chain(thinking).chain(thoughts).collect()
}

/// Joined, a stream is what the whole text is, wherever it is cut.
#[test]
fn every_cut_in_two_and_each_character_alone_read_the_same() {
    for (parsing, text) in all() {
        let whole = read(&parsing, [text]);
        for (at, _) in text.char_indices() {
            assert_eq!(read(&parsing, [&text[..at], &text[at..]]), whole, "{:?} | {:?}", &text[..at], &text[at..]);
        }
        let characters: Vec<String> = text.chars().map(String::from).collect();
        assert_eq!(read(&parsing, characters.iter().map(String::as_str)), whole, "{text}");
    }
}

/// The pieces of a text that is cut at these places.
fn pieces(text: &str, mut cuts: Vec<usize>) -> Vec<&str> {
    cuts.retain(|at| text.is_char_boundary(*at));
    cuts.extend([0, text.len()]);
    cuts.sort_unstable();
    cuts.windows(2).map(|ends| &text[ends[0]..ends[1]]).collect()
}

/// What a confused model might write.
fn babble() -> impl Strategy<Value = String> {
    let marks: Vec<&'static str> = table::FORMATS.iter().flat_map(ToolFormat::marks).collect();
    let piece = prop_oneof![
        proptest::sample::select(marks),
        proptest::sample::select(vec!["<think>", "</think>", "<response>", "</response>"]),
        proptest::sample::select(vec![
            "{\"name\": \"f\", \"arguments\": ",
            "{\"a\": 1}",
            "}",
            "]",
            "[",
            "{",
            ",",
            ";",
            "\n",
            " ",
            "\"",
            "f(",
            "a=1",
            ")"
        ]),
        proptest::sample::select(vec!["get_time\n", "call:f{", "functions.f:0", "null", "é", "x y", "```", "\\"]),
    ];
    proptest::collection::vec(piece, 0..14).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn any_cuts_read_the_same(place in 0..1000_usize, cuts in proptest::collection::vec(0..400_usize, 0..12)) {
        let all = all();
        let (parsing, text) = &all[place % all.len()];
        let cuts = cuts.into_iter().filter(|at| *at <= text.len()).collect();
        prop_assert_eq!(read(parsing, pieces(text, cuts)), read(parsing, [*text]));
    }

    #[test]
    fn any_babble_reads_the_same(
        text in babble(), format in 0..table::FORMATS.len(), thinks in any::<bool>(), cuts in proptest::collection::vec(0..200_usize, 0..12),
    ) {
        let reasoning = thinks.then_some(("ernie_x1", Start::Undecided));
        let parsing = parsing(table::FORMATS[format].name, reasoning);
        let cuts: Vec<usize> = cuts.into_iter().filter(|at| *at <= text.len()).collect();
        let whole = read(&parsing, [text.as_str()]);
        prop_assert_eq!(&read(&parsing, pieces(&text, cuts)), &whole);
        let characters: Vec<String> = text.chars().map(String::from).collect();
        prop_assert_eq!(read(&parsing, characters.iter().map(String::as_str)), whole);
    }
}

#[test]
fn without_parallel_calls_only_the_first_is_told() {
    let mut parsing = parsing("hermes", None);
    let mut tools = (*parsing.tools.clone().unwrap()).clone();
    tools.parallel = false;
    parsing.tools = Some(Arc::new(tools));
    let call = |name: &str| format!("<tool_call>\n{{\"name\": \"{name}\", \"arguments\": {{}}}}\n</tool_call>\n");
    let answer = read(&parsing, [(call("f") + &call("g") + "End.").as_str()]);
    assert_eq!(answer.calls, [("f".to_owned(), "{}".to_owned())]);
    assert_eq!(answer.content, "End.");
}

/// The tables of docs/tools-and-reasoning.md. `UPDATE_DOCS=1` writes them anew.
#[test]
fn the_reference_page_is_true() {
    use crate::api::parse::reasoning;
    let row = |name: &str, aliases: &[&str], detect: &[&[&str]]| {
        let code = |text: &&str| format!("`{}`", text.replace('|', "\\|"));
        let groups: Vec<String> = detect.iter().map(|group| group.iter().map(code).collect::<Vec<_>>().join(" and ")).collect();
        let shown = if groups.is_empty() { "– (by name only)".to_owned() } else { groups.join(", or ") };
        format!("| `{name}` | {} | {shown} |\n", aliases.iter().map(code).collect::<Vec<_>>().join(", "))
    };
    let tools: String = table::FORMATS.iter().map(|format| row(format.name, format.aliases, format.detect)).collect();
    let thoughts: String = reasoning::FORMATS.iter().map(|format| row(format.name, format.aliases, format.detect)).collect();
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/tools-and-reasoning.md");
    let page = std::fs::read_to_string(&path).unwrap();
    let mut expected = page.clone();
    for (mark, what, rows) in [("<!-- tools -->\n", "Tool calls", tools), ("<!-- reasoning -->\n", "Thoughts", thoughts)] {
        let start = expected.find(mark).unwrap() + mark.len();
        let end = start + expected[start..].find("<!-- end -->").unwrap();
        let head = format!("\n| {what} | Other names | The template has |\n|---|---|---|\n");
        expected.replace_range(start..end, &format!("{head}{rows}\n"));
    }
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, &expected).unwrap();
    }
    assert!(
        std::fs::read_to_string(&path).unwrap() == expected,
        "docs/tools-and-reasoning.md is not what the tables say: run this test with UPDATE_DOCS=1"
    );
}

#[test]
fn ids_are_those_of_the_family() {
    let id = |format: &str, text: &str| {
        let (mut parser, mut deltas) = (parsing(format, None).parser(), Vec::new());
        parser.push(text.to_owned(), &mut deltas);
        match deltas.into_iter().next() {
            Some(DeltaKind::ToolCall { part: ToolCallPart::Start { id, .. }, .. }) => id,
            other => panic!("{other:?}"),
        }
    };
    assert!(id("hermes", "<tool_call>{\"name\": \"f\", \"arguments\": {").starts_with("call_"));
    assert_eq!(id("mistral", "[TOOL_CALLS]f[ARGS]{").len(), 9);
    assert_eq!(id("kimi_k2", "<|tool_call_begin|>functions.f:3<|tool_call_argument_begin|>{"), "functions.f:3");
}

/// A name is told as soon as it is known, and arguments as they grow.
#[test]
fn arguments_stream() {
    let (mut parser, mut deltas) = (parsing("hermes", None).parser(), Vec::new());
    parser.push("<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"long".to_owned(), &mut deltas);
    assert!(matches!(deltas[..], [DeltaKind::ToolCall { .. }, DeltaKind::ToolCall { .. }]), "{deltas:?}");
    deltas.clear();
    parser.push(" text".to_owned(), &mut deltas);
    assert_eq!(deltas, [DeltaKind::ToolCall { index: 0, part: ToolCallPart::Arguments(" text".to_owned()) }]);
}
