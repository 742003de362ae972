//! The tools of a request and its wishes about them, read and checked.

use serde_json::{Map, Value, json};

use crate::api::fields::{Field, Fields, invalid, missing, wrong_type};
use crate::api::parse::tools::request::{Tool, ToolChoice, ToolRequest};
use crate::api::parse::tools::table::ToolFormat;
use crate::api::served::{ServedModel, ToolSupport};
use crate::error::Failure;

/// OpenAI's bound.
const LONGEST_NAME: usize = 64;

/// What the request says of tools; `None` when it has none. `tools` wins over the older `functions`.
pub fn read(served: &ServedModel, fields: &Fields<'_>) -> Result<Option<ToolRequest>, Failure> {
    let choice = choice(fields)?;
    let given = given(fields, served.settings.max_tools)?;
    let parallel = fields.bool("parallel_tool_calls")?.unwrap_or(true);
    let Some((field, definitions)) = given else {
        return match choice {
            Some((field, ToolChoice::Required | ToolChoice::Named(_), _)) => {
                Err(invalid(&field, format!("'{}' asks for a call of a tool, and there are no 'tools'.", field.name)))
            }
            _ => Ok(None),
        };
    };
    let (choice_field, choice, allowed) = match choice {
        Some((field, choice, allowed)) => (Some(field), choice, allowed),
        None => (None, ToolChoice::Auto, None),
    };
    if choice == ToolChoice::None {
        // Then they are text for the template, whatever they are.
        let tools = definitions.into_iter().map(|(_, definition)| text(definition)).collect();
        return Ok(Some(ToolRequest { tools, choice, parallel, format: None }));
    }
    let mut tools = Vec::with_capacity(definitions.len());
    for (name, definition) in definitions {
        let tool = tool(&name, &definition)?;
        if tools.iter().any(|known: &Tool| known.name == tool.name) {
            let name = format!("{name}.name");
            return Err(invalid(
                &Field { value: &json!(tool.name), name: name.clone() },
                format!("'{name}' is '{}', and so is another tool's.", tool.name),
            ));
        }
        tools.push(tool);
    }
    if let (Some(allowed), Some(field)) = (&allowed, &choice_field) {
        allowed.iter().try_for_each(|name| known(field, &tools, name))?;
        tools.retain(|tool| allowed.contains(&tool.name));
    }
    if let (ToolChoice::Named(name), Some(choice_field)) = (&choice, &choice_field) {
        known(choice_field, &tools, name)?;
    }
    // The older form has no more than one call, and so has a choice that names one.
    let single = field.name.ends_with("functions") || matches!(choice, ToolChoice::Named(_));
    let request = ToolRequest { tools, format: format(served, &field, &choice)?, choice, parallel: parallel && !single };
    let demands = matches!(request.choice, ToolChoice::Required | ToolChoice::Named(_));
    match choice_field.filter(|_| demands && request.format.is_none()) {
        None => Ok(Some(request)),
        Some(field) => {
            let message = format!(
                "'{}' demands a call of a tool, and no format of tool calls is known here (TOOL_CALL_PARSER=none). Use 'auto', or set one.",
                field.name
            );
            Err(Failure::bad_request(field.name, message).code("unsupported_value"))
        }
    }
}

/// The format of the calls, if the model has one and requests may have tools.
fn format(served: &ServedModel, field: &Field<'_>, choice: &ToolChoice) -> Result<Option<&'static ToolFormat>, Failure> {
    if *choice == ToolChoice::Auto && served.settings.refuse_auto_tools {
        let message = "Tools with the tool choice 'auto' are switched off here. Remove the tools, or start the server without --no-enable-auto-tool-choice.";
        return Err(Failure::bad_request(&field.name, message).code("unsupported_value"));
    }
    match served.tool_support {
        ToolSupport::Format(format) => Ok(Some(format)),
        ToolSupport::Off => Ok(None),
        ToolSupport::Unknown => {
            let message = "This model's chat template shows no format of tool calls that this server knows. Remove the tools, use the tool choice 'none', or start the server with TOOL_CALL_PARSER.";
            Err(Failure::bad_request(&field.name, message).code("unsupported_value"))
        }
    }
}

/// A tool that nobody calls.
fn text(definition: Value) -> Tool {
    Tool { name: String::new(), parameters: Value::Null, strict: false, place: String::new(), definition }
}

/// Definitions as the template gets them, each with the name of its function's place.
type Definitions = Vec<(String, Value)>;

/// The tools as they are given, at most so many, or the functions in their form.
fn given<'a>(fields: &Fields<'a>, most: usize) -> Result<Option<(Field<'a>, Definitions)>, Failure> {
    let list = |name: &str| fields.get(name).filter(|field| field.value.as_array().is_none_or(|list| !list.is_empty()));
    let (field, are_functions) = match (list("tools"), list("functions")) {
        (Some(field), _) => (field, false),
        (None, Some(field)) => (field, true),
        (None, None) => return Ok(None),
    };
    let list = field.value.as_array().ok_or_else(|| wrong_type(&field, "a list of tools"))?;
    if list.len() > most {
        return Err(invalid(&field, format!("'{}' holds {} tools, more than the maximum of {most} (MAX_TOOLS).", field.name, list.len())));
    }
    let mut definitions = Vec::with_capacity(list.len());
    for (place, value) in list.iter().enumerate() {
        let name = format!("{}[{place}]", field.name);
        if !value.is_object() {
            return Err(wrong_type(&Field { name, value }, "a tool: an object with a 'function'"));
        }
        definitions.push(match are_functions {
            true => (name, json!({"type": "function", "function": value})),
            false => (name + ".function", value.clone()),
        });
    }
    Ok(Some((field, definitions)))
}

/// One tool. `name`: where its function stands in the request.
fn tool(name: &str, definition: &Value) -> Result<Tool, Failure> {
    let place = name.trim_end_matches(".function");
    match definition.get("type").and_then(Value::as_str) {
        Some("function") => {}
        None if definition.get("type").is_none_or(Value::is_null) => {}
        other => {
            let found = other.map_or_else(|| "no string".to_owned(), |other| format!("'{other}'"));
            let message = format!("'{place}.type' is {found}: this server knows tools of type 'function' only.");
            return Err(Failure::bad_request(format!("{place}.type"), message).code("unsupported_value"));
        }
    }
    let function = match definition.get("function") {
        None | Some(Value::Null) => {
            return Err(missing(name, format!("'{name}' is missing. It is an object with 'name' and 'parameters'.")));
        }
        Some(Value::Object(function)) => function,
        Some(value) => return Err(wrong_type(&Field { name: name.to_owned(), value }, "an object with 'name' and 'parameters'")),
    };
    let field = |key: &str| function.get(key).filter(|value| !value.is_null()).map(|value| Field { name: format!("{name}.{key}"), value });
    let Some(name_field) = field("name") else {
        return Err(missing(&format!("{name}.name"), format!("'{name}.name' is missing.")));
    };
    let given = name_field.value.as_str().ok_or_else(|| wrong_type(&name_field, "a string"))?;
    check_name(&name_field, given)?;
    if let Some(description) = field("description").filter(|field| !field.value.is_string()) {
        return Err(wrong_type(&description, "a string"));
    }
    let parameters = match field("parameters") {
        Some(field) if !field.value.is_object() => return Err(wrong_type(&field, "a JSON schema: an object")),
        Some(field) => field.value.clone(),
        None => Value::Null,
    };
    let strict = match field("strict") {
        Some(field) => field.value.as_bool().ok_or_else(|| wrong_type(&field, "true or false"))?,
        None => false,
    };
    Ok(Tool { name: given.to_owned(), parameters, strict, place: name.to_owned(), definition: definition.clone() })
}

fn check_name(field: &Field<'_>, name: &str) -> Result<(), Failure> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    match !name.is_empty() && name.len() <= LONGEST_NAME && name.chars().all(fits) {
        true => Ok(()),
        false => Err(invalid(
            field,
            format!("'{}' must be 1 to {LONGEST_NAME} letters, digits, underscores, hyphens or dots, but it is {name:?}.", field.name),
        )),
    }
}

fn known(field: &Field<'_>, tools: &[Tool], name: &str) -> Result<(), Failure> {
    match tools.iter().any(|tool| tool.name == name) {
        true => Ok(()),
        false => Err(invalid(field, format!("'{}' names the function {name:?}, which is not among the tools.", field.name))),
    }
}

/// A choice with the names of the tools that it allows, where it names some.
type Choice<'a> = (Field<'a>, ToolChoice, Option<Vec<String>>);

/// `tool_choice`, or the older `function_call`.
fn choice<'a>(fields: &Fields<'a>) -> Result<Option<Choice<'a>>, Failure> {
    let Some(field) = fields.get("tool_choice").or_else(|| fields.get("function_call")) else { return Ok(None) };
    let (choice, allowed) = match field.value {
        Value::String(word) => (mode(&field, word)?, None),
        Value::Object(object) if object.get("type").is_some_and(|kind| kind == "allowed_tools") => {
            let inner = object.get("allowed_tools").and_then(Value::as_object).unwrap_or(object);
            let mode = match inner.get("mode").and_then(Value::as_str) {
                Some(word @ ("auto" | "required")) => mode(&field, word)?,
                _ => {
                    return Err(invalid(&field, format!("'{}' of type 'allowed_tools' needs a 'mode': 'auto' or 'required'.", field.name)));
                }
            };
            (mode, Some(allowed(&field, inner)?))
        }
        Value::Object(object) => (ToolChoice::Named(function_name(&field, object)?), None),
        _ => return Err(wrong_type(&field, "'none', 'auto', 'required', or an object that names a function")),
    };
    Ok(Some((field, choice, allowed)))
}

fn mode(field: &Field<'_>, word: &str) -> Result<ToolChoice, Failure> {
    Ok(match word {
        "none" => ToolChoice::None,
        "auto" | "" => ToolChoice::Auto,
        "required" => ToolChoice::Required,
        _ => {
            let message =
                format!("'{}' is '{word}'. It must be 'none', 'auto', 'required', or an object that names a function.", field.name);
            return Err(invalid(field, message));
        }
    })
}

/// The name in `{"type": "function", "function": {"name"}}`, or in one of its shorter forms.
fn function_name(field: &Field<'_>, object: &Map<String, Value>) -> Result<String, Failure> {
    if let Some(kind) = object.get("type").and_then(Value::as_str).filter(|kind| *kind != "function") {
        let message = format!("'{}' is of type '{kind}': this server knows tools of type 'function' only.", field.name);
        return Err(Failure::bad_request(&field.name, message).code("unsupported_value"));
    }
    let name = object.get("function").and_then(|function| function.get("name")).or_else(|| object.get("name"));
    let name = name.and_then(Value::as_str);
    name.map(str::to_owned).ok_or_else(|| {
        let name = format!("{}.function.name", field.name);
        missing(&name, format!("'{name}' is missing: it says which function is to be called."))
    })
}

fn allowed(field: &Field<'_>, object: &Map<String, Value>) -> Result<Vec<String>, Failure> {
    let tools = object.get("tools").and_then(Value::as_array).filter(|tools| !tools.is_empty());
    let tools = tools.ok_or_else(|| invalid(field, format!("'{}' of type 'allowed_tools' needs 'tools', a list of some.", field.name)))?;
    let name = |tool: &Value| match tool.as_object() {
        Some(object) => function_name(field, object),
        None => Err(wrong_type(&Field { name: format!("{}.tools", field.name), value: tool }, "an object that names a function")),
    };
    tools.iter().map(name).collect()
}
