//! The grammars of calls, of all formats and any schemas: what is picked at random among what they allow is read as calls whose arguments keep
//! to their schemas. With marks as text, as in the demo model's vocabulary, and as tokens of their own.

use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::*;
use crate::api::delta::{ChoiceUpdate, Delta, by_choice};
use crate::api::grammar::Grammars;
use crate::api::parse::tools::request::{Tool, ToolChoice, ToolRequest};
use crate::api::parse::tools::table::{self, Body, FORMATS, ToolFormat};
use crate::checkpoint::demo;
use crate::checkpoint::files::{ModelFiles, Source};
use crate::engine::Next;
use crate::models::sample::uniform;

/// A model's vocabulary, with what is made of it.
struct World {
    tokenizer: Arc<Tokenizer>,
    ends: Arc<Vec<u32>>,
    grammars: Grammars,
}

impl World {
    fn new(files: &ModelFiles) -> Self {
        let tokenizer = Arc::new(Tokenizer::load(files).unwrap());
        let ends = Arc::new(vec![tokenizer.token_id("</s>").unwrap()]);
        Self { grammars: Grammars::new(tokenizer.clone(), tokenizer.vocab_size(), ends.clone()), tokenizer, ends }
    }
}

static PLAIN: LazyLock<World> = LazyLock::new(|| World::new(&demo::files()));
/// The same with the marks of all formats as tokens.
static MARKED: LazyLock<World> = LazyLock::new(|| {
    let demo = demo::files();
    let mut tokens = demo.read_json("added_tokens.json").unwrap().unwrap().as_object().unwrap().clone();
    let mut id = tokens.values().filter_map(Value::as_u64).max().unwrap();
    // Of these marks a token is a part.
    let parts = ["｜DSML｜", "<|channel|>", "<|start|>"].map(str::to_owned);
    let whole = |mark: &&str| mark.starts_with('<') && mark.ends_with('>') && !mark.contains(['=', '"', '｜']);
    let marks = FORMATS.iter().flat_map(ToolFormat::marks).filter(whole).map(str::to_owned);
    for mark in marks.chain(parts) {
        if PLAIN.tokenizer.token_id(&mark).is_none() && !tokens.contains_key(&mark) {
            id += 1;
            tokens.insert(mark, json!(id));
        }
    }
    let added: &'static str = Box::leak(Value::Object(tokens).to_string().into_boxed_str());
    let mut files = Vec::new();
    for name in ["config.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"] {
        let bytes: &'static [u8] = Box::leak(demo.read(name).unwrap().unwrap().to_vec().into_boxed_slice());
        files.push((name.to_owned(), Source::Embedded(bytes)));
    }
    files.push(("added_tokens.json".to_owned(), Source::Embedded(added.as_bytes())));
    World::new(&ModelFiles::new("marked", "a test", files.into_iter().collect()))
});

fn tool(name: &str, parameters: Value, strict: bool) -> Tool {
    Tool { name: name.to_owned(), parameters, strict, place: "tools[0].function".to_owned(), definition: Value::Null }
}

fn request(format: &str, tools: Vec<Tool>, choice: ToolChoice) -> Arc<ToolRequest> {
    Arc::new(ToolRequest { tools, choice, parallel: true, format: table::find(format) })
}

fn rules(world: &World, request: &Arc<ToolRequest>) -> Result<Arc<Rules>, Failure> {
    let calls = CallGrammars::new(&world.grammars, &world.tokenizer, request, false)?;
    let vocabulary = Vocabulary { tokenizer: &world.tokenizer, ends: &world.ends, size: world.tokenizer.vocab_size() };
    let parsing = Parsing { tools: Some(request.clone()), ..Parsing::default() };
    Ok(Rules::new(&vocabulary, &parsing, Wishes { calls, ..Wishes::default() })?.unwrap())
}

/// What is read of an answer, in pieces of so many characters.
fn read(request: &Arc<ToolRequest>, text: &str, piece: usize) -> ChoiceUpdate {
    let (mut parser, mut deltas) = (Parsing { tools: Some(request.clone()), ..Parsing::default() }.parser(), Vec::new());
    let chars: Vec<char> = text.chars().collect();
    chars.chunks(piece).for_each(|chars| parser.push(chars.iter().collect(), &mut deltas));
    parser.finish(&mut deltas);
    by_choice(deltas.into_iter().map(|kind| Delta { choice: 0, kind }).collect()).pop().unwrap_or_default()
}

/// Names and arguments.
fn calls(update: &ChoiceUpdate) -> Vec<(String, String)> {
    update.tool_calls.iter().map(|call| (call.start.clone().unwrap().1, call.arguments.clone())).collect()
}

/// What ends something in this format.
fn closing(format: &ToolFormat) -> Vec<&'static str> {
    let mut marks = [format.call.close, format.section.close].concat();
    match &format.body {
        Body::Tagged(tags) => marks.push(tags.value_close),
        Body::Gemma { quote } => marks.push(quote),
        _ => {}
    }
    marks.extend(["\"", "\"}", "}", "]", ")", "0", "\n"]);
    marks
}

/// Picks among the allowed tokens at random, those that go on with a mark that closes something rather often. `None`: it came to no end.
fn random(world: &World, rules: &Arc<Rules>, format: &ToolFormat, seed: u64, most: u64) -> Option<String> {
    let bytes = |id: u32| world.tokenizer.token_bytes(id).unwrap_or_default();
    let (mut constraint, mut text) = (rules.constraint().unwrap(), Vec::new());
    let marks = closing(format);
    for at in 0..most {
        let allowed: Vec<u32> = match constraint.next().unwrap() {
            Next::End | Next::Full => return Some(String::from_utf8(text).unwrap()),
            Next::Forced(forced) => vec![forced[0]],
            Next::Anything => panic!("a demanded call is free"),
            Next::Masked => {
                let mask = constraint.mask().unwrap();
                (0..world.tokenizer.vocab_size() as u32).filter(|id| mask.allows(*id)).collect()
            }
        };
        assert!(!allowed.is_empty(), "{:?}", String::from_utf8_lossy(&text));
        // How much of each mark stands at the end of the text, and what is missing of it.
        let missing = |mark: &&'static str| {
            let mark = mark.as_bytes();
            let known = (0..mark.len()).rev().find(|known| text.ends_with(&mark[..*known])).unwrap_or_default();
            (known, &mark[known..])
        };
        let missing: Vec<(usize, &[u8])> = marks.iter().map(missing).collect();
        let goes_on = |id: u32| {
            let token = bytes(id);
            missing.iter().filter(|(_, rest)| !token.is_empty() && rest.starts_with(token)).map(|(known, _)| *known).max()
        };
        let begun: Vec<u32> = allowed.iter().copied().filter(|id| goes_on(*id) > Some(0)).collect();
        let closers: Vec<u32> = allowed.iter().copied().filter(|id| world.ends.contains(id) || goes_on(*id).is_some()).collect();
        let from = match uniform(seed, 2 * at) {
            chance if chance < 0.9 && !begun.is_empty() => begun,
            chance if chance < 0.6 && !closers.is_empty() => closers,
            _ => allowed,
        };
        let pick = from[(uniform(seed, 2 * at + 1) * from.len() as f64) as usize];
        if world.ends.contains(&pick) {
            return Some(String::from_utf8(text).unwrap());
        }
        constraint.accept(pick).unwrap();
        text.extend(bytes(pick));
    }
    None
}

/// Whether a value meets a schema of the keywords that these tests use.
fn meets(root: &Value, schema: &Value, value: &Value) -> bool {
    let Some(object) = schema.as_object() else { return *schema == true };
    let number = value.as_f64();
    let length = value.as_str().map(|text| text.chars().count() as f64);
    let least = |limit: &Value, size: Option<f64>| size.is_none_or(|size| size >= limit.as_f64().unwrap());
    let most = |limit: &Value, size: Option<f64>| size.is_none_or(|size| size <= limit.as_f64().unwrap());
    let items = value.as_array();
    object.iter().all(|(key, limit)| match key.as_str() {
        "$ref" => meets(root, root.pointer(&limit.as_str().unwrap()[1..]).unwrap(), value),
        "anyOf" => limit.as_array().unwrap().iter().any(|part| meets(root, part, value)),
        "enum" => limit.as_array().unwrap().contains(value),
        "const" => limit == value,
        "type" => match limit.as_array() {
            Some(names) => names.iter().any(|name| is_a(name.as_str().unwrap(), value)),
            None => is_a(limit.as_str().unwrap(), value),
        },
        "minimum" => least(limit, number),
        "maximum" => most(limit, number),
        "minLength" => least(limit, length),
        "maxLength" => most(limit, length),
        "pattern" if limit == "b+" => value.as_str().is_none_or(|text| text.contains('b')),
        "pattern" => value.as_str().is_none_or(|text| (1..=3).contains(&text.len()) && text.chars().all(|c| "abc\n<".contains(c))),
        "format" => value.as_str().is_none_or(|text| text.len() == 10 && text.split('-').count() == 3),
        "minItems" => least(limit, items.map(|items| items.len() as f64)),
        "maxItems" => most(limit, items.map(|items| items.len() as f64)),
        "items" => items.is_none_or(|items| items.iter().all(|item| meets(root, limit, item))),
        "required" => {
            value.as_object().is_none_or(|value| limit.as_array().unwrap().iter().all(|key| value.contains_key(key.as_str().unwrap())))
        }
        "properties" | "additionalProperties" => value.as_object().is_none_or(|value| {
            let nothing = Map::new();
            let properties = object.get("properties").and_then(Value::as_object).unwrap_or(&nothing);
            value.iter().all(|(name, value)| match (properties.get(name), key.as_str()) {
                (Some(schema), "properties") => meets(root, schema, value),
                (None, "additionalProperties") => meets(root, limit, value),
                _ => true,
            })
        }),
        "$defs" => true,
        other => panic!("{other}"),
    })
}

fn is_a(name: &str, value: &Value) -> bool {
    match name {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.as_f64().is_some_and(|number| number.fract() == 0.0),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        _ => value.is_object(),
    }
}

fn scalar() -> impl Strategy<Value = Value> {
    let all = [
        json!({"type": "string"}),
        json!({"type": "string", "maxLength": 4}),
        json!({"type": "string", "minLength": 1, "maxLength": 3}),
        json!({"type": "string", "pattern": "^[a-c\\n<]{1,3}$"}),
        json!({"type": "string", "pattern": "b+", "maxLength": 5}),
        json!({"type": "string", "format": "date"}),
        json!({"enum": ["x y", "a\nb", "\n", "\"q\"", "null", "[1]", "</parameter", "<"]}),
        json!({"type": "string", "enum": ["", "é\\'", "{}"]}),
        json!({"type": ["string", "null"], "maxLength": 3}),
        json!({"anyOf": [{"type": "integer", "minimum": 0, "maximum": 50}, {"type": "null"}]}),
        json!({"anyOf": [{"$ref": "#/$defs/color"}, {"type": "null"}]}),
        json!({"$ref": "#/$defs/color"}),
        json!({"type": "integer", "minimum": -5, "maximum": 500}),
        json!({"type": "number", "minimum": 0, "maximum": 2}),
        json!({"type": "boolean"}),
        json!({"const": "only"}),
        json!({"enum": [1, 2.5, null, true]}),
        json!({"enum": [{"a": [1, "</function>"]}, [null]]}),
    ];
    proptest::sample::select(all.to_vec())
}

fn schema_of_a_value() -> impl Strategy<Value = Value> {
    scalar().prop_recursive(2, 6, 2, |inner| {
        let names = proptest::sample::subsequence(vec!["a", "b_1", "long name"], 1..=2);
        prop_oneof![
            (inner.clone(), 0..2u64, 2..3u64).prop_map(|(items, least, most)| json!({"type": "array", "items": items, "minItems": least, "maxItems": most})),
            (names, inner.clone(), inner.clone(), any::<bool>()).prop_map(|(names, a, b, required)| {
                let properties: Map<String, Value> = names.iter().zip([a, b]).map(|(name, schema)| ((*name).to_owned(), schema)).collect();
                json!({"type": "object", "properties": properties, "required": if required { names } else { Vec::new() }, "additionalProperties": false})
            }),
            inner.prop_map(|values| json!({"type": "object", "additionalProperties": values})),
        ]
    })
}

fn parameters() -> impl Strategy<Value = Value> {
    let properties = proptest::collection::vec((schema_of_a_value(), any::<bool>()), 0..4);
    (properties, any::<bool>()).prop_map(|(properties, open)| {
        let names = ["city", "a_2", "k"];
        let required: Vec<&str> = names.into_iter().zip(&properties).filter(|(_, (_, required))| *required).map(|(name, _)| name).collect();
        let properties: Map<String, Value> = names.iter().zip(&properties).map(|(name, (schema, _))| ((*name).to_owned(), schema.clone())).collect();
        let others = if open { json!({"type": "integer", "minimum": 1, "maximum": 9}) } else { json!(false) };
        let node = json!({"type": "object", "properties": {"color": {"$ref": "#/$defs/color"}, "next": {"$ref": "#/$defs/node"}}, "additionalProperties": false});
        json!({"type": "object", "properties": properties, "required": required, "additionalProperties": others,
            "$defs": {"color": {"type": "string", "enum": ["red", "dark blue"]}, "node": node}})
    })
}

/// Names of properties that Gemma's notation and Python's cannot have are refused; others are kept to.
fn check(world: &World, format: &'static ToolFormat, parameters: &Value, seed: u64) -> Result<bool, TestCaseError> {
    let request =
        request(format.name, vec![tool("get_it", parameters.clone(), true), tool("get_it_all", json!({}), false)], ToolChoice::Required);
    let rules = rules(world, &request).map_err(|failure| TestCaseError::fail(format!("{}: {failure}: {parameters}", format.name)))?;
    let Some(text) = random(world, &rules, format, seed, 400) else { return Ok(false) };
    let update = read(&request, &text, usize::MAX);
    prop_assert!(!update.tool_calls.is_empty() && update.text.trim().is_empty(), "{}: {text:?} is {update:?}", format.name);
    for (name, arguments) in calls(&update) {
        prop_assert!(name == "get_it" || name == "get_it_all", "{}: {text:?}", format.name);
        let known = serde_json::from_str::<Value>(&arguments);
        // JSON has no greatest number; this reader has.
        let Ok(value) = known else {
            prop_assert!(known.unwrap_err().to_string().starts_with("number out of range"), "{}: {text:?} is {arguments}", format.name);
            continue;
        };
        let fits = if name == "get_it" { meets(parameters, parameters, &value) } else { value.is_object() };
        prop_assert!(fits, "{}: {text:?} is {value}, which is not {parameters}", format.name);
    }
    let whole = calls(&update);
    for piece in [1, 2, 5] {
        prop_assert_eq!(&calls(&read(&request, &text, piece)), &whole, "{}: {:?}", format.name, text);
    }
    Ok(true)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    #[test]
    fn whatever_a_grammar_allows_is_read_as_calls_that_keep_to_their_schemas(parameters in parameters(), seed in any::<u64>(), marked in any::<bool>()) {
        for format in FORMATS {
            check(if marked { &MARKED } else { &PLAIN }, format, &parameters, seed)?;
        }
    }
}

#[test]
fn most_of_them_come_to_their_end() {
    let parameters = json!({"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "tags": {"type": "array", "items": {"type": "string"}}}, "required": ["city"], "additionalProperties": false});
    for format in FORMATS {
        for world in [&PLAIN, &MARKED] {
            let ended = (0..8).filter(|seed| check(world, format, &parameters, *seed).unwrap()).count();
            assert!(ended >= 1, "{}: {ended} of 8", format.name);
        }
    }
}
