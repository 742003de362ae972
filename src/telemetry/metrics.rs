//! Counts and histograms as plain data, and their text form for Prometheus. There is no lock in here: one thread keeps the numbers, and others get
//! copies.

use std::fmt::Write as _;
use std::time::Duration;

/// The most bounds that a histogram may have.
const MOST: usize = 20;

/// Counts values by their size. The counts become cumulative only when they are written. A copy takes no memory from the heap.
#[derive(Debug, Clone, PartialEq)]
pub struct Histogram {
    /// Upper bounds, ascending.
    bounds: &'static [f64],
    /// One count for each bound, and a last one for values above all bounds.
    counts: [u64; MOST + 1],
    sum: f64,
}

/// Bounds for times from one token to a whole request, in seconds.
pub const SECONDS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0];

/// Bounds for numbers of tokens.
pub const TOKENS: &[f64] = &[1.0, 4.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0, 131072.0];

/// Bounds for small numbers of things.
pub const COUNTS: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];

/// How many values there were, and their sum.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Total {
    count: u64,
    sum: f64,
}

impl Total {
    /// The mean of the values that have come since `before`; `None` when there are none.
    pub fn mean_since(self, before: Self) -> Option<f64> {
        (self.count > before.count).then(|| (self.sum - before.sum) / (self.count - before.count) as f64)
    }
}

impl Histogram {
    pub fn new(bounds: &'static [f64]) -> Self {
        debug_assert!(bounds.len() <= MOST);
        Self { bounds: &bounds[..bounds.len().min(MOST)], counts: [0; MOST + 1], sum: 0.0 }
    }

    pub fn record(&mut self, value: f64) {
        self.record_many(value, 1);
    }

    /// The same value `count` times.
    pub fn record_many(&mut self, value: f64, count: u64) {
        self.counts[self.bounds.partition_point(|bound| *bound < value)] += count;
        self.sum += value * count as f64;
    }

    pub fn record_time(&mut self, time: Duration) {
        self.record(time.as_secs_f64());
    }

    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    pub fn total(&self) -> Total {
        Total { count: self.count(), sum: self.sum }
    }
}

/// Metrics in Prometheus' text format, one after another.
pub struct Exposition {
    prefix: String,
    /// The labels of every line, as `name="value"`.
    labels: String,
    text: String,
}

impl Exposition {
    /// The content type of the text.
    pub const CONTENT_TYPE: &'static str = "text/plain; version=0.0.4; charset=utf-8";

    /// Every name begins with `prefix`, every line carries `labels`.
    pub fn new(prefix: &str, labels: &[(&str, &str)]) -> Self {
        let labels = labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect::<Vec<_>>().join(",");
        Self { prefix: prefix.to_owned(), labels, text: String::new() }
    }

    pub fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.head(name, help, "counter");
        self.line(name, "", value as f64);
    }

    /// One line for each value of `label`.
    pub fn counters(&mut self, name: &str, help: &str, label: &str, values: &[(&str, u64)]) {
        self.head(name, help, "counter");
        for (of, value) in values {
            self.line(name, &format!("{label}=\"{}\"", escaped(of)), *value as f64);
        }
    }

    pub fn gauge(&mut self, name: &str, help: &str, value: f64) {
        self.head(name, help, "gauge");
        self.line(name, "", value);
    }

    /// 1, with facts as labels.
    pub fn info(&mut self, name: &str, help: &str, facts: &[(&str, &str)]) {
        self.head(name, help, "gauge");
        let facts: Vec<_> = facts.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect();
        self.line(name, &facts.join(","), 1.0);
    }

    pub fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        self.head(name, help, "histogram");
        let bucket = format!("{name}_bucket");
        let mut below = 0;
        for (bound, count) in histogram.bounds.iter().zip(histogram.counts) {
            below += count;
            self.line(&bucket, &format!("le=\"{bound}\""), below as f64);
        }
        self.line(&bucket, "le=\"+Inf\"", histogram.count() as f64);
        self.line(&format!("{name}_sum"), "", histogram.sum);
        self.line(&format!("{name}_count"), "", histogram.count() as f64);
    }

    pub fn finish(self) -> String {
        self.text
    }

    /// Texts of the same metrics with other labels as one: each metric's heading once, with the lines of all below it.
    pub fn joined(texts: &[String]) -> String {
        let metrics = |text: &str| text.split_inclusive('\n').filter(|line| line.starts_with("# HELP ")).count();
        debug_assert!(texts.iter().all(|text| metrics(text) == metrics(&texts[0])));
        let mut parts: Vec<_> = texts.iter().map(|text| text.split("# HELP ").skip(1)).collect();
        let mut joined = String::new();
        while let Some(same) = parts.iter_mut().map(Iterator::next).collect::<Option<Vec<&str>>>().filter(|same| !same.is_empty()) {
            joined.push_str("# HELP ");
            for (place, part) in same.into_iter().enumerate() {
                // The rest of a help's line, the type's line, and then the values.
                let heading = if place == 0 { 0 } else { 2 };
                joined.extend(part.split_inclusive('\n').skip(heading));
            }
        }
        joined
    }

    fn head(&mut self, name: &str, help: &str, kind: &str) {
        let prefix = &self.prefix;
        // Writing to a string does not fail.
        let _ = write!(self.text, "# HELP {prefix}{name} {help}\n# TYPE {prefix}{name} {kind}\n");
    }

    fn line(&mut self, name: &str, more: &str, value: f64) {
        let comma = if self.labels.is_empty() || more.is_empty() { "" } else { "," };
        let _ = writeln!(self.text, "{}{name}{{{}{comma}{more}}} {value}", self.prefix, self.labels);
    }
}

fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_as_prometheus_reads_it() {
        let mut histogram = Histogram::new(&[0.1, 1.0]);
        [0.05, 0.1, 0.5].iter().for_each(|value| histogram.record(*value));
        histogram.record_many(7.0, 2);
        let mut text = Exposition::new("x_", &[("model_name", "a\"b")]);
        text.counter("made_total", "Things made.", 3);
        text.counters("ended_total", "By reason.", "reason", &[("stop", 1), ("length", 2)]);
        text.gauge("share", "A share.", 0.25);
        text.histogram("time_seconds", "A time.", &histogram);
        assert_eq!(
            text.finish(),
            r#"# HELP x_made_total Things made.
# TYPE x_made_total counter
x_made_total{model_name="a\"b"} 3
# HELP x_ended_total By reason.
# TYPE x_ended_total counter
x_ended_total{model_name="a\"b",reason="stop"} 1
x_ended_total{model_name="a\"b",reason="length"} 2
# HELP x_share A share.
# TYPE x_share gauge
x_share{model_name="a\"b"} 0.25
# HELP x_time_seconds A time.
# TYPE x_time_seconds histogram
x_time_seconds_bucket{model_name="a\"b",le="0.1"} 2
x_time_seconds_bucket{model_name="a\"b",le="1"} 3
x_time_seconds_bucket{model_name="a\"b",le="+Inf"} 5
x_time_seconds_sum{model_name="a\"b"} 14.65
x_time_seconds_count{model_name="a\"b"} 5
"#
        );
    }

    #[test]
    fn texts_of_several_models_share_their_headings() {
        let of = |model: &str| {
            let mut text = Exposition::new("x_", &[("model_name", model)]);
            text.counters("ended_total", "By reason.", "reason", &[("stop", 1), ("length", 2)]);
            text.gauge("share", "A share.", 0.25);
            text.finish()
        };
        assert_eq!(Exposition::joined(&[of("a")]), of("a"));
        assert_eq!(Exposition::joined(&[]), "");
        assert_eq!(
            Exposition::joined(&[of("a"), of("b")]),
            r#"# HELP x_ended_total By reason.
# TYPE x_ended_total counter
x_ended_total{model_name="a",reason="stop"} 1
x_ended_total{model_name="a",reason="length"} 2
x_ended_total{model_name="b",reason="stop"} 1
x_ended_total{model_name="b",reason="length"} 2
# HELP x_share A share.
# TYPE x_share gauge
x_share{model_name="a"} 0.25
x_share{model_name="b"} 0.25
"#
        );
    }

    #[test]
    fn bounds_are_ascending_and_fit() {
        for bounds in [SECONDS, TOKENS, COUNTS] {
            assert!(bounds.windows(2).all(|pair| pair[0] < pair[1]) && bounds.len() <= MOST);
        }
    }
}
