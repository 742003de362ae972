//! The platform's URL templates, and what is put into them.

use crate::config::RunpodSettings;

const TAKE: &str = "/job-take/";

/// The addresses of one worker. Templates are opaque: only the placeholders are replaced, and parameters appended.
#[derive(Debug, Clone)]
pub(crate) struct Urls {
    take: String,
    done: String,
    stream: Option<String>,
}

impl Urls {
    /// Reads the templates. Errors name the variable at fault.
    pub fn new(settings: &RunpodSettings, worker_id: &str) -> Result<Self, String> {
        let read = |name, template| fill(settings, worker_id, name, template);
        let take = read("RUNPOD_WEBHOOK_GET_JOB", &settings.get_job)?.ok_or("RUNPOD_WEBHOOK_GET_JOB is not set: no jobs can be taken")?;
        let done = read("RUNPOD_WEBHOOK_POST_OUTPUT", &settings.post_output)?
            .ok_or("RUNPOD_WEBHOOK_POST_OUTPUT is not set: results could not be returned")?;
        let stream = read("RUNPOD_WEBHOOK_POST_STREAM", &settings.post_stream)?;
        // In the take template `$ID` stands for the worker, in the others for the job.
        Ok(Self { take: take.replace("$ID", &encode(worker_id)), done, stream })
    }

    /// `None`: the template knows no batch route.
    pub fn take_batch(&self, jobs: usize, busy: bool) -> Option<String> {
        let url = self.other_route("/job-take-batch/")?;
        Some(with_query(&url, &[("batch_size", &jobs.to_string()), ("job_in_progress", flag(busy))]))
    }

    pub fn take(&self, busy: bool) -> String {
        with_query(&self.take, &[("job_in_progress", flag(busy))])
    }

    /// `None`: the template does not tell where stops are read.
    pub fn stop(&self) -> Option<String> {
        self.other_route("/job-stop/")
    }

    pub fn done(&self, job_id: &str, is_stream: bool) -> String {
        let is_stream = if is_stream { "true" } else { "false" };
        with_query(&self.done.replace("$ID", &encode(job_id)), &[("isStream", is_stream)])
    }

    /// Where pieces go; `None` when streaming is off. `isStream=false` is what the platform's own SDK sends here.
    pub fn stream(&self, job_id: &str) -> Option<String> {
        let template = self.stream.as_ref()?;
        Some(with_query(&template.replace("$ID", &encode(job_id)), &[("isStream", "false")]))
    }

    fn other_route(&self, route: &str) -> Option<String> {
        self.take.contains(TAKE).then(|| self.take.replace(TAKE, route))
    }
}

/// Where pings go; `None` when the platform wants none.
pub(crate) fn ping(settings: &RunpodSettings, worker_id: &str) -> Result<Option<String>, String> {
    let url = fill(settings, worker_id, "RUNPOD_WEBHOOK_PING", &settings.ping)?;
    Ok(url.map(|url| url.replace("$ID", &encode(worker_id))))
}

/// Replaces what does not depend on the job; longest name first.
fn fill(settings: &RunpodSettings, worker_id: &str, name: &str, template: &Option<String>) -> Result<Option<String>, String> {
    let Some(template) = template else { return Ok(None) };
    let gpu = settings.gpu_type_id.as_deref().unwrap_or_default();
    let url = template.replace("$RUNPOD_GPU_TYPE_ID", &encode(gpu)).replace("$RUNPOD_POD_ID", &encode(worker_id));
    check(name, &url)?;
    Ok(Some(url))
}

fn check(name: &str, url: &str) -> Result<(), String> {
    match reqwest::Url::parse(url) {
        Ok(parsed) if matches!(parsed.scheme(), "http" | "https") => Ok(()),
        Ok(parsed) => Err(format!("{name} must be an http or https address, and is one of scheme {}", parsed.scheme())),
        Err(error) => Err(format!("{name} is not a valid address: {error}")),
    }
}

fn flag(value: bool) -> &'static str {
    if value { "1" } else { "0" }
}

/// Appends parameters, percent-encoded, in the order given.
pub(crate) fn with_query(url: &str, parameters: &[(&str, &str)]) -> String {
    let mut url = url.to_owned();
    for (name, value) in parameters {
        url.push(if url.contains('?') { '&' } else { '?' });
        url.push_str(name);
        url.push('=');
        url.push_str(&encode(value));
    }
    url
}

/// Percent-encodes everything but RFC 3986's unreserved characters: safe in a path segment and in a query.
pub(crate) fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => encoded.push(char::from(byte)),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(get_job: &str, post_output: &str) -> RunpodSettings {
        RunpodSettings {
            get_job: Some(get_job.into()),
            post_output: Some(post_output.into()),
            gpu_type_id: Some("NVIDIA GeForce RTX 4090".into()),
            ..Default::default()
        }
    }

    #[test]
    fn production_templates() {
        let mut settings = settings(
            "https://api.example/v2/ep/job-take/$ID?gpu=NVIDIA+RTX",
            "https://api.example/v2/ep/job-done/$RUNPOD_POD_ID/$ID?gpu=NVIDIA+RTX",
        );
        settings.post_stream = Some("https://api.example/v2/ep/job-stream/$RUNPOD_POD_ID/$ID?gpu=NVIDIA+RTX".into());
        settings.ping = Some("https://api.example/v2/ep/ping/$RUNPOD_POD_ID?gpu=NVIDIA+RTX".into());
        let urls = Urls::new(&settings, "pod 1").unwrap();
        assert_eq!(urls.take(false), "https://api.example/v2/ep/job-take/pod%201?gpu=NVIDIA+RTX&job_in_progress=0");
        assert_eq!(
            urls.take_batch(4, true).unwrap(),
            "https://api.example/v2/ep/job-take-batch/pod%201?gpu=NVIDIA+RTX&batch_size=4&job_in_progress=1"
        );
        assert_eq!(urls.stop().unwrap(), "https://api.example/v2/ep/job-stop/pod%201?gpu=NVIDIA+RTX");
        assert_eq!(urls.done("a/b-u1", true), "https://api.example/v2/ep/job-done/pod%201/a%2Fb-u1?gpu=NVIDIA+RTX&isStream=true");
        assert_eq!(urls.stream("j").unwrap(), "https://api.example/v2/ep/job-stream/pod%201/j?gpu=NVIDIA+RTX&isStream=false");
        assert_eq!(ping(&settings, "pod 1").unwrap().unwrap(), "https://api.example/v2/ep/ping/pod%201?gpu=NVIDIA+RTX");
    }

    #[test]
    fn harness_templates_without_a_query() {
        let settings = settings(
            "http://localhost/v2/IDE/job-take/$RUNPOD_POD_ID",
            "http://localhost/v2/IDE/job-done/$RUNPOD_POD_ID/$ID?gpu=$RUNPOD_GPU_TYPE_ID",
        );
        let urls = Urls::new(&settings, "w").unwrap();
        assert_eq!(urls.take(true), "http://localhost/v2/IDE/job-take/w?job_in_progress=1");
        assert_eq!(urls.take_batch(2, false).unwrap(), "http://localhost/v2/IDE/job-take-batch/w?batch_size=2&job_in_progress=0");
        assert_eq!(urls.done("j", false), "http://localhost/v2/IDE/job-done/w/j?gpu=NVIDIA%20GeForce%20RTX%204090&isStream=false");
        assert_eq!(urls.stream("j"), None);
        assert_eq!(ping(&settings, "w"), Ok(None));
    }

    #[test]
    fn a_worker_id_that_looks_like_a_placeholder_is_not_replaced_again() {
        let settings = settings("http://h/job-take/$RUNPOD_POD_ID", "http://h/done/$RUNPOD_POD_ID/$ID");
        let urls = Urls::new(&settings, "x$ID").unwrap();
        assert_eq!(urls.done("j", false), "http://h/done/x%24ID/j?isStream=false");
    }

    #[test]
    fn other_routes_need_the_take_segment() {
        let urls = Urls::new(&settings("http://h/get/$ID", "http://h/done/$ID"), "w").unwrap();
        assert_eq!((urls.take_batch(2, false), urls.stop()), (None, None));
        assert_eq!(urls.take(false), "http://h/get/w?job_in_progress=0");
    }

    #[test]
    fn mistakes_name_the_variable() {
        let error = |settings: &RunpodSettings| Urls::new(settings, "w").unwrap_err();
        assert!(error(&RunpodSettings::default()).contains("RUNPOD_WEBHOOK_GET_JOB is not set"));
        let mut no_output = settings("http://h/job-take/$ID", "");
        no_output.post_output = None;
        assert!(error(&no_output).contains("RUNPOD_WEBHOOK_POST_OUTPUT is not set"));
        assert!(error(&settings("http://h/job-take/$ID", "JOB_DONE_URL")).contains("RUNPOD_WEBHOOK_POST_OUTPUT is not a valid address"));
        assert!(error(&settings("ftp://h/job-take/$ID", "http://h/")).contains("scheme ftp"));
    }
}
