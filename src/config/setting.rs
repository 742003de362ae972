//! What a setting is: the columns of the table in [`super::table`].

use std::fmt;
use std::time::Duration;

/// One setting, a row of the table.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// The environment variable; the flag is named after it.
    pub name: &'static str,
    /// Other spellings, strongest first.
    pub aliases: &'static [&'static str],
    pub kind: Kind,
    pub default: DefaultValue,
    /// The text of `--help` and of `docs/settings.md`.
    pub doc: &'static str,
    pub section: Section,
    /// Its value is never shown.
    pub secret: bool,
    /// Not in `--help`, though the flag exists.
    pub hidden: bool,
    /// As a flag's value, a word may begin with a hyphen.
    pub hyphen: bool,
    /// How the Hub's form asks for it, when it does.
    pub form: Option<Form>,
}

/// Whom a setting concerns; a heading in `--help`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Section {
    Model,
    Engine,
    Api,
    Queue,
    /// Set by the platform; flags exist for tests, and are hidden.
    Platform,
    Server,
    General,
    /// Set by the operating system; there are no flags.
    System,
}

impl Section {
    pub fn heading(self) -> &'static str {
        match self {
            Self::Model => "Model",
            Self::Engine => "Engine",
            Self::Api => "API",
            Self::Queue => "Queue worker",
            Self::Platform => "Platform",
            Self::Server => "Server",
            Self::General => "General",
            Self::System => "System",
        }
    }
}

/// Type and range of a value. Words of `auto` stand for "not given".
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    Text,
    Switch,
    /// A whole number; `4k` and `4K` are understood.
    Count {
        least: usize,
        auto: Words,
    },
    /// One of a few whole numbers.
    CountOf {
        of: &'static [usize],
        auto: Words,
    },
    /// A whole number, or -1 for all there are.
    CountOrAll,
    Number {
        range: Range,
        auto: Words,
    },
    /// One of these words, in any case.
    OneOf(Words),
    List,
    /// Models, in a list that leaves their names and paths whole.
    Models,
    /// A list of secrets.
    Keys,
    /// A JSON object.
    Object,
    Port,
    Url,
    /// The path of a URL.
    UrlPath,
    Seed,
    /// How many devices compute a model: a whole number from 1, or `auto`, which is read as 0.
    Ranks,
    Device,
    Quantization,
    KvCacheDtype,
    Speculative,
    /// Jinja text or a file.
    Template,
    MetricsPrefix,
}

type Words = &'static [&'static str];

/// What a number must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Range {
    Positive,
    NotNegative,
    /// A part of a whole.
    Share,
}

impl Range {
    pub fn holds(self, value: f64) -> bool {
        match self {
            Self::Positive => value > 0.0,
            Self::NotNegative => value >= 0.0,
            Self::Share => value > 0.0 && value <= 1.0,
        }
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Positive => "above 0",
            Self::NotNegative => "0 or more",
            Self::Share => "above 0 and at most 1",
        })
    }
}

/// What holds when a setting is not given. Displayed as `check` shows it.
#[derive(Debug, Clone, Copy)]
pub enum DefaultValue {
    Nothing,
    Switch(bool),
    Count(usize),
    Number(f64),
    Text(&'static str),
    Seconds(Duration),
    Milliseconds(Duration),
    /// It follows from something else, in words.
    Prose(&'static str),
    /// The same with constants in it.
    Computed(fn() -> String),
}

impl DefaultValue {
    /// True when it is a value that could be typed, and no description of one.
    pub fn is_value(self) -> bool {
        !matches!(self, Self::Nothing | Self::Prose(_) | Self::Computed(_))
    }
}

impl fmt::Display for DefaultValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.write_str("none"),
            Self::Switch(value) => value.fmt(f),
            Self::Count(value) => value.fmt(f),
            Self::Number(value) => value.fmt(f),
            Self::Text(value) | Self::Prose(value) => f.write_str(value),
            Self::Seconds(time) => time.as_secs().fmt(f),
            Self::Milliseconds(time) => time.as_millis().fmt(f),
            Self::Computed(text) => f.write_str(&text()),
        }
    }
}

/// A field of the Hub's form.
#[derive(Debug, Clone, Copy)]
pub struct Form {
    pub label: &'static str,
    pub help: &'static str,
    pub input: Input,
    /// What stands in it, when that is not the setting's default.
    pub filled: Option<&'static str>,
    /// Shown when the form is unfolded.
    pub advanced: bool,
    pub required: bool,
}

#[derive(Debug, Clone, Copy)]
pub enum Input {
    Text,
    /// A hub id, with the form's own search.
    Model,
    Switch,
    Number {
        least: f64,
        most: Option<f64>,
    },
    /// Labels and values.
    Options(&'static [(&'static str, &'static str)]),
}

impl Setting {
    /// A row without its name, doc and section, which the table adds.
    pub(super) const fn new(kind: Kind, default: DefaultValue) -> Self {
        Self {
            name: "",
            aliases: &[],
            kind,
            default,
            doc: "",
            section: Section::General,
            secret: false,
            hidden: false,
            hyphen: false,
            form: None,
        }
    }

    pub(super) const fn switch(default: bool) -> Self {
        Self::new(Kind::Switch, DefaultValue::Switch(default))
    }

    /// A text without a default.
    pub(super) const fn text() -> Self {
        Self::new(Kind::Text, DefaultValue::Nothing)
    }

    pub(super) const fn also(self, aliases: &'static [&'static str]) -> Self {
        Self { aliases, ..self }
    }

    pub(super) const fn secret(self) -> Self {
        Self { secret: true, ..self }
    }

    pub(super) const fn hidden(self) -> Self {
        Self { hidden: true, ..self }
    }

    pub(super) const fn with_hyphen(self) -> Self {
        Self { hyphen: true, ..self }
    }

    pub(super) const fn form(self, form: Form) -> Self {
        Self { form: Some(form), ..self }
    }

    pub fn has_flag(&self) -> bool {
        self.section != Section::System
    }

    pub fn is_switch(&self) -> bool {
        self.kind == Kind::Switch
    }

    /// As a flag it may be repeated, each time with more values.
    pub fn is_list(&self) -> bool {
        matches!(self.kind, Kind::List | Kind::Models | Kind::Keys)
    }
}

impl Form {
    pub(super) const fn new(label: &'static str, help: &'static str, input: Input) -> Self {
        Self { label, help, input, filled: None, advanced: false, required: false }
    }

    pub(super) const fn filled(self, value: &'static str) -> Self {
        Self { filled: Some(value), ..self }
    }

    pub(super) const fn advanced(self) -> Self {
        Self { advanced: true, ..self }
    }

    pub(super) const fn required(self) -> Self {
        Self { required: true, ..self }
    }
}
