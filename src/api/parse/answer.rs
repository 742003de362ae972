//! What a request wants taken out of its answers' text, and the parser that does it.

use std::collections::HashSet;
use std::sync::Arc;

use crate::api::delta::DeltaKind;
use crate::api::parse::harmony::Harmony;
use crate::api::parse::reasoning::{Part, ReasoningFormat, ReasoningParser, Start, push_reasoning};
use crate::api::parse::tools::ToolParser;
use crate::api::parse::tools::request::{ToolChoice, ToolRequest};
use crate::api::parse::tools::table::{Body, ToolFormat};
use crate::api::parse::{Parser, PlainText};

/// What is to be taken out of the text of a request's answers. Nothing by default.
#[derive(Debug, Clone, Default)]
pub struct Parsing {
    pub reasoning: Option<Reasoning>,
    /// The request's tools, if it has any.
    pub tools: Option<Arc<ToolRequest>>,
    /// Special tokens that are marks of these formats.
    pub marks: Arc<HashSet<u32>>,
}

/// How thoughts are told from the answer.
#[derive(Debug, Clone, Copy)]
pub struct Reasoning {
    pub format: &'static ReasoningFormat,
    pub start: Start,
    /// They are told apart from the content, where they otherwise stay.
    pub apart: bool,
    /// They are part of the answer given out.
    pub shown: bool,
}

impl Parsing {
    /// The format of the calls that are looked for.
    fn tool_format(&self) -> Option<&'static ToolFormat> {
        self.tools.as_ref().filter(|tools| tools.choice != ToolChoice::None)?.format
    }

    /// Opening marks of calls that end a thought, too.
    pub fn ends_of_thoughts(&self) -> Vec<&'static str> {
        let ends = self.tool_format().filter(|format| format.ends_reasoning);
        ends.map_or_else(Vec::new, |format| [format.section.open, format.call.open].concat())
    }

    /// Notes where an answer to this prompt begins.
    pub fn begin(&mut self, prompt: &str) {
        if let Some(reasoning) = &mut self.reasoning {
            reasoning.start = reasoning.format.start(prompt);
        }
    }

    /// Notes where an answer goes on that has begun with `text`.
    pub fn go_on(&mut self, text: &str) {
        if let Some(reasoning) = &mut self.reasoning {
            reasoning.start = reasoning.format.continued(text);
        }
    }

    /// How thoughts are told apart, where they are.
    pub fn told_apart(&self) -> Option<Reasoning> {
        self.reasoning.filter(|reasoning| reasoning.apart)
    }

    /// The parser of one answer.
    pub fn parser(&self) -> Box<dyn Parser> {
        let told_apart = self.told_apart();
        let format = self.tool_format();
        let tools = self.tools.clone().filter(|_| format.is_some());
        if told_apart.is_some_and(|reasoning| reasoning.format.harmony) || format.is_some_and(|format| matches!(format.body, Body::Harmony))
        {
            return Box::new(Harmony::new(tools, told_apart.map(|reasoning| reasoning.shown)));
        }
        if told_apart.is_none() && tools.is_none() {
            return Box::new(PlainText);
        }
        let ends = self.ends_of_thoughts();
        Box::new(AnswerParser {
            reasoning: told_apart.map(|reasoning| (ReasoningParser::new(reasoning.format, reasoning.start, ends), reasoning.shown)),
            tools: tools.zip(format).map(|(tools, format)| ToolParser::new(format, tools)),
        })
    }
}

/// Thoughts, then content and tool calls.
struct AnswerParser {
    /// With whether they are given out.
    reasoning: Option<(ReasoningParser, bool)>,
    tools: Option<ToolParser>,
}

impl AnswerParser {
    fn content(&mut self, text: String, deltas: &mut Vec<DeltaKind>) {
        match &mut self.tools {
            Some(tools) => tools.push(&text, deltas),
            None if text.is_empty() => {}
            None => match deltas.last_mut() {
                Some(DeltaKind::Text(last)) => last.push_str(&text),
                _ => deltas.push(DeltaKind::Text(text)),
            },
        }
    }

    fn parts(&mut self, parts: Vec<Part>, deltas: &mut Vec<DeltaKind>) {
        let shown = self.reasoning.as_ref().is_some_and(|(_, shown)| *shown);
        for part in parts {
            match part {
                Part::Content(text) => self.content(text, deltas),
                Part::Reasoning(text) if shown => push_reasoning(text, deltas),
                Part::Reasoning(_) => {}
            }
        }
    }
}

impl Parser for AnswerParser {
    fn push(&mut self, text: String, deltas: &mut Vec<DeltaKind>) {
        let Some((reasoning, _)) = &mut self.reasoning else { return self.content(text, deltas) };
        let mut parts = Vec::new();
        reasoning.push(&text, &mut parts);
        self.parts(parts, deltas);
    }

    fn finish(&mut self, deltas: &mut Vec<DeltaKind>) {
        if let Some((reasoning, _)) = &mut self.reasoning {
            let mut parts = Vec::new();
            reasoning.finish(&mut parts);
            self.parts(parts, deltas);
        }
        if let Some(tools) = &mut self.tools {
            tools.finish(deltas);
        }
    }

    fn in_reasoning(&self) -> bool {
        self.reasoning.as_ref().is_some_and(|(reasoning, _)| reasoning.in_reasoning())
    }
}
