//! [`Service`]: what both doors drive.

use std::pin::Pin;
use std::sync::Arc;

use futures::{Stream, StreamExt};
use serde_json::Value;

use crate::api::batch::{self, Given, Line, Unread};
use crate::api::body::BodyLimits;
use crate::api::dialects::{Dialect, Prepared, anthropic, chat, completions, fastchat, infill, native, responses, tokens};
use crate::api::fields::Fields;
use crate::api::job::{self, JobInput};
use crate::api::model::ModelInfo;
use crate::api::models::{LoadedModel, Model, Models};
use crate::api::pooling::{self, PoolingCall};
use crate::api::routes::{self, Route};
use crate::api::run::RequestStream;
use crate::api::served::ServedModel;
use crate::api::{calls, model_list, openapi, reclaim};
use crate::config::{ApiSettings, ClientKey, NativeFormat, defaults};
use crate::engine::{Handle, Health, PoolingTask};
use crate::error::{Failure, Kind};
use crate::text::tokenizer::Tokenizer;

/// What a request gives back.
pub enum Reply {
    /// One object.
    Whole(Value),
    /// Pieces as they come. **Pulled, never pushed**: each pull gives everything that is ready as one piece, so whoever pulls
    /// slowly gets fewer and larger ones, and nobody slows the engine. Dropping the stream cancels the generation.
    ///
    /// For HTTP and for `openai_route` jobs a piece is a string of whole server-sent-event frames, the last of which is
    /// `data: [DONE]` or an event that ends its stream. For native jobs it is one chunk object.
    ///
    /// A failure ends the stream. If it is the **first item**, nothing has been written: its status can still be told. If it comes later,
    /// the item before it tells it to who reads the pieces alone: frames that end the stream, or for native jobs a chunk that is the error
    /// envelope.
    Stream(Pieces),
}

pub type Pieces = Pin<Box<dyn Stream<Item = Result<Value, Failure>> + Send>>;

/// One HTTP-like call to the OpenAI surface.
pub struct Call {
    /// Upper case.
    pub method: String,
    /// As the client wrote it (`/v1/chat/completions`, `/openai/v1/models`), with or without its query.
    pub path: String,
    /// The parsed body, `Null` when there was none.
    pub body: Value,
    /// Goes into response ids and logs.
    pub request_id: String,
    /// Whose key it came with, where that is one of `API_KEYS_FILE`.
    pub client: Option<Arc<ClientKey>>,
}

/// Reads a request with this id and body in one dialect.
type Read = fn(&ServedModel, &str, &Value) -> Result<Prepared, Failure>;

/// Everything needed to answer, for all models; shared by all doors.
pub struct Service {
    models: Arc<Models>,
    settings: ApiSettings,
}

impl Service {
    /// Of one model. Fails on settings that do not hold (`CHAT_TEMPLATE`, whose file is read here, and `OVERRIDE_GENERATION_CONFIG`); a
    /// model's own template that does not compile fails chat requests only.
    pub fn new(settings: ApiSettings, engine: Handle, tokenizer: Arc<Tokenizer>, info: ModelInfo) -> Result<Self, Failure> {
        Self::of_models(settings, vec![LoadedModel { engine, tokenizer, info }])
    }

    /// The same of several, at least one.
    pub fn of_models(settings: ApiSettings, models: Vec<LoadedModel>) -> Result<Self, Failure> {
        Ok(Self { models: Arc::new(Models::new(&settings, models)?), settings })
    }

    /// The name that answers carry where a request names no model.
    pub fn name(&self) -> &str {
        self.models.first.served.name()
    }

    /// The name of every model, with its engine.
    pub fn engines(&self) -> impl Iterator<Item = (&str, &Handle)> {
        self.models.iter().map(|model| (model.served.name(), &model.runs.engine))
    }

    /// Whether all engines can still compute.
    pub fn health(&self) -> Health {
        self.engines().map(|(_, engine)| engine.health()).collect()
    }

    /// Sequences that run or wait.
    pub fn load(&self) -> usize {
        self.engines().map(|(_, engine)| engine.load()).sum()
    }

    /// Sequences that run at once, and how many more can wait. So many together are refused by no engine, whichever models they are for.
    pub fn places(&self) -> (usize, usize) {
        let rows = self.engines().map(|(_, engine)| engine.limits().max_num_seqs).fold(0, usize::saturating_add);
        let most = self.engines().map(|(_, engine)| engine.limits().max_num_seqs.saturating_add(engine.limits().max_waiting)).min();
        let rows = rows.min(most.unwrap_or(0));
        (rows, most.unwrap_or(0) - rows)
    }

    /// How large requests may be, whichever model they are for.
    pub fn body_limits(&self) -> BodyLimits {
        let of = |model: &Model| BodyLimits::of_model(&model.served.limits, model.served.tokenizer.longest_token());
        let limits = self.models.iter().map(of).reduce(BodyLimits::widest).unwrap_or_default();
        BodyLimits { depth: self.settings.max_json_depth, ..limits }
    }

    #[cfg(test)]
    pub(super) fn engine(&self) -> &Handle {
        &self.models.first.runs.engine
    }

    #[cfg(test)]
    pub(super) fn served(&self) -> &ServedModel {
        &self.models.first.served
    }

    /// The queue's door: the `input` of a RunPod job (`messages`, `prompt`, `openai_route`, `route` …).
    pub async fn job(self: &Arc<Self>, input: Value, job_id: &str) -> Result<Reply, Failure> {
        let request_id = job_id.to_owned();
        match job::read(input)? {
            JobInput::Call { method, path, body } => self.call(Call { method, path, body, request_id, client: None }).await,
            JobInput::Batch { lines, stream } => self.batch(lines, stream).await,
            JobInput::Own(body) if self.models.of_body(&body).served.limits.pooling.is_some() => {
                self.pool(pooling::of_job(&body), request_id, body).await
            }
            JobInput::Own(body) => {
                let read = match self.settings.native_format {
                    NativeFormat::OpenAi => native::read,
                    NativeFormat::Tokens => tokens::read,
                };
                self.generate(read, request_id, body).await
            }
        }
    }

    /// Answers lines of a batch: a list in their order, or each as soon as it is ready.
    async fn batch(self: &Arc<Self>, lines: Vec<(usize, Given)>, stream: bool) -> Result<Reply, Failure> {
        let (service, at_once) = (self.clone(), self.lines_at_once());
        let answers = futures::stream::iter(lines).map(move |(number, given)| {
            let service = service.clone();
            async move { service.line(given.read(number, &service.body_limits())).await }
        });
        match stream {
            true => Ok(Reply::Stream(Box::pin(answers.buffer_unordered(at_once).map(Ok)))),
            false => Ok(Reply::Whole(Value::Array(answers.buffered(at_once).collect().await))),
        }
    }

    /// Lines of a batch that are best run together.
    pub fn lines_at_once(&self) -> usize {
        let (rows, _) = self.places();
        rows.saturating_add(rows.div_ceil(defaults::SEQS_PER_WAITING_JOB))
    }

    /// Answers one line of a batch. Where the engine has no room for it, it waits.
    pub async fn line(&self, line: Result<Line, Unread>) -> Value {
        let id = format!("req-{}", uuid::Uuid::new_v4().simple());
        let line = match line {
            Ok(line) => line,
            Err(unread) => return unread.answer(&id),
        };
        loop {
            let call =
                Call { method: line.method.clone(), path: line.url.clone(), body: line.body.clone(), request_id: id.clone(), client: None };
            let answer = match self.call(call).await {
                Err(failure) if failure.kind == Kind::Overloaded => {
                    tokio::time::sleep(batch::AGAIN).await;
                    continue;
                }
                Ok(Reply::Whole(body)) => Ok(body),
                // `stream` lay deeper than where reading the line looks for it.
                Ok(Reply::Stream(_)) => Err(batch::no_stream()),
                Err(failure) => Err(failure),
            };
            return line.answer(&id, &answer);
        }
    }

    /// The direct door: what an OpenAI client sent. Calls that a job wraps come here, too.
    pub async fn call(&self, mut call: Call) -> Result<Reply, Failure> {
        let Some(route) = routes::find(&call.path) else {
            return Err(Failure::new(Kind::NotFound, format!("There is no route {} {}.", call.method, call.path)).code("unknown_route"));
        };
        if !route.takes(&call.method) {
            let message = format!("{} does not take {}, only {}.", call.path, call.method, route.methods());
            return Err(Failure::new(Kind::MethodNotAllowed, message).code("method_not_allowed"));
        }
        if let (Some(model), Value::Object(body)) = (routes::model(&call.path), &mut call.body)
            && body.get("model").is_none_or(Value::is_null)
        {
            body.insert("model".to_owned(), Value::String(model));
        }
        if let Some(client) = &call.client {
            self.models.check_client(client, &route, &call.body)?;
        }
        // What is stored is the same for all of them.
        let of_all = &self.models.first.served;
        match route {
            Route::Models => Ok(Reply::Whole(model_list::list(&self.models, call.client.as_deref()))),
            Route::Model(id) => model_list::retrieve(&self.models, &id).map(Reply::Whole),
            Route::Embeddings => self.pool(pooling::embeddings::read, call.request_id, call.body).await,
            Route::Rerank => self.pool(pooling::rerank::rerank, call.request_id, call.body).await,
            Route::Score => self.pool(pooling::rerank::score, call.request_id, call.body).await,
            Route::Responses => self.generate(responses::read, call.request_id, call.body).await,
            Route::Response(id) if call.method == "DELETE" => responses::delete(of_all, &id).map(Reply::Whole),
            Route::Response(id) => responses::retrieve(of_all, &id).map(Reply::Whole),
            Route::CancelResponse(id) => responses::cancel(of_all, &id).map(Reply::Whole),
            Route::InputItems { id, query } => responses::input_items(of_all, &id, &query).map(Reply::Whole),
            Route::Messages => self.generate(anthropic::read, call.request_id, call.body).await,
            Route::CountTokens => self.compute(anthropic::count, call.body).await,
            Route::Chat => self.generate(chat::read, call.request_id, call.body).await,
            Route::Completions => self.generate(completions::read, call.request_id, call.body).await,
            Route::Infill => self.generate(infill::read, call.request_id, call.body).await,
            Route::FastChat => self.generate(fastchat::read, call.request_id, call.body).await,
            Route::Tokenize => self.compute(calls::tokenize, call.body).await,
            Route::Detokenize => self.compute(calls::detokenize, call.body).await,
            Route::ApplyTemplate => self.compute(calls::apply_template, call.body).await,
            Route::Render => self.compute(calls::render, call.body).await,
            Route::TokenCheck => {
                let models = self.models.clone();
                let check = move |body: &Value| calls::token_check(|prompt| &models.of_body(prompt).served, body);
                reading(call.body, check).await.map(Reply::Whole)
            }
            Route::Abort => calls::abort(&self.models.first.runs.running, &call.body).map(Reply::Whole),
            Route::Document => Ok(Reply::Whole(openapi::document().clone())),
            Route::Version => Ok(Reply::Whole(calls::version())),
            Route::Load => Ok(Reply::Whole(calls::load(self.load()))),
        }
    }

    /// Answers from the body alone.
    async fn compute(&self, compute: calls::Compute, body: Value) -> Result<Reply, Failure> {
        let served = self.models.of_body(&body).served.clone();
        reading(body, move |body| compute(&served, body)).await.map(Reply::Whole)
    }

    /// Reads a request, runs it, and gives the answer: as a stream, if the request says so.
    async fn generate(&self, read: Read, id: String, body: Value) -> Result<Reply, Failure> {
        let id = request_id(&body)?.unwrap_or(id);
        let model = self.models.of_body(&body);
        check_generates(&model.served, &body)?;
        let served = model.served.clone();
        let read = move |body: &Value| read(&served, &id, body).map(|prepared| (prepared, id));
        let (Prepared { request, mut dialect }, id) = reading(body, read).await?;
        let mut run = RequestStream::start(&model.runs, &id, &request)?;
        if request.options.stream {
            return Ok(Reply::Stream(stream(run, dialect)));
        }
        let choices = run.collect().await?;
        Ok(Reply::Whole(dialect.whole(choices, run.usage())))
    }

    /// Embeds texts, or scores pairs of them.
    async fn pool(&self, read: pooling::Read, id: String, body: Value) -> Result<Reply, Failure> {
        let id = request_id(&body)?.unwrap_or(id);
        let model = self.models.of_body(&body);
        let (served, of_request) = (model.served.clone(), id.clone());
        let PoolingCall { inputs, write } = reading(body, move |body| read(&served, &of_request, body)).await?;
        let results = pooling::run(&model.runs, &id, inputs).await?;
        // Many long vectors take a while to write, too.
        let written = tokio::task::spawn_blocking(move || write(results)).await;
        written.map(Reply::Whole).map_err(|error| {
            tracing::error!("an answer could not be written: {error}");
            Failure::internal("The answer could not be written.")
        })
    }
}

/// Refuses to generate with a model that embeds or scores texts.
fn check_generates(served: &ServedModel, body: &Value) -> Result<(), Failure> {
    let Some(spec) = &served.limits.pooling else { return Ok(()) };
    served.check_model(&Fields::new(body)?)?;
    let (does, routes) = match spec.task {
        PoolingTask::Embed => ("embeds texts", "/v1/embeddings"),
        PoolingTask::Score => ("scores pairs of texts", "/v1/rerank or /v1/score"),
    };
    let message = format!("The model `{}` {does} and generates none; use {routes}.", served.name());
    Err(Failure::bad_request("model", message).code("unsupported_value"))
}

/// Reads a body on a thread of its own: the checks, template and tokenization of long prompts must not hold up the sockets.
async fn reading<T: Send + 'static>(body: Value, read: impl FnOnce(&Value) -> Result<T, Failure> + Send + 'static) -> Result<T, Failure> {
    let task = tokio::task::spawn_blocking(move || {
        let read = read(&body);
        drop(body);
        reclaim::freed();
        read
    });
    task.await.unwrap_or_else(|error| {
        tracing::error!("a request could not be read: {error}");
        Err(Failure::internal("The request could not be read."))
    })
}

/// The id that the request gives itself (`request_id`, FastDeploy's `req_id`): answers carry it, and `/v1/abort_requests` knows it.
fn request_id(body: &Value) -> Result<Option<String>, Failure> {
    const LONGEST: usize = 128;
    let fields = Fields::new(body)?;
    let Some(id) = fields.string("request_id")? else { return Ok(None) };
    if (1..=LONGEST).contains(&id.len()) && id.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        return Ok(Some(id.to_owned()));
    }
    let message = format!("'request_id' must be 1 to {LONGEST} printable ASCII characters.");
    Err(Failure::bad_request(fields.get("request_id").map_or_else(String::new, |field| field.name), message).code("invalid_value"))
}

/// The answer of a run as a stream of `dialect`. Dropping the stream drops the run.
fn stream(run: RequestStream, dialect: Box<dyn Dialect>) -> Pieces {
    let state = Streaming { dialect, run, started: false, failed: None };
    Box::pin(futures::stream::unfold(state, |mut state| async move { state.next().await.map(|item| (item, state)) }))
}

/// A stream on its way.
struct Streaming {
    dialect: Box<dyn Dialect>,
    run: RequestStream,
    /// The first deltas have come.
    started: bool,
    /// Ends the stream after the item that says so.
    failed: Option<Failure>,
}

impl Streaming {
    /// A failure before the first deltas is the only item, so that its status can still be told; later ones follow an item of their own.
    async fn next(&mut self) -> Option<Result<Value, Failure>> {
        if let Some(failure) = self.failed.take() {
            return Some(Err(failure));
        }
        loop {
            let deltas = match self.run.next().await? {
                Ok(deltas) => deltas,
                Err(failure) if self.started => {
                    let last = self.dialect.error(&failure);
                    self.failed = Some(failure);
                    return Some(Ok(last));
                }
                Err(failure) => return Some(Err(failure)),
            };
            let usage = self.run.usage();
            if !std::mem::replace(&mut self.started, true) {
                self.dialect.open(usage);
            }
            self.dialect.delta(deltas, usage);
            if self.run.is_done() {
                self.dialect.end(usage);
            }
            if let Some(item) = self.dialect.take() {
                return Some(Ok(item));
            }
        }
    }
}
