//! `serve`, `gateway` and `http`: the listener is up before the model is loaded, and says so on its health routes.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::future::join_all;
use futures::{FutureExt, StreamExt};
use serde_json::Value;
use tokio::net::TcpListener;

use super::signals::Shutdown;
use super::{model, say};
use super::{open_files, queue};
use crate::api::body::BodyLimits;
use crate::api::frames;
use crate::api::tally::{End, Tally};
use crate::api::{Call, Reply, Service};
use crate::config::{RunpodSettings, SecretString, ServerSettings, Settings, defaults};
use crate::engine::PoolingTask;
use crate::error::{Failure, Kind};
use crate::runpod::Ended;
use crate::server::{
    self, ConnectionLimits, Door, Endpoints, Listener, Metrics, Phase, Readiness, ServerOptions, Tls, connections, endpoint,
};
use crate::telemetry::metrics::Exposition;

/// The endpoint that `serve` attaches its worker to.
const LOCAL_ENDPOINT: &str = "local";
/// Connections where the system knows no limit.
const MOST_CONNECTIONS: usize = 10_000;
/// Connections to a health port of its own.
const HEALTH_CONNECTIONS: usize = 64;
/// How long responses may go on after everything else has drained.
const RESPONSES_END: Duration = Duration::from_secs(10);

/// Everything a laptop needs: the local endpoint, a worker on it through the real job protocol, and the direct OpenAI routes.
pub async fn serve(mut settings: Settings) -> Result<ExitCode, Failure> {
    if settings.server.keys_file.is_some() && settings.server.api_keys.is_empty() {
        // Our own worker comes through the same door, and the keys of the file are for clients.
        let random = format!("{}{}", uuid::Uuid::new_v4().simple(), uuid::Uuid::new_v4().simple());
        settings.server.api_keys.push(SecretString::from(random));
    }
    let shutdown = Shutdown::listen()?;
    let (listener, base) = bind(&settings, defaults::LAPTOP_HOST, defaults::LAPTOP_PORT).await?;
    let endpoints = Endpoints::new(endpoint_options(&settings));
    let direct = Direct::new();
    let options = direct.options(&settings);
    let router = server::direct(direct.door(), direct.readiness.clone(), Some(&endpoints), &options);
    let limits = connection_limits(&settings.server, &options);
    let (own_base, own_server) = match &settings.server.tls {
        // A certificate names the public address, and its root may be unknown here: our own worker comes in plain HTTP, on loopback.
        Some(_) => {
            let listener = listen(defaults::LAPTOP_HOST, 0, "PORT").await?;
            let own_base = format!("http://{}", address(&listener)?);
            (own_base, Some(spawn_server(listener, server::workers(&endpoints, &options), limits.clone())))
        }
        None => (base.clone(), None),
    };
    let public_server = spawn_server(listener, router, limits);
    let loaded = tokio::select! {
        loaded = model::load(&settings) => loaded,
        () = shutdown.clone().asked() => return Ok(ExitCode::SUCCESS),
    };
    let service = loaded.inspect_err(|_| direct.readiness.set(Phase::Failed))?;
    direct.ready(&service);
    welcome(&base, &service);
    let runpod = attached(&settings, &own_base);
    let (readiness, closing_endpoints, health) = (direct.readiness.clone(), endpoints.clone(), service.health());
    let asked = {
        let shutdown = shutdown.clone();
        async move {
            // The worker's own held polls end in either case, so that it need not wait for them.
            tokio::select! {
                () = shutdown.asked() => {
                    readiness.set(Phase::Draining);
                    closing_endpoints.close();
                }
                _ = health.failed() => {
                    closing_endpoints.close();
                    // The worker hears of it by itself.
                    std::future::pending().await
                }
            }
        }
    };
    let ended = queue::worker(&runpod, &service).run(asked).await.map_err(Failure::internal)?;
    // Direct requests are in the engines, not in the worker.
    let ended = drained(&service, ended, &settings).await;
    close([Some(public_server), own_server]).await;
    Ok(exit_code(ended))
}

/// The local endpoint alone. Prints the variables with which workers attach.
pub async fn gateway(settings: Settings) -> Result<ExitCode, Failure> {
    if settings.server.keys_file.is_some() {
        let message = "API_KEYS_FILE: `gateway` cannot keep its limits, since tokens are counted by its workers; use API_KEY, or give the file to `http` or `serve`";
        return Err(Failure::internal(message));
    }
    let shutdown = Shutdown::listen()?;
    let (listener, base) = bind(&settings, defaults::LAPTOP_HOST, defaults::LAPTOP_PORT).await?;
    let endpoints = Endpoints::new(endpoint_options(&settings));
    let options = ServerOptions::from(&settings.server);
    let router = server::gateway(&endpoints, Readiness::new(Phase::Ready), &options);
    let server = spawn_server(listener, router, connection_limits(&settings.server, &options));
    tracing::info!("local endpoint at {base}/v2/{LOCAL_ENDPOINT} (any id is an endpoint); workers attach with the variables on stdout");
    for (name, value) in endpoint::worker_variables(&base, LOCAL_ENDPOINT, "worker-1", settings.server.api_keys.first()) {
        say(&format!("export {name}='{value}'"));
    }
    shutdown.asked().await;
    endpoints.close();
    close([Some(server)]).await;
    Ok(ExitCode::SUCCESS)
}

/// The direct OpenAI server alone: RunPod's load-balancing endpoints, Pods, any other place.
pub async fn http(settings: Settings) -> Result<ExitCode, Failure> {
    let shutdown = Shutdown::listen()?;
    let (listener, base) = bind(&settings, defaults::PLATFORM_HOST, defaults::PLATFORM_PORT).await?;
    let direct = Direct::new();
    let options = direct.options(&settings);
    let limits = connection_limits(&settings.server, &options);
    let router = server::direct(direct.door(), direct.readiness.clone(), None, &options);
    let server = spawn_server(listener, router, limits.clone());
    let health = match settings.server.health_port.filter(|port| Some(*port) != settings.server.port) {
        Some(port) => {
            let listener = listen(settings.server.host.as_deref().unwrap_or(defaults::PLATFORM_HOST), port, "PORT_HEALTH").await?;
            let limits = ConnectionLimits { most: limits.most.min(HEALTH_CONNECTIONS), ..limits };
            Some(spawn_server(listener, server::health_only(direct.readiness.clone(), &options), limits))
        }
        None => None,
    };
    let loaded = tokio::select! {
        loaded = model::load(&settings) => loaded,
        () = shutdown.clone().asked() => return Ok(ExitCode::SUCCESS),
    };
    let service = loaded.inspect_err(|_| direct.readiness.set(Phase::Failed))?;
    direct.ready(&service);
    tracing::info!("OpenAI API at {base}/v1");
    let ended = direct.end(&service, shutdown.asked(), &settings).await;
    close([Some(server), health]).await;
    Ok(exit_code(ended))
}

/// Waits until the engines have answered what they hold, and tells how it ended after all.
async fn drained(service: &Service, ended: Ended, settings: &Settings) -> Ended {
    let limit = settings.runpod.drain_timeout;
    // A broken engine has nothing more to compute: its failures only have to be written.
    let idle = service.engines().map(|(_, engine)| engine.idle(if engine.failure().is_some() { limit.min(RESPONSES_END) } else { limit }));
    join_all(idle).await;
    if service.health().failure().is_some() { Ended::Unhealthy } else { ended }
}

fn exit_code(ended: Ended) -> ExitCode {
    match ended {
        Ended::Drained => ExitCode::SUCCESS,
        Ended::Unhealthy => ExitCode::FAILURE,
    }
}

/// The direct door: closed until the model is there.
struct Direct {
    service: Arc<OnceLock<Arc<Service>>>,
    readiness: Arc<Readiness>,
}

impl Direct {
    fn new() -> Self {
        Self { service: Arc::default(), readiness: Readiness::new(Phase::Loading) }
    }

    fn door(&self) -> Door {
        let service = self.service.clone();
        Arc::new(move |call| {
            let service = service.get().cloned();
            async move {
                match service {
                    Some(service) => logged(service, call).await,
                    None => Err(Failure::new(Kind::Loading, "the model is still loading").code("model_loading").retry_after(1)),
                }
            }
            .boxed()
        })
    }

    /// With the engine's figures at `/metrics` and `/load`; none before the model is there.
    fn options(&self, settings: &Settings) -> ServerOptions {
        let service = self.service.clone();
        let prefix = settings.server.metrics_prefix.clone();
        let text = move || service.get().map_or(String::new(), |service| exposition(service, &prefix));
        let service = self.service.clone();
        let load = move || service.get().map_or(0, |service| service.load());
        let metrics = Metrics { text: Arc::new(text), load: Arc::new(load) };
        let service = self.service.clone();
        let model_limits = move || service.get().map_or_else(BodyLimits::default, |service| service.body_limits());
        ServerOptions { metrics: Some(metrics), model_limits: Some(Arc::new(model_limits)), ..ServerOptions::from(&settings.server) }
    }

    /// Opens the door, for as long as the engines are sound.
    fn ready(&self, service: &Arc<Service>) {
        let _ = self.service.set(service.clone());
        self.readiness.ready(service.health());
    }

    /// Serves until it is told to stop or an engine breaks, and then until what the engines hold is answered.
    async fn end(&self, service: &Service, asked: impl Future<Output = ()>, settings: &Settings) -> Ended {
        let health = service.health();
        let ended = tokio::select! {
            () = asked => {
                self.readiness.set(Phase::Draining);
                Ended::Drained
            }
            failure = health.failed() => {
                tracing::error!("no more requests are taken: {failure}");
                Ended::Unhealthy
            }
        };
        drained(service, ended, settings).await
    }
}

/// The figures of all engines, each under its model's name.
fn exposition(service: &Service, prefix: &str) -> String {
    let texts: Vec<String> = service.engines().map(|(name, engine)| engine.stats().exposition(prefix, name)).collect();
    Exposition::joined(&texts)
}

/// Answers a call, and tells its end in the log. (Of a GET only a scraper's rhythm would be seen.)
async fn logged(service: Arc<Service>, call: Call) -> Result<Reply, Failure> {
    if call.method != "POST" {
        return service.call(call).await;
    }
    // The server's, where it counts what a key uses.
    let tally = Tally::current();
    let mut closing = Closing { request_id: call.request_id.clone(), tally: tally.clone(), end: None };
    match tally.around(service.call(call)).await {
        Ok(Reply::Stream(pieces)) => Ok(Reply::Stream(Box::pin(pieces.inspect(move |piece| closing.see(piece))))),
        whole => {
            closing.end = Some(whole.as_ref().map(|_| ()).map_err(Clone::clone));
            whole
        }
    }
}

/// Writes the last line of a direct request, when its answer is out or dropped.
struct Closing {
    request_id: String,
    tally: Arc<Tally>,
    /// How it ended; `None` while it has not.
    end: Option<Result<(), Failure>>,
}

impl Closing {
    /// A stream's last frame says so; a failure may follow it.
    fn see(&mut self, piece: &Result<Value, Failure>) {
        match piece {
            Err(failure) => self.end = Some(Err(failure.clone())),
            Ok(Value::String(text)) if frames::end_stream(text) => self.end = Some(Ok(())),
            Ok(_) => {}
        }
    }
}

impl Drop for Closing {
    fn drop(&mut self) {
        let span = tracing::error_span!("request", request_id = %self.request_id);
        span.in_scope(|| {
            self.tally.log(&match &self.end {
                Some(Ok(())) => End::Completed,
                Some(Err(failure)) => End::Failed(failure),
                None => End::Gone,
            });
        });
    }
}

/// How many connections there may be, by the settings and the system.
fn connection_limits(settings: &ServerSettings, options: &ServerOptions) -> ConnectionLimits {
    let timeout = |given: Duration| Some(given).filter(|given| !given.is_zero());
    let possible = open_files::raise().map(open_files::connections);
    let wanted = settings.max_connections;
    if let (Some(wanted), Some(possible)) = (wanted, possible.filter(|possible| wanted.is_some_and(|wanted| wanted > *possible))) {
        tracing::warn!("MAX_CONNECTIONS={wanted} is more than the system's limit of open files allows; there may be {possible} at once");
    }
    ConnectionLimits {
        header_timeout: timeout(settings.header_timeout),
        idle_timeout: timeout(settings.keep_alive_timeout),
        most: wanted.unwrap_or(usize::MAX).min(possible.unwrap_or(MOST_CONNECTIONS)),
        health_path: options.health_path.clone(),
    }
}

type Server = (tokio::sync::oneshot::Sender<()>, tokio::task::JoinHandle<()>);

/// Serves in the background until the sender speaks (or is dropped).
fn spawn_server(listener: impl Into<Listener>, router: axum::Router, limits: ConnectionLimits) -> Server {
    let listener = listener.into();
    let (closing, closed) = tokio::sync::oneshot::channel();
    let server = tokio::spawn(async move {
        let shutdown = async {
            let _ = closed.await;
        };
        if let Err(error) = connections::serve(listener, router, limits, shutdown, RESPONSES_END).await {
            tracing::error!("the HTTP server ended: {error}");
        }
    });
    (closing, server)
}

/// Ends servers, one after the other.
async fn close(servers: impl IntoIterator<Item = Option<Server>>) {
    for (closing, server) in servers.into_iter().flatten() {
        let _ = closing.send(());
        let _ = server.await;
    }
}

/// The listener of the settings, and the URL under which this machine reaches it.
async fn bind(settings: &Settings, default_host: &str, default_port: u16) -> Result<(Listener, String), Failure> {
    let host = settings.server.host.as_deref().unwrap_or(default_host);
    let socket = listen(host, settings.server.port.unwrap_or(default_port), "PORT").await?;
    let port = address(&socket)?.port();
    let host = match host {
        "0.0.0.0" => "127.0.0.1".to_string(),
        "::" => "[::1]".to_string(),
        ipv6 if ipv6.contains(':') => format!("[{ipv6}]"),
        other => other.to_string(),
    };
    let tls = settings.server.tls.as_ref().map(|files| Arc::new(Tls::new(files)));
    let scheme = if tls.is_some() { "https" } else { "http" };
    Ok((Listener { socket, tls }, format!("{scheme}://{host}:{port}")))
}

fn address(socket: &TcpListener) -> Result<SocketAddr, Failure> {
    socket.local_addr().map_err(|error| Failure::internal(format!("listener: {error}")))
}

async fn listen(host: &str, port: u16, setting: &str) -> Result<TcpListener, Failure> {
    TcpListener::bind((host, port)).await.map_err(|error| {
        Failure::internal(format!("cannot listen on {host}:{port}: {error}; set HOST and {setting} (--host, --port) to a free address"))
    })
}

fn endpoint_options(settings: &Settings) -> endpoint::EndpointOptions {
    endpoint::EndpointOptions { cloud_errors: settings.server.cloud_errors, ..Default::default() }
}

/// The worker's settings, pointed at our own endpoint.
fn attached(settings: &Settings, base: &str) -> RunpodSettings {
    let mut runpod = settings.runpod.clone();
    for (name, value) in endpoint::worker_variables(base, LOCAL_ENDPOINT, "local-worker", settings.server.api_keys.first()) {
        match name {
            "RUNPOD_WEBHOOK_GET_JOB" => runpod.get_job = Some(value),
            "RUNPOD_WEBHOOK_POST_OUTPUT" => runpod.post_output = Some(value),
            "RUNPOD_WEBHOOK_POST_STREAM" => runpod.post_stream = Some(value),
            "RUNPOD_WEBHOOK_PING" => runpod.ping = Some(value),
            "RUNPOD_AI_API_KEY" => runpod.api_key = Some(SecretString::from(value)),
            "RUNPOD_ENDPOINT_ID" => runpod.endpoint_id = Some(value),
            "RUNPOD_POD_ID" => runpod.worker_id = Some(value),
            _ => {}
        }
    }
    runpod
}

fn welcome(base: &str, service: &Service) {
    let name = service.name();
    tracing::info!("OpenAI API         {base}/v1");
    tracing::info!("the same as a job  {base}/v2/{LOCAL_ENDPOINT}/openai/v1");
    tracing::info!("RunPod endpoint    {base}/v2/{LOCAL_ENDPOINT}/runsync");
    let task = service.engines().next().and_then(|(_, engine)| engine.limits().pooling.as_ref().map(|pooling| pooling.task));
    let (route, body) = match task {
        None => ("chat/completions", r#""messages":[{"role":"user","content":"What is the capital of France?"}]"#),
        Some(PoolingTask::Embed) => ("embeddings", r#""input":"What is the capital of France?""#),
        Some(PoolingTask::Score) => ("rerank", r#""query":"What is the capital of France?","documents":["Paris","Rome"]"#),
    };
    tracing::info!("try it: curl {base}/v1/{route} -H 'content-type: application/json' -d '{{\"model\":\"{name}\",{body}}}'");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{LoadedModel, ModelInfo};
    use crate::checkpoint::demo;
    use crate::config::ApiSettings;
    use crate::engine;
    use crate::models::{Fault, Output, Plan, Runner, Shape, StepError};
    use crate::runpod::tests::queue::{Queue, Route, ScriptedReply};
    use crate::text::tokenizer::Tokenizer;
    use serde_json::json;

    /// Panics when a prompt has more than ten tokens, loses its device when it has exactly one, and says the same token otherwise.
    struct Fragile(Shape);

    impl Runner for Fragile {
        fn shape(&self) -> &Shape {
            &self.0
        }

        fn step(&mut self, plan: &Plan) -> Result<Output, StepError> {
            assert!(plan.tokens.len() <= 10, "told to");
            if plan.rows.iter().any(|row| row.context == 1) {
                return Err(StepError::new(Fault::Device, Failure::internal("device: CUDA_ERROR_ILLEGAL_ADDRESS")));
            }
            Ok(Output { tokens: vec![400; plan.rows.len()], ..Default::default() })
        }
    }

    async fn service() -> Arc<Service> {
        service_of(&["demo"]).await
    }

    async fn service_of(names: &[&str]) -> Arc<Service> {
        let files = demo::files();
        let tokenizer = Arc::new(Tokenizer::load(&files).unwrap());
        let shape = Shape {
            max_model_len: 256,
            vocab_size: tokenizer.vocab_size(),
            block_size: 16,
            blocks: 16,
            kv_cache_dtype: "float32",
            state_slots: 0,
            max_num_seqs: 4,
            max_num_batched_tokens: 64,
            memory_bound: false,
            pooling: None,
            whole_prompts: false,
        };
        let mut models = Vec::new();
        for name in names {
            let shape = shape.clone();
            let engine = engine::start(|| Ok(Fragile(shape)), engine::EngineOptions::default()).await.unwrap();
            let info = ModelInfo { name: (*name).to_owned(), ..ModelInfo::from_files(&files).unwrap() };
            models.push(LoadedModel { engine, tokenizer: tokenizer.clone(), info });
        }
        Arc::new(Service::of_models(ApiSettings::default(), models).unwrap())
    }

    #[tokio::test]
    async fn one_broken_model_of_several_ends_all_and_says_which() {
        let service = service_of(&["demo", "other"]).await;
        // Either takes 4 that run and 512 that wait.
        assert_eq!((service.places(), service_of(&["demo"]).await.places()), ((8, 508), (4, 512)));
        let direct = Direct::new();
        let settings = Settings::default();
        let metrics = direct.options(&settings).metrics.unwrap();
        direct.ready(&service);
        let complete = |model: &str, prompt: Value| {
            let body = json!({"model": model, "prompt": prompt, "max_tokens": 2});
            service.call(Call { method: "POST".into(), path: "/v1/completions".into(), body, request_id: "r".into(), client: None })
        };
        assert!(complete("other", json!("Hi")).await.is_ok() && complete("demo", json!("Hi")).await.is_ok());
        assert_eq!(direct.readiness.phase(), Phase::Ready);
        let (ended, failed) = tokio::join!(direct.end(&service, std::future::pending(), &settings), complete("other", json!([400])));
        assert_eq!((ended, failed.err().map(|failure| failure.status())), (Ended::Unhealthy, Some(500)));
        assert_eq!(direct.readiness.phase(), Phase::Failed);
        let text = (metrics.text)();
        for line in ["worker_candle_healthy{model_name=\"demo\"} 1", "worker_candle_healthy{model_name=\"other\"} 0"] {
            assert!(text.lines().any(|present| present == line), "{line} in {text}");
        }
    }

    #[tokio::test]
    async fn a_panic_fails_its_request_and_the_worker_says_so() {
        let mut settings = Settings::default();
        settings.server.api_keys = vec![SecretString::from("key")];
        let direct = Direct::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let router = server::direct(direct.door(), direct.readiness.clone(), None, &direct.options(&settings));
        let (_closing, _server) = spawn_server(listener, router, ConnectionLimits::default());
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let get = |path: &str| client.get(format!("{base}{path}")).send();
        let complete = |prompt: &str| {
            let body = json!({"prompt": prompt, "max_tokens": 3});
            client.post(format!("{base}/v1/completions")).bearer_auth("key").json(&body).send()
        };
        assert_eq!(get("/metrics").await.unwrap().text().await.unwrap(), "", "no engine, no figures");
        assert_eq!(get("/load").await.unwrap().json::<Value>().await.unwrap(), json!({"server_load": 0}));
        direct.ready(&service().await);
        assert_eq!(get("/ping").await.unwrap().status(), 200);
        assert_eq!(complete("Hi").await.unwrap().status(), 200);
        // Scrapers bring no key.
        let metrics = get("/metrics").await.unwrap();
        assert_eq!(metrics.headers()["content-type"], "text/plain; version=0.0.4; charset=utf-8");
        let metrics = metrics.text().await.unwrap();
        for line in ["worker_candle_healthy{model_name=\"demo\"} 1", "worker_candle_generation_tokens_total{model_name=\"demo\"} 3"] {
            assert!(metrics.lines().any(|present| present == line), "{line} in {metrics}");
        }

        let failed = complete("A prompt that is longer than those ten tokens, by far.").await.unwrap();
        assert_eq!(failed.status(), 500);
        assert_eq!(failed.json::<Value>().await.unwrap()["error"]["type"], "server_error");
        for attempt in 0.. {
            if get("/ping").await.unwrap().status() == 503 {
                break;
            }
            assert!(attempt < 500, "the worker still calls itself healthy");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(complete("Hi").await.unwrap().status(), 503);
        assert!(get("/metrics").await.unwrap().text().await.unwrap().contains("worker_candle_healthy{model_name=\"demo\"} 0\n"));
    }

    #[tokio::test]
    async fn http_ends_with_its_device_and_answers_what_it_holds() {
        let service = service().await;
        let direct = Direct::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let settings = Settings::default();
        let router = server::direct(direct.door(), direct.readiness.clone(), None, &direct.options(&settings));
        let (_closing, _server) = spawn_server(listener, router, ConnectionLimits::default());
        direct.ready(&service);
        let ask = async {
            let client = reqwest::Client::builder().no_proxy().build().unwrap();
            let body = json!({"prompt": [400], "max_tokens": 3});
            client.post(format!("{base}/v1/completions")).json(&body).send().await.unwrap()
        };
        let (ended, failed) = tokio::join!(direct.end(&service, std::future::pending(), &settings), ask);
        assert_eq!((ended, failed.status().as_u16()), (Ended::Unhealthy, 500));
        let error = failed.json::<Value>().await.unwrap();
        assert!(error["error"]["message"].as_str().unwrap().contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{error}");
        assert_eq!(direct.readiness.phase(), Phase::Failed);
    }

    #[tokio::test]
    async fn a_queue_worker_ends_with_its_device_and_answers_what_it_holds() {
        let service = service().await;
        let queue = Queue::start().await;
        let settings = RunpodSettings {
            get_job: Some(format!("{}/job-take/$ID", queue.base)),
            post_output: Some(format!("{}/job-done/$RUNPOD_POD_ID/$ID", queue.base)),
            ping: Some(format!("{}/ping/$RUNPOD_POD_ID", queue.base)),
            api_key: Some(SecretString::from("key")),
            worker_id: Some("pod1".into()),
            ..Default::default()
        };
        let jobs = json!([{"id": "lost", "input": {"input_ids": [400], "max_tokens": 3}}, {"id": "other", "input": {"prompt": "Hi", "max_tokens": 1}}]);
        queue.script(Route::Take, [ScriptedReply::Json(jobs)]);
        let running = queue::worker(&settings, &service).run(std::future::pending());
        let platform = async {
            queue.wait(Route::Done, 2).await;
            // The poll that was open comes back empty, as the platform's do in the end.
            queue.script(Route::Take, [ScriptedReply::Status(204)]);
        };
        let (ended, ()) = tokio::time::timeout(Duration::from_secs(20), async { tokio::join!(running, platform) }).await.expect("an end");
        assert_eq!(ended, Ok(Ended::Unhealthy));
        let done = queue.seen(Route::Done);
        assert_eq!(done.len(), 2, "both are answered, once: {done:?}");
        let lost = done.iter().find(|seen| seen.line.contains("/lost?")).unwrap().json();
        assert!(lost["error"].as_str().unwrap().contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{lost}");
        assert_eq!(lost["stopPod"], true);
        let pings = queue.lines(Route::Ping);
        assert!(pings.iter().any(|line| line.contains("status=unhealthy&check=engine")), "{pings:?}");
    }
}
