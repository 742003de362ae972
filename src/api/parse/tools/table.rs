//! The formats in which models write tool calls, one row each. What a row cannot say is code: the [`Body`] kinds.

use crate::api::parse::{all_names, is_called, shows};

/// How a model writes its tool calls.
#[derive(Debug)]
pub struct ToolFormat {
    /// vLLM's name of it, as `TOOL_CALL_PARSER` takes it.
    pub name: &'static str,
    /// Other names, of vLLM, SGLang and FastDeploy.
    pub aliases: &'static [&'static str],
    /// Groups of strings: a chat template that holds all of a group is of this format. None = not to be told from the template.
    pub detect: &'static [&'static [&'static str]],
    /// Marks around all calls, which are no text themselves.
    pub section: Pair,
    /// Marks around one call, or around a list of them.
    pub call: Pair,
    /// What may stand in place of an opening mark at the very beginning of the answer.
    pub bare: &'static [Bare],
    pub body: Body,
    /// Between calls that share their marks or have none.
    pub separators: &'static [&'static str],
    /// Left out at the end of a call: the fence around its arguments.
    pub fence: &'static str,
    /// An opening mark ends the thinking, too.
    pub ends_reasoning: bool,
    pub ids: CallIds,
    /// How a grammar lays calls out.
    pub written: Written,
}

/// How calls are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// Each between marks of its own.
    Marked,
    /// As one list between marks.
    List,
    /// Between one pair of marks, each on a line of its own.
    Lines,
    /// One after another, without marks.
    Bare,
    /// As one list without marks.
    BareList,
}

/// Opening and closing marks, each in any of its spellings. A closing mark stands at the place of the opening one that it belongs to.
#[derive(Debug, Clone, Copy)]
pub struct Pair {
    pub open: &'static [&'static str],
    pub close: &'static [&'static str],
}

/// What opens a call without a mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bare {
    Object,
    List,
    /// The name of one of the request's tools, on a line of its own.
    Name,
}

#[derive(Debug)]
pub enum Body {
    /// A JSON object that holds the name and the arguments, or a list of such objects.
    Json(Keys),
    /// The name, then the arguments as JSON. A JSON body is understood in its place.
    Named(Named),
    /// The name, then each argument between tags.
    Tagged(Tags),
    /// Python calls, alone or in a list.
    Python,
    /// `call:name{key:value}`, with strings between two of these marks.
    Gemma { quote: &'static str },
    /// gpt-oss: calls are messages of a channel.
    Harmony,
}

#[derive(Debug)]
pub struct Keys {
    pub name: &'static [&'static str],
    pub arguments: &'static [&'static str],
}

#[derive(Debug)]
pub struct Named {
    /// Before the name, where the model writes it.
    pub prefix: &'static str,
    /// The name ends here.
    pub end: &'static str,
    /// May stand between the name and its end, with text of its own.
    pub aside: &'static str,
    /// Before the arguments, where the model writes it.
    pub fence: &'static str,
    /// The name is written `functions.NAME:NUMBER`, which is the call's id.
    pub numbered: bool,
    /// Models whose vocabulary lacks the end of the name write a list of objects in its place.
    pub or_objects: bool,
}

#[derive(Debug)]
pub struct Tags {
    /// The name ends before the first of them; those that end with `>` belong to it. Models write the first.
    pub name_end: &'static [&'static str],
    pub key: (&'static str, &'static str),
    /// Before the value; empty: right after the key.
    pub value_open: &'static str,
    pub value_close: &'static str,
    /// After the key come attributes up to `>`; `string="true"` and `string="false"` tell what the value is.
    pub attributes: bool,
    /// The model always writes those two.
    pub tells_text: bool,
    /// A line break on either side of a value is not part of it.
    pub lines: bool,
}

/// What ids calls get.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallIds {
    /// `call_` and 24 letters and digits, as OpenAI's.
    OpenAi,
    /// 9 letters and digits: Mistral's templates check it.
    Nine,
    /// The model writes them.
    Written,
}

/// What cuts gpt-oss's output into messages.
pub const HARMONY_MARKS: [&str; 7] = ["<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>"];

/// What a header has behind the name of a function, where the model writes it: the channel, and what the arguments are.
pub const HARMONY_HEAD: [&str; 3] = ["<|channel|>commentary", "<|constrain|>", "<|message|>"];

/// Llama's and InternLM's word for arguments.
const PARAMETERS: Keys = Keys { name: &["name"], arguments: &["parameters", "arguments"] };
const NONE: Pair = Pair { open: &[], close: &[] };
const KEYS: Keys = Keys { name: &["name"], arguments: &["arguments", "parameters"] };

/// What most rows have in common: JSON objects.
const JSON: ToolFormat = ToolFormat {
    name: "",
    aliases: &[],
    detect: &[],
    section: NONE,
    call: NONE,
    bare: &[],
    body: Body::Json(KEYS),
    separators: &[],
    fence: "",
    ends_reasoning: false,
    ids: CallIds::OpenAi,
    written: Written::Marked,
};

const fn pair(open: &'static [&'static str], close: &'static [&'static str]) -> Pair {
    Pair { open, close }
}

const QWEN_TAGS: Tags = Tags {
    name_end: &[">"],
    key: ("<parameter=", ">"),
    value_open: "",
    value_close: "</parameter>",
    attributes: false,
    tells_text: false,
    lines: true,
};
const INVOKE_TAGS: Tags = Tags {
    name_end: &["\">"],
    key: ("<parameter name=\"", "\""),
    value_open: "",
    value_close: "</parameter>",
    attributes: true,
    tells_text: false,
    lines: true,
};
const DSML_TAGS: Tags = Tags {
    name_end: &["\">"],
    key: ("<｜DSML｜parameter name=\"", "\""),
    value_open: "",
    value_close: "</｜DSML｜parameter>",
    attributes: true,
    tells_text: true,
    lines: false,
};
const GLM_TAGS: Tags = Tags {
    name_end: &["\n", "<arg_key>", "</tool_call>"],
    key: ("<arg_key>", "</arg_key>"),
    value_open: "<arg_value>",
    value_close: "</arg_value>",
    attributes: false,
    tells_text: false,
    lines: false,
};
const NAMED: Named = Named { prefix: "", end: "", aside: "", fence: "", numbered: false, or_objects: false };

/// All of them. Where a template fits several, the first is taken: the more telling marks come first.
#[rustfmt::skip]
pub const FORMATS: &[ToolFormat] = &[
    ToolFormat {
        name: "openai", aliases: &["gpt_oss", "harmony"], detect: &[&["<|channel|>", "functions"]],
        call: pair(&["<|channel|>commentary to=functions.", "<|start|>assistant to=functions.", "<|channel|>analysis to=functions."], &["<|call|>"; 3]),
        body: Body::Harmony, ends_reasoning: true, ..JSON
    },
    ToolFormat {
        name: "qwen3_coder", aliases: &["qwen3_xml", "qwen3_5"], detect: &[&["<function=", "<parameter=", "<tool_call>"]],
        section: pair(&["<tool_call>"], &["</tool_call>"]), call: pair(&["<function="], &["</function>"]),
        body: Body::Tagged(QWEN_TAGS), ends_reasoning: true, ..JSON
    },
    ToolFormat {
        name: "seed_oss", detect: &[&["<seed:tool_call>"]],
        section: pair(&["<seed:tool_call>"], &["</seed:tool_call>"]), call: pair(&["<function="], &["</function>"]),
        body: Body::Tagged(QWEN_TAGS), ..JSON
    },
    ToolFormat {
        name: "minimax_m2", detect: &[&["<minimax:tool_call>", "<invoke name="]],
        section: pair(&["<minimax:tool_call>"], &["</minimax:tool_call>"]), call: pair(&["<invoke name=\""], &["</invoke>"]),
        body: Body::Tagged(INVOKE_TAGS), ..JSON
    },
    ToolFormat {
        name: "deepseek_v32", aliases: &["deepseek_v4"], detect: &[&["<｜DSML｜"], &["｜DSML｜", "invoke name="]],
        section: pair(&["<｜DSML｜function_calls>", "<｜DSML｜tool_calls>"], &["</｜DSML｜function_calls>", "</｜DSML｜tool_calls>"]),
        call: pair(&["<｜DSML｜invoke name=\""], &["</｜DSML｜invoke>"]), body: Body::Tagged(DSML_TAGS), ..JSON
    },
    ToolFormat {
        name: "deepseek_v3", aliases: &["deepseekv3"], detect: &[&["<｜tool▁sep｜>", "```json"]],
        section: pair(&["<｜tool▁calls▁begin｜>"], &["<｜tool▁calls▁end｜>"]), call: pair(&["<｜tool▁call▁begin｜>"], &["<｜tool▁call▁end｜>"]),
        body: Body::Named(Named { prefix: "function<｜tool▁sep｜>", end: "\n", fence: "```json", ..NAMED }), fence: "```", ..JSON
    },
    ToolFormat {
        name: "deepseek_v31", aliases: &["deepseekv31"], detect: &[&["<｜tool▁sep｜>"]],
        section: pair(&["<｜tool▁calls▁begin｜>"], &["<｜tool▁calls▁end｜>"]), call: pair(&["<｜tool▁call▁begin｜>"], &["<｜tool▁call▁end｜>"]),
        body: Body::Named(Named { end: "<｜tool▁sep｜>", ..NAMED }), ..JSON
    },
    ToolFormat {
        name: "kimi_k2", detect: &[&["<|tool_calls_section_begin|>"]],
        section: pair(&["<|tool_calls_section_begin|>"], &["<|tool_calls_section_end|>"]),
        call: pair(&["<|tool_call_begin|>"], &["<|tool_call_end|>"]),
        body: Body::Named(Named { end: "<|tool_call_argument_begin|>", numbered: true, ..NAMED }), ids: CallIds::Written, ..JSON
    },
    ToolFormat {
        name: "mistral", detect: &[&["[TOOL_CALLS]"]], call: pair(&["[TOOL_CALLS]"], &[]),
        body: Body::Named(Named { end: "[ARGS]", aside: "[CALL_ID]", or_objects: true, ..NAMED }), ids: CallIds::Nine, ..JSON
    },
    ToolFormat {
        name: "glm45", aliases: &["glm46", "glm47"], detect: &[&["<arg_key>", "<arg_value>"]], call: pair(&["<tool_call>"], &["</tool_call>"]),
        body: Body::Tagged(GLM_TAGS), ..JSON
    },
    ToolFormat {
        name: "olmo3", detect: &[&["<function_calls>"]], call: pair(&["<function_calls>"], &["</function_calls>"]), body: Body::Python, separators: &[""],
        written: Written::Lines, ..JSON
    },
    ToolFormat {
        name: "lfm2", detect: &[&["<|tool_call_start|>"], &["<|tool_list_start|>"]], call: pair(&["<|tool_call_start|>"], &["<|tool_call_end|>"]),
        body: Body::Python, written: Written::List, ..JSON
    },
    ToolFormat {
        name: "functiongemma", detect: &[&["<start_function_call>"]], call: pair(&["<start_function_call>"], &["<end_function_call>"]),
        body: Body::Gemma { quote: "<escape>" }, ..JSON
    },
    ToolFormat {
        name: "gemma4", detect: &[&["<tool_call|>"]], call: pair(&["<|tool_call>"], &["<tool_call|>"]), body: Body::Gemma { quote: "<|\"|>" }, ..JSON
    },
    ToolFormat {
        name: "internlm", aliases: &["internlm2"], detect: &[&["<|plugin|>"]], section: pair(&["<|action_start|>"], &[]),
        call: pair(&["<|plugin|>"], &["<|action_end|>"]), body: Body::Json(PARAMETERS), ..JSON
    },
    ToolFormat {
        name: "command", aliases: &["cohere", "cohere_command3"], detect: &[&["<|START_ACTION|>"]],
        call: pair(&["<|START_ACTION|>"], &["<|END_ACTION|>"]), body: Body::Json(Keys { name: &["tool_name", "name"], arguments: PARAMETERS.arguments }),
        written: Written::List, ..JSON
    },
    ToolFormat { name: "nemotron_json", aliases: &["nemotron"], detect: &[&["<TOOLCALL>"]], call: pair(&["<TOOLCALL>"], &["</TOOLCALL>"]), written: Written::List, ..JSON },
    ToolFormat {
        name: "hunyuan_a13b", aliases: &["jamba", "minimax", "minimax_m1"], detect: &[&["<tool_calls>"]],
        call: pair(&["<tool_calls>"], &["</tool_calls>"]), separators: &[""], written: Written::List, ..JSON
    },
    ToolFormat {
        name: "phi4_mini_json", detect: &[&["<|/tool_call|>"], &["functools["]], call: pair(&["<|tool_call|>", "functools"], &["<|/tool_call|>"]), written: Written::List, ..JSON
    },
    ToolFormat {
        name: "ernie45", aliases: &["ernie_x1", "ernie45_thinking", "ernie_45_vl_thinking"], detect: &[&["<tool_call>", "<response>"]],
        call: pair(&["<tool_call>"], &["</tool_call>"]), ..JSON
    },
    ToolFormat {
        name: "hermes", aliases: &["qwen", "qwen25", "qwen2_5", "qwen3", "smollm3", "granite4", "longcat"],
        detect: &[&["<tool_call>"]], call: pair(&["<tool_call>"], &["</tool_call>"]), ..JSON
    },
    ToolFormat {
        name: "granite", detect: &[&["<|tool_call|>"], &["<|start_of_role|>", "tool_call"]], call: pair(&["<tool_call>", "<|tool_call|>"], &["</tool_call>"]),
        written: Written::List, ..JSON
    },
    ToolFormat {
        name: "functionary", aliases: &["functionary_v31"], detect: &[&["<function=", "</function>", "<|python_tag|>"]],
        call: pair(&["<function="], &["</function>"]), body: Body::Named(Named { end: ">", ..NAMED }), ..JSON
    },
    ToolFormat {
        name: "llama3_json", aliases: &["llama3", "llama4_json"], detect: &[&["<|python_tag|>"], &["ipython", "\"parameters\""]],
        call: pair(&["<|python_tag|>"], &[]), bare: &[Bare::Object], separators: &[";", ","], body: Body::Json(PARAMETERS),
        written: Written::Bare, ..JSON
    },
    ToolFormat {
        name: "pythonic", aliases: &["llama4_pythonic"], detect: &[&["[func_name1("], &["func_name1(params_name1"]],
        call: pair(&["<|python_start|>"], &["<|python_end|>"]), bare: &[Bare::List], body: Body::Python,
        written: Written::BareList, ..JSON
    },
    ToolFormat { name: "glm4", detect: &[&["<|observation|>", "[gMASK]"]], bare: &[Bare::Name], body: Body::Named(Named { end: "\n", ..NAMED }),
        written: Written::Bare, ..JSON },
    ToolFormat { name: "xlam", call: pair(&["[TOOL_CALLS]", "<tool_call>"], &["</tool_call>"]), bare: &[Bare::List, Bare::Object], separators: &[";", ","], written: Written::BareList, ..JSON },
];

/// The format of a name, in any case and with hyphens or underscores.
pub fn find(name: &str) -> Option<&'static ToolFormat> {
    FORMATS.iter().find(|format| is_called(name, format.name, format.aliases))
}

/// All names, for messages.
pub fn names() -> Vec<&'static str> {
    all_names(FORMATS.iter().map(|format| (format.name, format.aliases)))
}

/// MiniMax M3's calls are no format of these, and have others' marks in them.
const MINIMAX_M3: &str = "]<]minimax[>[";

/// The format of a chat template, which must know tools at all.
pub fn detect(template: &str) -> Option<&'static ToolFormat> {
    let is_known = template.contains("tools") && !template.contains(MINIMAX_M3);
    FORMATS.iter().find(|format| is_known && shows(template, format.detect))
}

impl ToolFormat {
    /// Every string that has a meaning in this format: as special tokens these must come through to the parser.
    pub fn marks(&self) -> Vec<&'static str> {
        let mut marks = [self.section.open, self.section.close, self.call.open, self.call.close].concat();
        match &self.body {
            Body::Json(_) | Body::Python => {}
            Body::Named(named) => marks.extend([named.prefix, named.end, named.aside]),
            Body::Tagged(tags) => {
                marks.extend(tags.name_end);
                marks.extend([tags.key.0, tags.key.1, tags.value_open, tags.value_close]);
            }
            Body::Gemma { quote } => marks.push(quote),
            Body::Harmony => marks.extend(HARMONY_MARKS),
        }
        marks.retain(|mark| mark.len() > 1);
        marks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_apart() {
        let mut all = names();
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
        assert_eq!(find("ERNIE-X1").map(|format| format.name), Some("ernie45"));
        assert!(find("nothing").is_none());
    }
}
