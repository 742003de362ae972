//! Answers under rules, on the demo model's vocabulary: thoughts that a script writes, and tokens picked at random among those allowed.

use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::api::delta::{ChoiceUpdate, Delta, by_choice};
use crate::api::grammar::{Grammar, Grammars};
use crate::api::parse::answer::Reasoning;
use crate::api::parse::reasoning::find_format;
use crate::api::parse::tools::request::{Tool, ToolChoice, ToolRequest};
use crate::api::parse::tools::table;
use crate::checkpoint::demo;
use crate::engine::{Constraint, Next};
use crate::models::sample::uniform;

static TOKENIZER: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| Arc::new(Tokenizer::load(&demo::files()).unwrap()));
static ENDS: LazyLock<Arc<Vec<u32>>> = LazyLock::new(|| Arc::new(vec![TOKENIZER.token_id("</s>").unwrap()]));
static GRAMMARS: LazyLock<Grammars> = LazyLock::new(|| Grammars::new(TOKENIZER.clone(), TOKENIZER.vocab_size(), ENDS.clone()));

fn ids(text: &str) -> Vec<u32> {
    marks::ids(&TOKENIZER, text).unwrap()
}

fn text_of(ids: &[u32]) -> String {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| TOKENIZER.token_bytes(*id).unwrap()).copied().collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn parsing(start: Option<Start>) -> Parsing {
    let reasoning = start.map(|start| Reasoning { format: find_format("qwen3").unwrap(), start, apart: true, shown: true });
    Parsing { reasoning, ..Parsing::default() }
}

fn rules(parsing: &Parsing, wishes: Wishes) -> Arc<Rules> {
    let vocabulary = Vocabulary { tokenizer: &TOKENIZER, ends: &ENDS, size: TOKENIZER.vocab_size() };
    Rules::new(&vocabulary, parsing, wishes).unwrap().unwrap()
}

/// What comes of a model that would write these tokens: where one is not allowed another comes in its place, and then they go on. With
/// whether the answer came to its end.
fn follow(rules: &Arc<Rules>, script: &[u32]) -> (Vec<u32>, bool) {
    let mut at = 0;
    run(rules, |allowed, _| {
        let next = script.get(at).copied().filter(|id| allowed(*id));
        at += usize::from(next.is_some());
        match next {
            None if at < script.len() => Some(any_of(allowed)),
            next => next,
        }
    })
}

/// The same of a text, of which each time as long a token is taken as is allowed.
fn written(rules: &Arc<Rules>, script: &str) -> String {
    let mut rest = script.as_bytes();
    let output = run(rules, |allowed, _| {
        let bytes = |id: u32| TOKENIZER.token_bytes(id).unwrap_or_default();
        let fits = |id: &u32| !bytes(*id).is_empty() && rest.starts_with(bytes(*id)) && allowed(*id);
        let longest = all_ids().filter(fits).max_by_key(|id| bytes(*id).len());
        match longest {
            Some(id) => rest = &rest[bytes(id).len()..],
            None if !rest.is_empty() || !allowed(ENDS[0]) => return Some(any_of(allowed)),
            None => {}
        }
        longest
    });
    text_of(&output.0)
}

fn all_ids() -> impl Iterator<Item = u32> {
    0..TOKENIZER.vocab_size() as u32
}

fn any_of(allowed: &dyn Fn(u32) -> bool) -> u32 {
    let printable = |id: &u32| TOKENIZER.token_bytes(*id).is_some_and(|bytes| bytes.iter().all(u8::is_ascii_graphic) && !bytes.is_empty());
    let mut ids = all_ids().filter(|id| allowed(*id) && *id != ENDS[0]);
    let first = ids.next().expect("a token");
    if printable(&first) { first } else { ids.find(printable).unwrap_or(first) }
}

/// A sequence to its end. `choose` picks one of the allowed tokens after these, or none: the end.
fn run(rules: &Arc<Rules>, mut choose: impl FnMut(&dyn Fn(u32) -> bool, &[u32]) -> Option<u32>) -> (Vec<u32>, bool) {
    let (mut constraint, mut output) = (rules.constraint().unwrap(), Vec::new());
    for _ in 0..300 {
        let picked = match constraint.next().unwrap() {
            Next::End | Next::Full => return (output, true),
            Next::Forced(forced) => choose(&|id| id == forced[0], &output).or(Some(forced[0])),
            Next::Anything => choose(&|_| true, &output),
            Next::Masked => {
                let mask = constraint.mask().unwrap();
                choose(&|id| mask.allows(id), &output)
            }
        };
        let Some(token) = picked else { return (output, true) };
        constraint.accept(token).unwrap();
        output.push(token);
    }
    (output, false)
}

fn grammar(texts: &[&str]) -> Arc<CompiledGrammar> {
    GRAMMARS.compile(&Grammar::Choice(texts.iter().map(|text| (*text).to_owned()).collect())).unwrap()
}

fn budget(tokens: usize) -> Wishes {
    Wishes { thought_tokens: Some(tokens), ..Wishes::default() }
}

#[test]
fn a_budget_ends_the_thought_at_every_place_and_never_one_that_is_over() {
    const THOUGHT: &str = "The user asks.";
    const REST: &str = "\n</think>\n\nParis.";
    let thought = ids(THOUGHT);
    for tokens in 0..thought.len() + 8 {
        let cut = &thought[..tokens.min(thought.len())];
        let opened = rules(&parsing(Some(Start::Reasoning)), budget(tokens));
        let whole = [thought.clone(), ids(REST)].concat();
        let output = follow(&opened, &whole).0;
        // As many tokens of the script come as the budget has, and then the closing mark.
        let output = text_of(&output);
        if tokens >= thought.len() + ids("\n</think>").len() {
            assert_eq!(output, text_of(&whole), "{tokens}");
        } else {
            let (before, after) = output.split_once("</think>").unwrap();
            assert_eq!(before, text_of(&whole[..tokens]) + "\n", "{tokens}");
            assert!(after.starts_with("\n\n") && after.ends_with("Paris."), "{tokens}: {output}");
        }
        // A thought that the answer opens itself.
        let undecided = rules(&parsing(Some(Start::Undecided)), budget(tokens));
        let text = text_of(&follow(&undecided, &ids(&format!("<think>{THOUGHT}"))).0);
        let all = if tokens <= thought.len() { "\n</think>\n\n" } else { "" };
        assert_eq!(text, format!("<think>{}{all}{}", text_of(cut), text_of(&thought[cut.len()..])), "{tokens}");
        assert_eq!(written(&undecided, "Paris is in France."), "Paris is in France.", "no thought, no budget");
    }
}

#[test]
fn a_grammar_holds_behind_the_thought_alone() {
    let wishes = || Wishes { grammar: Some(grammar(&["yes", "no"])), ..Wishes::default() };
    let open = rules(&parsing(Some(Start::Reasoning)), wishes());
    assert_eq!(written(&open, "hm, \"no\"?</think>yes"), "hm, \"no\"?</think>\n\nyes");
    let undecided = rules(&parsing(Some(Start::Undecided)), wishes());
    assert_eq!(written(&undecided, "no"), "no");
    assert_eq!(written(&undecided, "<think>maybe</think>no"), "<think>maybe</think>\n\nno");
    let bounded = rules(&parsing(Some(Start::Reasoning)), Wishes { thought_tokens: Some(0), ..wishes() });
    assert_eq!(written(&bounded, "yes"), "\n</think>\n\nyes");
    let bounded = rules(&parsing(Some(Start::Undecided)), Wishes { thought_tokens: Some(0), ..wishes() });
    assert!(["yes", "no"].contains(&written(&bounded, "<think>").as_str()), "no thought is opened that must be empty");
    // The end of sequence does not get around the grammar.
    let mut constraint = open.constraint().unwrap();
    assert_eq!(constraint.next().unwrap(), Next::Masked);
    assert!(!constraint.mask().unwrap().allows(ENDS[0]));
}

#[test]
fn a_closing_mark_is_found_however_it_is_cut_into_tokens() {
    let format = find_format("granite").unwrap();
    let reasoning = Some(Reasoning { format, start: Start::Reasoning, apart: true, shown: true });
    let wishes = || Wishes { grammar: Some(grammar(&["yes"])), ..Wishes::default() };
    let rules = rules(&Parsing { reasoning, ..Parsing::default() }, wishes());
    assert!(ids("Here is my response:").len() > 2);
    assert_eq!(written(&rules, "so. Here is my response:yes"), "so. Here is my response:\nyes");
    let bytes: Vec<u32> = "x Here's my response:".bytes().map(|byte| TOKENIZER.token_id(&format!("<0x{byte:02X}>")).unwrap()).collect();
    assert_eq!(text_of(&follow(&rules, &bytes).0), "x Here's my response:\nyes");
}

#[test]
fn the_answer_behind_a_thought_has_a_limit_of_its_own() {
    let rules = rules(&parsing(Some(Start::Reasoning)), Wishes { answer_tokens: Some(2), ..Wishes::default() });
    let thought = ids("a b c d e</think>");
    let mut script = thought.clone();
    script.extend(ids("one two three"));
    let (output, ended) = follow(&rules, &script);
    assert!(ended && output.len() == thought.len() + 2, "{}", text_of(&output));
    let mut constraint = rules.constraint().unwrap();
    output.iter().for_each(|id| constraint.accept(*id).unwrap());
    assert_eq!(constraint.next().unwrap(), Next::Full);
    // An answer that might have begun with a thought: its first tokens count, too.
    let rules = self::rules(&parsing(Some(Start::Undecided)), Wishes { answer_tokens: Some(3), ..Wishes::default() });
    let (output, ended) = follow(&rules, &ids("one two three four"));
    assert!(ended && output.len() == 3, "{}", text_of(&output));
}

fn tool(place: usize, name: &str, strict: bool, parameters: Value) -> Tool {
    Tool { name: name.to_owned(), parameters, strict, place: format!("tools[{place}].function"), definition: Value::Null }
}

fn weather() -> Value {
    json!({"type": "object", "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"$ref": "#/$defs/days"}},
        "required": ["city", "days"], "additionalProperties": false, "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}}})
}

fn request(format: &str, choice: ToolChoice, parallel: bool) -> ToolRequest {
    let time = json!({"properties": {"zone": {"enum": ["UTC", "CET"]}}, "required": ["zone"], "additionalProperties": false});
    let tools = vec![tool(0, "get_weather", false, weather()), tool(1, "get_time", true, time)];
    ToolRequest { tools, choice, parallel, format: table::find(format) }
}

fn calls(request: &ToolRequest, with_whole: bool) -> Option<CallGrammars> {
    CallGrammars::new(&GRAMMARS, &TOKENIZER, request, with_whole).unwrap()
}

/// Every argument keeps to its tool's schema.
fn fits(name: &str, arguments: &str) -> bool {
    let Ok(Value::Object(arguments)) = serde_json::from_str(arguments) else { return false };
    match name {
        "get_weather" => {
            arguments.len() == 2 && arguments["city"].is_string() && arguments["days"].as_u64().is_some_and(|n| (1..=9).contains(&n))
        }
        "get_time" => arguments.len() == 1 && ["UTC", "CET"].contains(&arguments["zone"].as_str().unwrap_or_default()),
        _ => false,
    }
}

fn read(parsing: &Parsing, text: &str) -> ChoiceUpdate {
    let (mut parser, mut deltas) = (parsing.parser(), Vec::new());
    parser.push(text.to_owned(), &mut deltas);
    parser.finish(&mut deltas);
    by_choice(deltas.into_iter().map(|kind| Delta { choice: 0, kind }).collect()).pop().unwrap_or_default()
}

/// Picks among the allowed tokens at random, those that close something rather often. With whether the answer came to its end.
fn random(rules: &Arc<Rules>, seed: u64, most: u64) -> (String, bool) {
    let mut constraint = rules.constraint().unwrap();
    let closing: Vec<u32> = ["\"", "}", "]", "\"}", "0"].iter().filter_map(|text| TOKENIZER.token_id(text)).chain([ENDS[0]]).collect();
    let all = || 0..TOKENIZER.vocab_size() as u32;
    let mut output = Vec::new();
    for at in 0..most {
        let allowed: Vec<u32> = match constraint.next().unwrap() {
            Next::End | Next::Full => return (text_of(&output), true),
            Next::Forced(forced) => vec![forced[0]],
            Next::Anything => all().filter(|id| TOKENIZER.token_bytes(*id).is_some()).collect(),
            Next::Masked => {
                let mask = constraint.mask().unwrap();
                all().filter(|id| mask.allows(*id)).collect()
            }
        };
        assert!(!allowed.is_empty());
        let closers: Vec<u32> = closing.iter().copied().filter(|id| allowed.contains(id)).collect();
        let from = if uniform(seed, 2 * at) < 0.5 && !closers.is_empty() { closers } else { allowed };
        let pick = from[(uniform(seed, 2 * at + 1) * from.len() as f64) as usize];
        if ENDS.contains(&pick) {
            return (text_of(&output), true);
        }
        constraint.accept(pick).unwrap();
        output.push(pick);
    }
    (text_of(&output), false)
}

fn with_grammar() -> impl Iterator<Item = &'static str> {
    table::FORMATS.iter().map(|format| format.name)
}

fn demanded(format: &str, choice: ToolChoice, parallel: bool) -> (Parsing, Arc<Rules>) {
    let request = request(format, choice, parallel);
    let wishes = Wishes { calls: calls(&request, false), ..Wishes::default() };
    let parsing = Parsing { tools: Some(Arc::new(request)), ..Parsing::default() };
    let rules = rules(&parsing, wishes);
    (parsing, rules)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_is_demanded_is_read_as_calls_that_keep_to_their_schemas(seed in any::<u64>(), parallel in any::<bool>(), named in any::<bool>()) {
        for format in with_grammar() {
            let choice = if named { ToolChoice::Named("get_time".to_owned()) } else { ToolChoice::Required };
            let (parsing, rules) = demanded(format, choice, parallel);
            let (text, ended) = random(&rules, seed, 300);
            if !ended {
                continue;
            }
            let update = read(&parsing, &text);
            prop_assert!(!update.tool_calls.is_empty() && update.text.trim().is_empty(), "{format}: {text:?} is {update:?}");
            prop_assert!(parallel || update.tool_calls.len() == 1, "{format}: {text:?}");
            for call in &update.tool_calls {
                let name = &call.start.as_ref().unwrap().1;
                prop_assert!(fits(name, &call.arguments), "{format}: {text:?} is {update:?}");
                prop_assert!(!named || name == "get_time", "{format}: {text:?}");
            }
        }
    }

    /// Taking tokens back leaves what there was, wherever the answer is: in thoughts, in their forced end, between calls and in them.
    #[test]
    fn tokens_can_be_taken_back(seed in any::<u64>(), back in 1..12usize, budget in proptest::option::of(0..6usize), kind in 0..3usize) {
        let request = request("hermes", if kind == 0 { ToolChoice::Required } else { ToolChoice::Auto }, true);
        let content = (kind == 2).then(|| grammar(&["yes", "no, never"]));
        let calls = calls(&request, content.is_some());
        let rules = rules(&parsing(Some(if seed % 2 == 0 { Start::Undecided } else { Start::Reasoning })),
            Wishes { thought_tokens: budget, grammar: content, calls, ..Wishes::default() });
        let script = ids("<think>so it is</think>Look: <tool_call>\n{\"name\": \"get_time\", \"arguments\": {\"zone\": \"UTC\"}}\n</tool_call> and");
        let output = follow(&rules, &script[(seed % 3) as usize..]).0;
        let state = |constraint: &mut dyn Constraint| match constraint.next().unwrap() {
            Next::Masked => (Next::Masked, Some(constraint.mask().unwrap())),
            next => (next, None),
        };
        let mut constraint = rules.constraint().unwrap();
        let mut states = Vec::new();
        for (at, id) in output.iter().enumerate() {
            states.push(state(&mut *constraint));
            constraint.accept(*id).unwrap();
            if at + 1 >= back {
                constraint.rollback(back).unwrap();
                prop_assert_eq!(&state(&mut *constraint), &states[at + 1 - back]);
                output[at + 1 - back..=at].iter().for_each(|id| constraint.accept(*id).unwrap());
            }
        }
    }
}

#[test]
fn free_text_is_free_and_calls_in_it_are_calls() {
    let request = request("hermes", ToolChoice::Auto, true);
    let wishes = Wishes { calls: calls(&request, false), ..Wishes::default() };
    let parsing = Parsing { tools: Some(Arc::new(request)), ..Parsing::default() };
    let rules = rules(&parsing, wishes);
    for text in [
        "a { \"name\": 5 } b",
        "Look: <tool_call>\n{\"name\": \"get_time\", \"arguments\": {\"zone\": \"UTC\"}}\n</tool_call>\n<tool_call>{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Rome\", \"days\": 3}}</tool_call> Done.",
    ] {
        assert_eq!(written(&rules, text), text);
    }
    // From the mark on the script goes only as far as it is a call.
    let text = written(&rules, "So <tool_call>{\"name\": \"get_moon\"}");
    let update = read(&parsing, &text);
    assert!(update.tool_calls.iter().all(|call| fits(&call.start.as_ref().unwrap().1, &call.arguments)), "{text}");
    let mut constraint = rules.constraint().unwrap();
    ids("So <tool_call>").into_iter().for_each(|id| constraint.accept(id).unwrap());
    assert_ne!(constraint.next().unwrap(), Next::Anything);
    ids("\n{\"name\": \"get_time\", \"arguments\": {\"zone\": \"UTC\"}}\n</tool_call>")
        .into_iter()
        .for_each(|id| constraint.accept(id).unwrap());
    assert_eq!(constraint.next().unwrap(), Next::Anything, "free again");
}

#[test]
fn marks_of_text_and_calls_without_marks_are_found() {
    for (format, text) in [
        (
            "llama3_json",
            "{\"name\": \"get_time\", \"parameters\": {\"zone\": \"UTC\"}}; {\"name\": \"get_time\", \"parameters\": {\"zone\": \"CET\"}}",
        ),
        (
            "kimi_k2",
            "Ok.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_time:0<|tool_call_argument_begin|>{\"zone\": \"UTC\"}<|tool_call_end|><|tool_calls_section_end|>",
        ),
        (
            "deepseek_v3",
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_time\n```json\n{\"zone\": \"UTC\"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ),
        ("granite", "<|tool_call|>[{\"name\": \"get_time\", \"arguments\": {\"zone\": \"UTC\"}}]"),
        ("mistral", "[TOOL_CALLS] [{\"name\": \"get_time\", \"arguments\": {\"zone\": \"UTC\"}}]"),
        ("qwen3_coder", "Ok.<tool_call>\n<function=get_time>\n<parameter=zone>\nUTC\n</parameter>\n</function>\n</tool_call>"),
        (
            "minimax_m2",
            "<minimax:tool_call>\n<invoke name=\"get_time\">\n<parameter name=\"zone\">UTC</parameter>\n</invoke>\n</minimax:tool_call>",
        ),
        ("glm45", "Ok <tool_call>get_time\n<arg_key>zone</arg_key>\n<arg_value>UTC</arg_value>\n</tool_call> so"),
        ("glm4", "get_time\n{\"zone\": \"UTC\"}"),
        (
            "deepseek_v32",
            "<｜DSML｜function_calls>\n<｜DSML｜invoke name=\"get_time\">\n<｜DSML｜parameter name=\"zone\" string=\"true\">UTC</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜function_calls>",
        ),
        ("pythonic", "[get_time(zone=\"UTC\"), get_time(zone=\"CET\")]"),
        ("olmo3", "<function_calls>get_time(zone=\"UTC\")\nget_time(zone=\"CET\")</function_calls>"),
        ("lfm2", "<|tool_call_start|>[get_time(zone=\"UTC\")]<|tool_call_end|>Done."),
        ("functiongemma", "<start_function_call>call:get_time{zone:<escape>UTC<escape>}<end_function_call>"),
        ("gemma4", "<|tool_call>call:get_time{zone:<|\"|>UTC<|\"|>}<tool_call|>"),
        ("openai", "<|channel|>commentary to=functions.get_time <|constrain|>json<|message|>{\"zone\": \"UTC\"}<|call|>"),
        ("openai", " to=functions.get_time<|channel|>commentary json<|message|>{\"zone\": \"UTC\"}<|call|>"),
        ("functionary", "<function=get_time>{\"zone\": \"UTC\"}</function>"),
        ("openai", "<|start|>assistant to=functions.get_time<|channel|>commentary json<|message|>{\"zone\": \"UTC\"}<|call|>"),
    ] {
        let request = request(format, ToolChoice::Auto, true);
        let wishes = Wishes { calls: calls(&request, false), ..Wishes::default() };
        let parsing = Parsing { tools: Some(Arc::new(request)), ..Parsing::default() };
        let rules = rules(&parsing, wishes);
        assert_eq!(written(&rules, text), text, "{format}");
        let wrong = text.replace("get_time", "get_moon");
        let answer = read(&parsing, &written(&rules, &wrong));
        assert!(
            answer.tool_calls.iter().all(|call| call.start.as_ref().is_some_and(|(_, name)| name != "get_moon")),
            "{format}: {answer:?}"
        );
    }
}

#[test]
fn brackets_that_open_no_call_are_text() {
    let request = request("pythonic", ToolChoice::Auto, true);
    let rules = rules(&parsing(None), Wishes { calls: calls(&request, false), ..Wishes::default() });
    for text in ["[1] is a note.", "[get_moon(a=1)]", "[get_time is a function]"] {
        assert_eq!(written(&rules, text), text);
    }
}

#[test]
fn a_name_alone_is_a_call_where_its_arguments_follow() {
    let request = request("glm4", ToolChoice::Auto, true);
    let rules = rules(&parsing(None), Wishes { calls: calls(&request, false), ..Wishes::default() });
    for text in ["get_time is a function", "get_times\n{\"zone\": 3}", "I call get_time\n{\"zone\": 3}", "get_time {"] {
        assert_eq!(written(&rules, text), text);
    }
    let parsing = Parsing { tools: Some(Arc::new(request)), ..Parsing::default() };
    let answer = read(&parsing, &written(&rules, "get_time\n{\"zone\": 3, \"place\": null}"));
    assert!(matches!(&answer.tool_calls[..], [call] if fits("get_time", &call.arguments)), "{answer:?}");
}

const ANALYSIS: &str = "<|channel|>analysis<|message|>hm, a < b.";
const TO_TIME: &str = "<|channel|>commentary to=functions.get_time <|constrain|>json<|message|>{\"zone\": \"UTC\"}";

fn harmony() -> Parsing {
    let format = find_format("openai_gptoss").unwrap();
    Parsing { reasoning: Some(Reasoning { format, start: Start::Undecided, apart: true, shown: true }), ..Parsing::default() }
}

#[test]
fn a_call_of_gpt_oss_is_a_message_behind_the_thoughts() {
    let of = |choice: ToolChoice, content: bool, wishes: Wishes| {
        let request = request("openai", choice, true);
        let grammar = content.then(|| grammar(&["yes", "no"]));
        let calls = calls(&request, content);
        rules(&Parsing { tools: Some(Arc::new(request)), ..harmony() }, Wishes { calls, grammar, ..wishes })
    };
    let call = format!("{ANALYSIS}<|end|><|start|>assistant{TO_TIME}");
    let demanded = of(ToolChoice::Required, false, Wishes::default());
    assert_eq!(written(&demanded, &call), call);
    assert_eq!(written(&demanded, TO_TIME), TO_TIME, "without thoughts");
    let other = written(&demanded, &format!("{ANALYSIS}<|end|><|start|>assistant<|channel|>final<|message|>No."));
    assert!(other.starts_with(&format!("{ANALYSIS}<|end|><|start|>assistant<|channel|>commentary to=functions.get_")), "{other}");
    let brief = of(ToolChoice::Named("get_time".to_owned()), false, budget(3));
    let cut = written(&brief, &call);
    let (thought, rest) = cut.split_once("<|end|><|start|>assistant").unwrap();
    assert!(
        ANALYSIS.starts_with(thought) && thought != ANALYSIS && rest.starts_with("<|channel|>commentary to=functions.get_time"),
        "{cut}"
    );
    // With a form of the content it is either.
    let either = of(ToolChoice::Auto, true, Wishes::default());
    let said = format!("{ANALYSIS}<|end|><|start|>assistant<|channel|>final<|message|>yes");
    for text in [&call, &said, "<|channel|>final<|message|>no"] {
        assert_eq!(written(&either, text), *text);
    }
    // Free, but for calls, whose message ends with its arguments.
    let free = of(ToolChoice::Auto, false, Wishes::default());
    for text in [format!("{call}<|call|>"), format!("{ANALYSIS}<|end|><|start|>assistant<|channel|>final<|message|>Noon.")] {
        assert_eq!(written(&free, &text), text);
    }
    let ended = written(&free, &format!("{call} and more"));
    assert!(ended.starts_with(&format!("{call}<|call|>")), "{ended}");
}

#[test]
fn a_budget_closes_the_analysis_of_gpt_oss() {
    let whole = format!("{ANALYSIS}<|end|><|start|>assistant<|channel|>final<|message|>Noon.");
    for tokens in [0, 1, 4] {
        let text = written(&rules(&harmony(), budget(tokens)), &whole);
        let (thought, rest) = text.split_once("<|end|><|start|>assistant<|channel|>final<|message|>").unwrap();
        assert!(ANALYSIS.starts_with(thought) && thought != ANALYSIS && !rest.is_empty(), "{tokens}: {text}");
    }
    assert_eq!(written(&rules(&harmony(), budget(100)), &whole), whole);
}

#[test]
fn the_mark_of_a_call_ends_a_thought_where_the_format_has_it_so() {
    for choice in [ToolChoice::Required, ToolChoice::Auto] {
        let request = request("qwen3_coder", choice, true);
        let calls = calls(&request, false);
        let rules =
            rules(&Parsing { tools: Some(Arc::new(request)), ..parsing(Some(Start::Reasoning)) }, Wishes { calls, ..Wishes::default() });
        for mark in ["<tool_call>\n", ""] {
            let text = format!("So be it. {mark}<function=get_time>\n<parameter=zone>\nCET\n</parameter>\n</function>");
            assert!(written(&rules, &text).starts_with(&text), "{}", written(&rules, &text));
            let wrong = text.replace("CET", "MET");
            assert!(!written(&rules, &wrong).contains("zone>\nMET"));
        }
    }
}

#[test]
fn an_answer_that_has_a_form_may_be_a_call_instead() {
    let request = request("hermes", ToolChoice::Auto, true);
    let rules = rules(&parsing(None), Wishes { calls: calls(&request, true), grammar: Some(grammar(&["yes", "no"])), ..Wishes::default() });
    assert_eq!(written(&rules, "yes"), "yes");
    let call = "<tool_call>\n{\"name\": \"get_time\", \"arguments\": {\"zone\": \"UTC\"}}\n</tool_call>";
    assert_eq!(written(&rules, call), call);
}

#[test]
fn schemas_that_no_grammar_can_keep_to() {
    let unusable = json!({"type": "object", "properties": {"a": {"not": {"type": "string"}}}, "required": ["a"]});
    let of = |strict: bool, parameters: &Value| {
        let mut request = request("hermes", ToolChoice::Required, false);
        request.tools.insert(0, tool(7, "odd", strict, parameters.clone()));
        request
    };
    for parameters in [&unusable, &json!({"type": "string"})] {
        for format in table::FORMATS {
            let mut request = of(true, parameters);
            request.format = Some(format);
            let failure = CallGrammars::new(&GRAMMARS, &TOKENIZER, &request, false).err().unwrap();
            assert_eq!(failure.param.as_deref(), Some("tools[7].function.parameters"), "{}", format.name);
        }
        let failure = CallGrammars::new(&GRAMMARS, &TOKENIZER, &of(true, parameters), false).err().unwrap();
        assert_eq!((failure.param.as_deref(), failure.code), (Some("tools[7].function.parameters"), Some("invalid_value")), "{failure}");
        let wishes = Wishes { calls: calls(&of(false, parameters), false), ..Wishes::default() };
        let rules = rules(&parsing(None), wishes);
        let call = "<tool_call>\n{\"name\": \"odd\", \"arguments\": {\"b\": [1, {}]}}\n</tool_call>";
        assert_eq!(written(&rules, call), call);
    }
}

#[test]
fn as_many_tools_as_a_request_may_have_compile_in_time() {
    let mut request = request("hermes", ToolChoice::Auto, true);
    request.tools = (0..128)
        .map(|at| {
            let of = |kind: &str| json!({"type": kind, "description": "something that a model reads and a grammar does not"});
            let properties = json!({"path": of("string"), "count": of("integer"), "flag": of("boolean"), "list": {"type": "array", "items": of("string")},
                "mode": {"enum": [format!("mode-{at}"), "other"]}, "inner": {"type": "object", "properties": {"x": of("number")}, "required": ["x"]}});
            tool(at, &format!("tool_{at}"), at % 2 == 0, json!({"type": "object", "properties": properties, "required": ["path", "mode"]}))
        })
        .collect();
    let grammars = calls(&request, true).unwrap();
    let rules = rules(&parsing(None), Wishes { calls: Some(grammars), ..Wishes::default() });
    let call = "<tool_call>\n{\"name\": \"tool_127\", \"arguments\": {\"path\": \"a\", \"mode\": \"mode-127\"}}\n</tool_call>";
    assert_eq!(written(&rules, call), call);
    let wrong = call.replace("mode-127", "mode-126");
    assert_ne!(written(&rules, &wrong), wrong);
}
