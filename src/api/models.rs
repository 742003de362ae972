//! The models of a service, and which of them a request is for.

use std::sync::Arc;

use serde_json::Value;

use crate::api::fields::Fields;
use crate::api::model::ModelInfo;
use crate::api::routes::Route;
use crate::api::run::{Runs, Seeds};
use crate::api::running::Running;
use crate::api::served::ServedModel;
use crate::config::{ApiSettings, ClientKey};
use crate::engine::Handle;
use crate::error::{Failure, Kind};
use crate::text::tokenizer::Tokenizer;

/// A model that was loaded, to be served.
pub struct LoadedModel {
    pub engine: Handle,
    pub tokenizer: Arc<Tokenizer>,
    pub info: ModelInfo,
}

/// A model as it is served.
pub struct Model {
    pub served: Arc<ServedModel>,
    pub runs: Runs,
}

/// All that are served, in their order.
pub struct Models {
    /// Answers requests that name none.
    pub first: Model,
    others: Vec<Model>,
}

impl Models {
    /// Of several models each gets one of the served names, in their order. The ids of running requests and stored responses are known to
    /// all of them.
    ///
    /// # Errors
    /// Settings that do not hold for one of them, and names that are not distinct.
    pub fn new(settings: &ApiSettings, loaded: Vec<LoadedModel>) -> Result<Self, Failure> {
        let (several, running) = (loaded.len() > 1, Arc::<Running>::default());
        let mut models = Vec::with_capacity(loaded.len());
        for (place, LoadedModel { engine, tokenizer, info }) in loaded.into_iter().enumerate() {
            let mut settings = settings.clone();
            if several {
                settings.served_names = settings.served_names.get(place).cloned().into_iter().collect();
            }
            let (timeout, seeds) = (settings.request_timeout, Seeds::new(settings.seed));
            let (limits, name) = (engine.limits().clone(), info.name.clone());
            let served = ServedModel::new(settings, limits, tokenizer.clone(), info);
            let served = served.map_err(|failure| if several { failure.of(&name) } else { failure })?;
            models.push((served, Runs { engine, tokenizer, timeout, seeds, running: running.clone() }));
        }
        let names: Vec<String> = models.iter().flat_map(|(served, _)| served.names()).cloned().collect();
        if let Some(name) = names.iter().enumerate().find_map(|(place, name)| (several && names[..place].contains(name)).then_some(name)) {
            let message = format!("MODEL: two models would be served as {name:?}; name each by SERVED_MODEL_NAME, in the order of MODEL");
            return Err(Failure::internal(message));
        }
        let responses = models.first().and_then(|(served, _)| served.responses.clone());
        let mut models = models.into_iter().map(|(mut served, runs)| {
            (served.listed, served.responses) = (names.clone(), responses.clone());
            Model { served: Arc::new(served), runs }
        });
        let first = models.next().ok_or_else(|| Failure::internal("MODEL: there is no model to be served"))?;
        Ok(Self { first, others: models.collect() })
    }

    pub fn iter(&self) -> impl Iterator<Item = &Model> + Clone {
        std::iter::once(&self.first).chain(&self.others)
    }

    /// The one that a body asks for. What is wrong with its `model` is told by whoever reads the body.
    pub fn of_body(&self, body: &Value) -> &Model {
        let fields = Fields::new(body).ok();
        let name = fields.as_ref().and_then(|fields| fields.string("model").ok().flatten());
        name.and_then(|name| self.named(name)).unwrap_or(&self.first)
    }

    /// The one of this name: a served one, or a model's own where no other is served under it.
    pub fn named(&self, name: &str) -> Option<&Model> {
        let served = self.iter().find(|model| model.served.names().iter().any(|served| served == name));
        served.or_else(|| self.iter().find(|model| model.served.is_own_name(name)))
    }

    /// Whether a client may call this route with this body: the models that it asks for, and what concerns the requests of others.
    pub fn check_client(&self, client: &ClientKey, route: &Route, body: &Value) -> Result<(), Failure> {
        match (route, body) {
            (Route::Models | Route::Version | Route::Load | Route::Document, _)
            | (Route::Response(_) | Route::CancelResponse(_) | Route::InputItems { .. }, _) => Ok(()),
            (Route::Model(id), _) => self.check_use(client, Some(id), "model"),
            (Route::Abort, _) if Fields::new(body)?.flag("abort_all")? => {
                let message = format!("The key {:?} may not end the requests of others; name your own in 'req_ids'.", client.name);
                Err(Failure::new(Kind::Forbidden, message).param("abort_all"))
            }
            (Route::Abort, _) => Ok(()),
            // Each prompt names its own.
            (Route::TokenCheck, _) => match body["prompts"].as_array() {
                Some(prompts) => prompts
                    .iter()
                    .enumerate()
                    .try_for_each(|(place, prompt)| self.check_use(client, prompt["model"].as_str(), &format!("prompts[{place}].model"))),
                None => Ok(()),
            },
            (_, Value::Object(_)) => self.check_use(client, Fields::new(body)?.string("model")?, "model"),
            _ => self.check_use(client, None, "model"),
        }
    }

    /// Whether a client may use the model of this name, which it asks for in `param`.
    fn check_use(&self, client: &ClientKey, name: Option<&str>, param: &str) -> Result<(), Failure> {
        let name = match name {
            None | Some("" | "null" | "default") => self.first.served.name(),
            // Other names of the same model.
            Some(name) => match self.named(name) {
                Some(model) if !model.served.names().iter().any(|served| served == name) => model.served.name(),
                _ => name,
            },
        };
        if client.may_use(name) {
            return Ok(());
        }
        let message = format!("The key {:?} may not use the model `{name}`.", client.name);
        Err(Failure::new(Kind::Forbidden, message).param(param).code("model_not_allowed"))
    }
}
