//! What a run found, as Markdown for people and JSON for machines.

use std::fmt::Write;

use serde::{Deserialize, Serialize};

/// One yes-or-no question with the numbers behind the answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Check {
    pub name: String,
    pub passed: bool,
    pub detail: String,
}

/// One number.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Measurement {
    pub name: String,
    pub value: f64,
    pub unit: String,
}

/// One part of the suite, run in a process of its own.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Part {
    pub name: String,
    pub checks: Vec<Check>,
    pub measurements: Vec<Measurement>,
    pub notes: Vec<String>,
    /// Why nothing was done here; not a failure.
    pub skipped: Option<String>,
    pub seconds: f64,
}

impl Part {
    pub fn check(&mut self, name: impl Into<String>, passed: bool, detail: impl Into<String>) {
        self.checks.push(Check { name: name.into(), passed, detail: detail.into() });
    }

    pub fn measure(&mut self, name: impl Into<String>, value: f64, unit: &str) {
        self.measurements.push(Measurement { name: name.into(), value, unit: unit.into() });
    }

    pub fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }

    pub fn passed(&self) -> bool {
        self.checks.iter().all(|check| check.passed)
    }

    fn verdict(&self) -> &'static str {
        match (&self.skipped, self.passed()) {
            (Some(_), true) => "skipped",
            (_, true) => "pass",
            (_, false) => "FAIL",
        }
    }
}

/// The whole run.
#[derive(Debug, Serialize)]
pub struct Report {
    pub passed: bool,
    pub device: String,
    pub seconds: f64,
    pub parts: Vec<Part>,
}

impl Report {
    pub fn markdown(&self) -> String {
        let mut out = format!("# GPU suite: {}\n\n", if self.passed { "pass" } else { "FAIL" });
        let _ = writeln!(out, "Device `{}`, {:.0} s in all.\n\n| Part | Verdict | Seconds |\n|---|---|---|", self.device, self.seconds);
        for part in &self.parts {
            let _ = writeln!(out, "| {} | {} | {:.1} |", part.name, part.verdict(), part.seconds);
        }
        for part in &self.parts {
            let _ = writeln!(out, "\n## {}: {}", part.name, part.verdict());
            for text in part.skipped.iter().chain(&part.notes) {
                let _ = writeln!(out, "\n{text}");
            }
            if !part.checks.is_empty() {
                out += "\n| Check | | Detail |\n|---|---|---|\n";
            }
            for check in &part.checks {
                let verdict = if check.passed { "pass" } else { "FAIL" };
                let _ = writeln!(out, "| {} | {verdict} | {} |", cell(&check.name), cell(&check.detail));
            }
            if !part.measurements.is_empty() {
                out += "\n| Measured | Value | Unit |\n|---|---|---|\n";
            }
            for m in &part.measurements {
                let _ = writeln!(out, "| {} | {} | {} |", cell(&m.name), number(m.value), m.unit);
            }
        }
        out
    }
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ⏎ ")
}

fn number(value: f64) -> String {
    if value.abs() >= 100.0 { format!("{value:.0}") } else { format!("{value:.3}") }
}
