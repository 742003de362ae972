//! Thoughts and the answer, told apart as the text comes. The formats are rows of a table.

use crate::api::delta::DeltaKind;
use crate::api::parse::marks::{Begins, Found, begins, find};
use crate::api::parse::{all_names, is_called, shows};

/// How a model marks its thoughts.
#[derive(Debug)]
pub struct ReasoningFormat {
    /// vLLM's name of it, as `REASONING_PARSER` takes it.
    pub name: &'static str,
    /// Other names, of vLLM, SGLang and FastDeploy.
    pub aliases: &'static [&'static str],
    /// Groups of strings: a chat template that holds all of a group is of this format.
    pub detect: &'static [&'static [&'static str]],
    pub open: &'static [&'static str],
    pub close: &'static [&'static str],
    /// What ends thoughts before the model does: a closing mark, with the white space that the family writes around it.
    pub force: &'static str,
    /// Marks around the answer, which are no part of it.
    pub answer: &'static [&'static str],
    /// An answer begins with thoughts even where nothing says so.
    pub always: bool,
    /// gpt-oss: thoughts are messages of a channel.
    pub harmony: bool,
}

/// gpt-oss's mark of the end of a message, that with the beginning of the next one, and the header of an answer.
pub const HARMONY_END: &str = "<|end|>";
pub const HARMONY_NEXT: &str = "<|end|><|start|>assistant";
pub const HARMONY_FINAL: &str = "<|channel|>final<|message|>";

const THINK: ReasoningFormat = ReasoningFormat {
    name: "",
    aliases: &[],
    detect: &[],
    open: &["<think>"],
    close: &["</think>"],
    force: "\n</think>\n\n",
    answer: &[],
    always: false,
    harmony: false,
};

/// All of them. Where a template fits several, the first is taken.
#[rustfmt::skip]
pub const FORMATS: &[ReasoningFormat] = &[
    ReasoningFormat { name: "openai_gptoss", aliases: &["gpt_oss", "openai", "harmony"], detect: &[&["<|channel|>", "analysis"]], open: &["<|channel|>analysis<|message|>"],
        close: &["<|channel|>final"], force: "<|end|><|start|>assistant<|channel|>final<|message|>", harmony: true, ..THINK },
    ReasoningFormat {
        name: "seed_oss", detect: &[&["<seed:think>"]], open: &["<seed:think>"], close: &["</seed:think>"],
        force: "\n</seed:think>\n\n", ..THINK
    },
    ReasoningFormat { name: "mistral", aliases: &["magistral"], detect: &[&["[THINK]"]], open: &["[THINK]"], close: &["[/THINK]"],
        force: "[/THINK]", ..THINK },
    ReasoningFormat {
        name: "granite", detect: &[&["Here is my thought process:"]], open: &["Here is my thought process:", "Here's my thought process:"],
        close: &["Here is my response:", "Here's my response:"], force: "\nHere is my response:\n", ..THINK
    },
    ReasoningFormat {
        name: "command", aliases: &["cohere", "cohere_command3"], detect: &[&["<|START_THINKING|>"]], open: &["<|START_THINKING|>"],
        close: &["<|END_THINKING|>"], force: "<|END_THINKING|>", answer: &["<|START_RESPONSE|>", "<|END_RESPONSE|>"], ..THINK
    },
    ReasoningFormat {
        name: "ernie45", aliases: &["ernie_x1", "ernie45_thinking", "ernie_45_vl", "ernie_45_vl_thinking"], detect: &[&["</think>", "<response>"]],
        answer: &["<response>", "</response>"], ..THINK
    },
    ReasoningFormat { name: "hunyuan_a13b", aliases: &["hunyuan"], detect: &[&["<think>", "<answer>"]], answer: &["<answer>", "</answer>"], ..THINK },
    ReasoningFormat {
        name: "qwen3",
        aliases: &["think", "deepseek_v3", "deepseek_v31", "glm45", "kimi_k2", "kimi", "minimax_m2", "step3", "nemotron", "holo2", "hermes", "olmo3"],
        detect: &[&["<think>"], &["</think>"]], ..THINK
    },
    ReasoningFormat { name: "deepseek_r1", aliases: &["deepseek", "qwq", "qwen3_thinking", "minimax"], always: true, ..THINK },
];

/// The format of a name, in any case and with hyphens or underscores.
pub fn find_format(name: &str) -> Option<&'static ReasoningFormat> {
    FORMATS.iter().find(|format| is_called(name, format.name, format.aliases))
}

/// All names, for messages.
pub fn names() -> Vec<&'static str> {
    all_names(FORMATS.iter().map(|format| (format.name, format.aliases)))
}

/// The format of a chat template.
pub fn detect(template: &str) -> Option<&'static ReasoningFormat> {
    FORMATS.iter().find(|format| shows(template, format.detect))
}

/// Where an answer begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Start {
    /// Its first words tell.
    #[default]
    Undecided,
    Reasoning,
    Content,
}

impl ReasoningFormat {
    /// Where the answer to a prompt begins, which the end of the prompt tells: an open thought, a closed one, or neither.
    pub fn start(&self, prompt: &str) -> Start {
        let prompt = prompt.trim_end();
        if self.open.iter().any(|mark| prompt.ends_with(mark)) {
            return Start::Reasoning;
        }
        if self.close.iter().any(|mark| prompt.ends_with(mark)) || self.answer.iter().any(|mark| prompt.ends_with(mark)) {
            return Start::Content;
        }
        if self.always { Start::Reasoning } else { Start::Undecided }
    }

    /// Where an answer goes on that has begun with `text`.
    pub fn continued(&self, text: &str) -> Start {
        let last = |marks: &[&str]| marks.iter().filter_map(|mark| text.rfind(mark)).max();
        match (last(self.open), last(self.close)) {
            (Some(open), close) if close.is_none_or(|close| close < open) => Start::Reasoning,
            (None, None) if text.trim().is_empty() => self.start(""),
            _ => Start::Content,
        }
    }

    /// Every string that has a meaning in this format.
    pub fn marks(&self) -> Vec<&'static str> {
        [self.open, self.close, self.answer].concat()
    }
}

/// Tells the thoughts of one answer from the rest of it.
pub struct ReasoningParser {
    format: &'static ReasoningFormat,
    /// Opening marks of tool calls that end a thought, too.
    ends: Vec<&'static str>,
    buffer: String,
    state: State,
    /// White space that is dropped unless more text follows.
    blank: String,
    /// White space that comes now is dropped.
    trim: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Undecided,
    Reasoning,
    Content,
}

/// A part of an answer.
#[derive(Debug, PartialEq)]
pub enum Part {
    Reasoning(String),
    Content(String),
}

impl ReasoningParser {
    pub fn new(format: &'static ReasoningFormat, start: Start, ends: Vec<&'static str>) -> Self {
        let state = match start {
            Start::Undecided => State::Undecided,
            Start::Reasoning => State::Reasoning,
            Start::Content => State::Content,
        };
        // What follows the end of a prompt is not cut.
        Self { format, ends, buffer: String::new(), state, blank: String::new(), trim: start == Start::Reasoning }
    }

    pub fn in_reasoning(&self) -> bool {
        self.state == State::Reasoning
    }

    pub fn push(&mut self, text: &str, out: &mut Vec<Part>) {
        self.buffer.push_str(text);
        while self.step(false, out) {}
    }

    /// No more text comes.
    pub fn finish(&mut self, out: &mut Vec<Part>) {
        while self.step(true, out) {}
        let blank = std::mem::take(&mut self.blank);
        if self.state != State::Reasoning && !blank.is_empty() {
            out.push(Part::Content(blank));
        }
    }

    fn take(&mut self, bytes: usize) -> String {
        let rest = self.buffer.split_off(bytes);
        std::mem::replace(&mut self.buffer, rest)
    }

    fn take_blank(&mut self) -> String {
        let blank = self.buffer.len() - self.buffer.trim_start().len();
        self.take(blank)
    }

    fn enter(&mut self, state: State, mark: usize) -> bool {
        self.take(mark);
        self.blank.clear();
        self.trim = true;
        self.state = state;
        true
    }

    /// Takes something from the buffer; false when there is nothing to be taken before more text comes.
    fn step(&mut self, ended: bool, out: &mut Vec<Part>) -> bool {
        match self.state {
            State::Undecided => self.undecided(ended),
            State::Reasoning => self.reasoning(ended, out),
            State::Content => self.content(ended, out),
        }
    }

    fn undecided(&mut self, ended: bool) -> bool {
        let blank = self.take_blank();
        self.blank.push_str(&blank);
        if self.buffer.is_empty() {
            return false;
        }
        let format = self.format;
        match begins(&self.buffer, format.open.iter().chain(format.close).copied(), ended) {
            Begins::Perhaps => false,
            // A thought that the prompt has opened, and that is empty.
            Begins::With(mark) if format.close.contains(&mark) => self.enter(State::Content, mark.len()),
            Begins::With(mark) => self.enter(State::Reasoning, mark.len()),
            Begins::No => {
                self.state = State::Content;
                let blank = std::mem::take(&mut self.blank);
                self.buffer.insert_str(0, &blank);
                true
            }
        }
    }

    fn reasoning(&mut self, ended: bool, out: &mut Vec<Part>) -> bool {
        let format = self.format;
        if self.trim {
            self.take_blank();
            // The opening mark may stand in the prompt and in the answer.
            match begins(&self.buffer, format.open.iter().copied(), ended) {
                _ if self.buffer.is_empty() => return false,
                Begins::Perhaps => return false,
                Begins::With(mark) => return self.enter(State::Reasoning, mark.len()),
                Begins::No => {}
            }
        }
        let marks = format.close.iter().chain(&self.ends).copied();
        let (at, mark) = match find(&self.buffer, marks, ended) {
            Found::Mark { at, mark } => (at, Some(mark)),
            Found::Begins(at) => (at, None),
            Found::None => (self.buffer.len(), None),
        };
        let text = self.take(at);
        if let Some(text) = self.held_back(&text) {
            out.push(Part::Reasoning(text));
        }
        match mark {
            Some(mark) => self.enter(State::Content, if format.close.contains(&mark) { mark.len() } else { 0 }),
            None => false,
        }
    }

    /// The text without white space at its end, which waits for more text.
    fn held_back(&mut self, text: &str) -> Option<String> {
        let text = if self.trim { text.trim_start() } else { text };
        let end = text.trim_end().len();
        let known = (end > 0).then(|| std::mem::take(&mut self.blank) + &text[..end]);
        self.trim &= known.is_none();
        if !self.trim {
            self.blank.push_str(&text[end..]);
        }
        known
    }

    fn content(&mut self, ended: bool, out: &mut Vec<Part>) -> bool {
        let format = self.format;
        if self.trim {
            self.take_blank();
            // A second closing mark closes nothing.
            match begins(&self.buffer, format.close.iter().copied(), ended) {
                _ if self.buffer.is_empty() => return false,
                Begins::Perhaps => return false,
                Begins::With(mark) => return self.enter(State::Content, mark.len()),
                Begins::No => {}
            }
        }
        if format.answer.is_empty() {
            self.trim = false;
            let text = std::mem::take(&mut self.buffer);
            if !text.is_empty() {
                out.push(Part::Content(text));
            }
            return false;
        }
        let (at, mark) = match find(&self.buffer, format.answer.iter().copied(), ended) {
            Found::Mark { at, mark } => (at, Some(mark)),
            Found::Begins(at) => (at, None),
            Found::None => (self.buffer.len(), None),
        };
        let text = self.take(at);
        if let Some(text) = self.held_back(&text) {
            out.push(Part::Content(text));
        }
        match mark {
            Some(mark) => self.enter(State::Content, mark.len()),
            None => false,
        }
    }
}

/// Thoughts as deltas.
pub fn push_reasoning(text: String, out: &mut Vec<DeltaKind>) {
    match out.last_mut() {
        Some(DeltaKind::Reasoning(last)) => last.push_str(&text),
        _ => out.push(DeltaKind::Reasoning(text)),
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
        assert_eq!(find_format("ernie-x1").map(|format| format.name), Some("ernie45"));
    }

    #[test]
    fn the_prompt_tells_where_an_answer_begins() {
        let think = find_format("qwen3").unwrap();
        for (prompt, start) in [
            ("Assistant: <think>\n", Start::Reasoning),
            ("Assistant: <think>\n\n</think>\n\n", Start::Content),
            ("say </think> twice\nAssistant: ", Start::Undecided),
        ] {
            assert_eq!(think.start(prompt), start);
        }
        assert_eq!(find_format("deepseek_r1").unwrap().start("Assistant: "), Start::Reasoning);
        for (text, start) in
            [("<think>hm", Start::Reasoning), ("<think>hm</think>a", Start::Content), ("a", Start::Content), (" ", Start::Undecided)]
        {
            assert_eq!(think.continued(text), start);
        }
    }
}
